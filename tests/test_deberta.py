"""DebertaV2Model: the numbers of transformers, forward and every gradient."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from model_tests import at, check_model, check_wanted_rows, padded, telling

import fastenc
from fastenc.models import deberta
from fastenc.nn import VarlenBatch, prepack
from fastenc.ops.disentangled_attention import _kept_index
from fastenc.testing import assert_parity

# The shape of v3, small: no absolute positions, shared projections, normed relative embeddings.
TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 0,
    "relative_attention": True, "max_relative_positions": -1, "position_buckets": 8,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "layer_norm_eps": 1e-7,
}  # fmt: skip


def pair(**options):
    """(ours, transformers') with the same telling weights, in eval mode."""
    config = transformers.DebertaV2Config(**TINY | options)
    reference = telling(transformers.DebertaV2Model(config)).eval()
    ours = fastenc.DebertaV2Model(copy.deepcopy(reference.config)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def inputs_of(side: str = "right", lengths=(50, 7, 1)) -> dict:
    ids, mask = padded(lengths, max(lengths), 99, side)
    return {"input_ids": ids, "attention_mask": mask}


OPTIONS = [
    {},
    {"share_att_key": False},
    {"pos_att_type": ["c2p"]},
    {"pos_att_type": ["p2c"], "share_att_key": False},
    {"pos_att_type": []},
    {"position_buckets": -1, "max_relative_positions": 16},
    {"relative_attention": False},
    {"norm_rel_ebd": "none", "type_vocab_size": 2, "position_biased_input": True},
    {"hidden_act": "silu", "num_hidden_layers": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_configurations(options):
    ours, reference = pair(**options)
    with fastenc.record() as ran:
        check_model(ours, reference, inputs_of())
    attention = (
        "disentangled_attention" if options.get("relative_attention", True) else "varlen_attention"
    )
    assert {attention, "add_layer_norm"} <= ran.calls.keys() and ran.fallbacks == []


def test_bfloat16():
    check_model(*pair(), inputs_of(), torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"position_buckets": -1, "max_relative_positions": 16}])
def test_float64_is_exact(options):
    ours, reference = (at(m, torch.float64) for m in pair(**options))
    inputs = inputs_of()
    real = inputs["attention_mask"] == 1
    with torch.no_grad():
        a, b = (m(**inputs).last_hidden_state[real] for m in (ours, reference))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "mixed"])
def test_padding(side):
    check_model(*pair(), inputs_of(side))


def test_the_shape_of_v3_past_the_logarithm():
    ours, reference = pair(
        hidden_size=128, num_attention_heads=2, position_buckets=256, max_position_embeddings=512,
        num_hidden_layers=1,
    )  # fmt: skip
    check_model(ours, reference, inputs_of(lengths=(400, 20)))


def test_hidden_states():
    ours, reference = pair()
    inputs = inputs_of() | {"output_hidden_states": True}
    real = inputs["attention_mask"] == 1
    actual, plain, exact = (m(**inputs) for m in (ours, reference, at(reference, torch.float64)))
    assert actual.keys() == plain.keys() and len(actual.hidden_states) == 3
    for i, states in enumerate(
        zip(actual.hidden_states, plain.hidden_states, exact.hidden_states, strict=True)
    ):
        assert_parity(f"hidden state {i}", *(x[real] for x in states))


def test_packed_is_each_sequence_alone():
    ours, reference = pair()
    lists = [list(range(3, 3 + n)) for n in (9, 1, 17)]
    packed = ours.forward_packed(VarlenBatch.from_lists(lists))
    models = (reference, at(reference, torch.float64))
    plain, exact = (
        torch.cat([m(torch.tensor([x])).last_hidden_state[0] for x in lists]) for m in models
    )
    assert_parity("packed", packed, plain, exact)


def test_the_last_layer_makes_wanted_rows_only(monkeypatch):
    check_wanted_rows(deberta, *pair(), monkeypatch)


