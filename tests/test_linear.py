"""Prepacked linear layers: the numbers of nn.Linear, and a packed copy that follows its weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastenc
from fastenc import testing
from fastenc.nn import linear

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def packs_fp32(monkeypatch):
    """As on a machine that takes torch's product: fp32 weights are packed as well."""
    monkeypatch.setattr(linear, "prefers_own", lambda gradients=False: False)


def make(inputs=40, outputs=24, bias=True, dtype=torch.float32):
    return linear.prepack(nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype)))


def assert_matches(module, x):
    layer = module[0]
    with torch.no_grad():
        y = module(x)
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias.double()
        exact = nn.functional.linear(x.double(), layer.weight.double(), bias)
    testing.assert_parity("out", y, plain, exact)


@pytest.mark.parametrize("rows", [(1,), (7,), (130,), (2, 5), (3, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(rows, bias, dtype):
    assert_matches(make(bias=bias, dtype=dtype), torch.randn(*rows, 40, dtype=dtype))


def packed_of(module):
    return linear._packed.get(module[0])


def test_it_is_packed_only_without_gradients():
    module, x = make(), torch.randn(3, 40)
    module(x).sum().backward()
    assert module[0].weight.grad is not None and packed_of(module) is None
    with torch.inference_mode():
        module(x)
    assert packed_of(module).value.is_mkldnn


def test_the_packed_copy_follows_the_weight():
    module, x = make(), torch.randn(3, 40)
    assert_matches(module, x)
    with torch.no_grad():
        module[0].weight.mul_(2)
    assert_matches(module, x)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(x).sum().backward()
    optimizer.step()
    assert_matches(module, x)
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})
    assert_matches(module, x)
    module.bfloat16()
    assert_matches(module, x.bfloat16())


@pytest.mark.parametrize("given", [{"fused": True}, {"foreach": True}, {}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_packed_copy_follows_an_optimizer(kind, given):
    """torch's fused steps leave the version counters where they were."""
    layer = linear.prepack(nn.Linear(8, 5))
    optimizer = kind(layer.parameters(), lr=0.5, **given)
    x = torch.randn(3, 8)
    for _ in range(2):
        with torch.no_grad():
            before = layer(x)
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            found = layer(x)
        torch.testing.assert_close(found, nn.functional.linear(x, layer.weight, layer.bias))
        assert not torch.allclose(found, before)


def test_a_replaced_weight_at_an_old_address_is_seen():
    """The allocator hands the memory of the weight before last out again."""
    module, x = make(256, 256, bias=False), torch.ones(8, 256)
    with torch.no_grad():
        for value in range(0, 90, 3):
            for step in range(3):
                module[0].weight = None
                module[0].weight = nn.Parameter(torch.full((256, 256), value + float(step)))
                if step != 1:
                    assert module(x)[0, 0] == 256 * (value + step)


def test_names_copies_and_the_way_back():
    module, x = make(), torch.randn(3, 40)
    assert_matches(module, x)
    assert list(module.state_dict()) == ["0.weight", "0.bias"]
    assert_matches(copy.deepcopy(module), x)
    assert_matches(pickle.loads(pickle.dumps(module)), x)
    linear.unpack(module)
    assert type(module[0]) is nn.Linear and packed_of(module) is None


def test_a_dead_module_frees_its_copy():
    before = len(linear._packed)
    module = make()
    assert_matches(module, torch.randn(3, 40))
    assert len(linear._packed) == before + 1
    del module
    assert len(linear._packed) == before


def test_autocast_and_compile_are_plain():
    module, x = make(), torch.randn(3, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))


def test_weights_without_a_version_and_a_switched_off_onednn_are_plain():
    with torch.inference_mode():
        module = make()
    x = torch.randn(3, 40)
    for _ in range(2):
        assert_matches(module, x)
        with torch.inference_mode():
            module[0].weight.mul_(2)
    module = make()
    with torch.backends.mkldnn.flags(enabled=False):
        assert_matches(module, x)
    assert packed_of(module) is None


def test_accelerate_packs_on_request_and_restore_undoes_it():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = BertModel(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        plain = model(ids).last_hidden_state
        assert fastenc.accelerate(model, prepack=True) is model
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert {type(m) for m in layers} == {linear.PrepackedLinear}
        torch.testing.assert_close(model(ids).last_hidden_state, plain)
        fastenc.restore(model)
    assert type(model) is BertModel and {type(m) for m in layers} == {nn.Linear}
