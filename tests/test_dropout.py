"""Dropout by a mask of fastenc's own: its numbers, its gradient, and where it is taken."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastenc
from fastenc.nn.dropout import dropout
from fastenc.ops import backends
from fastenc.ops.dropout import dropout_ref

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        backends()["dropout"]["cpu"] != "available", reason=backends()["dropout"]["cpu"]
    ),
]
SEEDS = (0, 7, -1, 2**62 + 12345)
SIZES = (0, 1, 15, 16, 17, 63, 64, 65, 1000, 70001)


def op(x, p, seed, backend="cpu"):
    seed = torch.tensor([seed])
    return getattr(torch.ops, f"fastenc_{backend}").dropout_fwd(x, p, seed)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_element_is_the_specifications(p, dtype):
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        for seed in SEEDS:
            expected = dropout_ref(x.float(), p, torch.tensor([seed])).to(dtype)
            assert torch.equal(op(x, p, seed), expected)
            assert torch.equal(op(x, p, seed, "reference"), expected)


@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_every_instruction_set_drops_the_same(isa):
    if os.environ.get("FASTENC_CPU_ISA") == isa:
        pytest.skip("this is that process")
    test = f"{__file__}::test_every_element_is_the_specifications"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "FASTENC_CPU_ISA": isa}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]


def test_the_share_that_is_kept():
    kept = op(torch.ones(400_000), 0.3, 11)
    assert abs((kept != 0).float().mean().item() - 0.7) < 0.005
    assert set(kept.unique().tolist()) == {0.0, kept.max().item()}
    neighbours = (kept[1:] != 0) & (kept[:-1] != 0)
    assert abs(neighbours.float().mean().item() - 0.49) < 0.005
    columns = (kept.view(-1, 64) != 0).float().mean(0)
    assert (columns - 0.7).abs().max() < 0.03


def test_threads_make_no_difference():
    x = torch.randn(300_001)
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(op(x, 0.1, 3))
    assert all(torch.equal(made[0], y) for y in made)


def test_the_gradient_meets_the_same_mask():
    x = torch.randn(7, 33, requires_grad=True)
    y = torch.ops.fastenc.dropout_fwd(x, 0.4, torch.tensor([5]))
    cotangent = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, cotangent)
    (expected,) = torch.autograd.grad(dropout_ref(x, 0.4, torch.tensor([5])), x, cotangent)
    assert torch.equal(gradient, expected)
    torch.library.opcheck(torch.ops.fastenc.dropout_fwd, (x, 0.4, torch.tensor([5])))


def test_strides_do_not_matter():
    x = torch.randn(40, 30)
    expected = op(x, 0.4, 5)
    assert torch.equal(op(x.t().contiguous().t(), 0.4, 5), expected)
    assert torch.equal(op(torch.stack([x, x], -1)[..., 1], 0.4, 5), expected)


def test_what_is_no_number_stays_so():
    x = torch.full((64,), float("nan"))
    assert op(x, 0.5, 1).isnan().all()


@pytest.mark.parametrize(
    ("x", "p", "seed", "what"),
    [
        (torch.ones(3), 1.0, torch.tensor([1]), "p: expected"),
        (torch.ones(3), -0.1, torch.tensor([1]), "p: expected"),
        (torch.ones(3), 0.1, torch.tensor([1, 2]), "seed: expected"),
        (torch.ones(3), 0.1, torch.tensor([1.0]), "seed: expected"),
        (torch.ones(3, dtype=torch.int32), 0.1, torch.tensor([1]), "x: expected"),
    ],
)
def test_bad_arguments(x, p, seed, what):
    with pytest.raises(RuntimeError, match=what):
        torch.ops.fastenc.dropout_fwd(x, p, seed)


# ---- the module ----------------------------------------------------------------------------------


def taken(module, x) -> bool:
    with fastenc.record() as record:
        dropout(module, x)
    return record.calls.get("dropout", {}).get("cpu", 0) > 0


def test_a_plain_dropout_in_training_takes_it():
    module, x = nn.Dropout(0.5), torch.ones(1000)
    assert taken(module, x)
    torch.manual_seed(3)
    first = dropout(module, x)
    assert not torch.equal(first, dropout(module, x))
    torch.manual_seed(3)
    assert torch.equal(first, dropout(module, x))


class Mine(nn.Dropout):
    pass


def test_where_the_module_itself_is_called():
    x = torch.ones(64)
    assert not taken(nn.Dropout(0.5).eval(), x)
    assert not taken(nn.Dropout(0.0), x) and not taken(nn.Dropout(1.0), x)
    assert not taken(nn.Identity(), x) and not taken(Mine(0.5), x)
    assert not taken(nn.Dropout(0.5, inplace=True), x.clone())
    assert not taken(nn.Dropout(0.5), x.double())
    hooked = nn.Dropout(0.5)
    hooked.register_forward_hook(lambda *_: None)
    assert not taken(hooked, x)
    with fastenc.use_backend("reference"):
        assert not taken(nn.Dropout(0.5), x)
    assert torch.equal(dropout(nn.Dropout(1.0), x), torch.zeros(64))


def test_a_checkpointed_layer_drops_the_same_again():
    module, layer, x = nn.Dropout(0.5), nn.Linear(50, 50), torch.randn(9, 50)

    def gradient(run):
        torch.manual_seed(1)
        layer.zero_grad()
        run(lambda t: dropout(module, layer(t)), x).square().sum().backward()
        return layer.weight.grad.clone()

    plain = gradient(lambda f, t: f(t))
    again = gradient(lambda f, t: torch.utils.checkpoint.checkpoint(f, t, use_reentrant=False))
    assert torch.equal(plain, again)


def test_the_models_take_it():
    """Residual branches of BERT's layers, and position tables besides in DeBERTa's."""
    from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "vocab_size": 99}  # fmt: skip
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    for kind, config, times in (
        (BertModel, BertConfig(**sizes), 4),
        (DebertaV2Model, DebertaV2Config(**sizes, **relative), 6),
    ):
        model = fastenc.accelerate(kind(config)).train()
        with fastenc.record() as record:
            model(input_ids=torch.randint(1, 99, (2, 9))).last_hidden_state.sum().backward()
        assert record.calls["dropout"] == {"cpu": times}
        assert record.calls["dropout_bwd"] == {"cpu": times}
        assert not record.fallbacks