# ---- position tables -----------------------------------------------------------------------------


def projected(monkeypatch) -> list[int]:
    """Grows by the number of rows whenever position tables are made."""
    made = []
    project = deberta._Relative._project

    def counted(self, attn, first, last):
        made.append(last - first)
        return project(self, attn, first, last)

    monkeypatch.setattr(deberta._Relative, "_project", counted)
    return made


@pytest.mark.parametrize("prepacked", [False, True])
def test_tables_are_kept_until_a_weight_changes(prepacked, monkeypatch):
    ours, _ = pair()
    if prepacked:
        prepack(ours)
    inputs, made = inputs_of(), projected(monkeypatch)
    with torch.no_grad():
        first = ours(**inputs).last_hidden_state
        assert torch.equal(ours(**inputs).last_hidden_state, first)
        assert made == [16, 16]  # once for each layer
        for change in (
            lambda: ours.encoder.rel_embeddings.weight.mul_(1.5),
            lambda: ours.encoder.LayerNorm.bias.add_(0.3),
            lambda: ours.encoder.layer[0].attention.self.key_proj.weight.mul_(1.1),
            lambda: ours.load_state_dict({k: v * 1.01 for k, v in ours.state_dict().items()}),
        ):
            before = ours(**inputs).last_hidden_state
            change()
            made.clear()
            after = ours(**inputs).last_hidden_state
            assert made and not torch.equal(after, before)
            fresh = fastenc.DebertaV2Model(ours.config).eval()
            fresh.load_state_dict(ours.state_dict())
            if prepacked:
                prepack(fresh)
            assert torch.equal(fresh(**inputs).last_hidden_state, after)


def test_tables_follow_adapters():
    ours, _ = pair()
    config = peft.LoraConfig(
        r=2, target_modules=["key_proj", "query_proj"], init_lora_weights=False
    )
    wrapped, inputs = peft.get_peft_model(ours, config).eval(), inputs_of()
    with torch.no_grad():
        before = wrapped(**inputs).last_hidden_state
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.mul_(2)
        after = wrapped(**inputs).last_hidden_state
        fresh = copy.deepcopy(wrapped)
        assert torch.equal(fresh(**inputs).last_hidden_state, after)
    assert not torch.equal(after, before)


def test_tables_of_weights_without_a_version_and_in_training_are_not_kept(monkeypatch):
    ours, _ = pair(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    inputs, made = inputs_of(), projected(monkeypatch)
    with torch.inference_mode():
        twin = copy.deepcopy(ours)
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        made.clear()
        for _ in range(2):
            torch.testing.assert_close(twin(**inputs).last_hidden_state, expected)
        assert len(made) == 4
        made.clear()
        ours.train()
        for _ in range(2):
            ours(**inputs)
    assert len(made) == 4


def test_tables_follow_a_fused_optimizer():
    """Its step leaves torch's version counters where they were."""
    ours, _ = pair()
    inputs = inputs_of()
    with torch.no_grad():
        ours(**inputs)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    ours(**inputs).last_hidden_state.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = ours(**inputs).last_hidden_state
        fresh = fastenc.DebertaV2Model(ours.config).eval()
        fresh.load_state_dict(ours.state_dict())
        assert torch.equal(fresh(**inputs).last_hidden_state, after)


def test_tables_follow_autocast_and_dtype():
    ours, _ = pair()
    inputs = inputs_of()
    with torch.no_grad():
        plain = ours(**inputs).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(ours(**inputs).last_hidden_state, plain)
        assert torch.equal(ours(**inputs).last_hidden_state, plain)
        assert ours.double()(**inputs).last_hidden_state.dtype == torch.float64


def test_tables_follow_a_replaced_weight_at_an_old_address():
    ours, _ = pair(hidden_size=64)
    given = inputs_of()
    with torch.no_grad():
        for _ in range(40):
            ours.encoder.rel_embeddings.weight = None
            ours.encoder.rel_embeddings.weight = torch.nn.Parameter(torch.randn(16, 64))
            fresh = copy.deepcopy(ours)
            assert torch.equal(ours(**given).last_hidden_state, fresh(**given).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_and_device_of_the_first_call_are_not_kept(dtype):
    q = torch.randn(600, 1, 8)
    tables = torch.randn(2, 1, 512, 8)
    cu = torch.tensor([0, 600], dtype=torch.int32)

    def run():
        return fastenc.disentangled_attention(q, q, q, *tables, cu, 600)

    expected = run()
    _kept_index.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        run()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(run(), expected)
    deberta._reach.cache_clear()
    with torch.device("meta"):
        assert deberta._reach(256, 512, 600) == (0, 512)


def test_training_projects_the_rows_in_reach(monkeypatch):
    ours, _ = pair()
    made = projected(monkeypatch)
    ours.train()
    ours(**inputs_of(lengths=(3, 2))).last_hidden_state.sum().backward()
    assert made == [5, 5]  # distances -2 to 2
    assert ours.encoder.rel_embeddings.weight.grad is not None


def test_pickle_and_deepcopy_carry_no_tables():
    ours, _ = pair()
    inputs = inputs_of()
    with torch.no_grad():
        expected = ours(**inputs).last_hidden_state
        assert torch.equal(copy.deepcopy(ours)(**inputs).last_hidden_state, expected)
    assert not any("kept" in name for name in vars(ours.encoder.layer[0].attention.self))


@pytest.mark.parametrize("where", ["hidden", "attention_probs"])
def test_dropout_is_seeded(where):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, _ = pair(**rates | {f"{where}_dropout_prob": 0.5})
    ours.train()

    def run(seed):
        torch.manual_seed(seed)
        return ours(**inputs_of()).last_hidden_state

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ours, _ = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours.train()
    ours.enable_input_require_grads()
    inputs = inputs_of()

    def gradient():
        ours.zero_grad()
        ours(**inputs).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    plain = gradient()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_convolution_runs_in_transformers_own_forward():
    ours, reference = pair(conv_kernel_size=3, conv_act="gelu")
    with fastenc.record() as ran:
        out = ours(**inputs_of()).last_hidden_state
    assert ran.fallbacks == ["DebertaV2Model: a convolution after the first layer"]
    assert torch.equal(out, reference(**inputs_of()).last_hidden_state)


@pytest.mark.parametrize(("buckets", "far"), [(2, 64), (9, 64), (16, 9)])
def test_buckets_without_a_logarithm_run_in_transformers_own_forward(buckets, far):
    ours, _ = pair(position_buckets=buckets, max_relative_positions=far)
    with fastenc.record() as ran:
        ours(**inputs_of())
    assert ran.fallbacks == [
        f"DebertaV2Model: position_buckets = {buckets} with {far} relative positions"
    ]


def test_a_mask_with_holes_runs_in_transformers_own_forward():
    ours, reference = pair()
    inputs = inputs_of()
    inputs["attention_mask"][0, 20:25] = 0
    with fastenc.record() as ran:
        out = ours(**inputs).last_hidden_state
    assert ran.fallbacks == ["DebertaV2Model: an attention_mask with holes"]
    assert torch.equal(out, reference(**inputs).last_hidden_state)
    batch = VarlenBatch.from_padded(*inputs.values())
    with pytest.raises(ValueError, match="relative positions"):
        ours.forward_packed(batch)


def test_saved_and_loaded(tmp_path):
    ours, reference = pair()
    reference.save_pretrained(tmp_path)
    loaded = fastenc.DebertaV2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(
            loaded(**inputs_of()).last_hidden_state, ours(**inputs_of()).last_hidden_state
        )


def test_misuse():
    ours, _ = pair(position_biased_input=True)
    with pytest.raises(ValueError, match="too long"):
        ours(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="vocabulary"):
        ours(torch.full((1, 3), 99))
