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
    assert packed_of(module)[1].is_mkldnn


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


@pytest.fixture
def onednn_is_faster(monkeypatch):
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)


def products(run) -> int:
    """How often ``run`` takes oneDNN's product."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("rows", [(1,), (7,), (130,), (2, 5), (3, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_plain_layers_take_the_faster_product(onednn_is_faster, rows, bias):
    layer, x = nn.Linear(40, 24, bias=bias), torch.randn(*rows, 40)
    with torch.no_grad():
        taken = products(lambda: linear.linear(layer, x))
        y, plain = linear.linear(layer, x), layer(x)
        exact = copy.deepcopy(layer).double()(x.double())
    assert taken == (x.numel() > 0)
    testing.assert_parity("out", y, plain, exact)


def test_matrices_with_gaps(onednn_is_faster):
    weight = torch.randn(24, 80)[:, :40]
    for x in (torch.randn(130, 40), torch.randn(40, 130).T, torch.randn(3, 40)):
        with torch.no_grad():
            y, plain = linear.product(x, weight), nn.functional.linear(x, weight)
        testing.assert_parity("out", y, plain, x.double() @ weight.double().T)


def test_onednn_sees_no_gaps(onednn_is_faster, monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear, "_product", lambda x, w, b: seen.append(x.is_contiguous() and w.is_contiguous())
    )
    weight = torch.randn(24, 80)
    with torch.no_grad():
        linear.product(torch.randn(40, 130).T, weight[:, :40])
        linear.product(torch.randn(40, 3).T, weight[:, :40].contiguous())
        linear.product(torch.randn(3, 40), weight[:, :40])  # few rows: not worth a copy
    assert seen == [True, True]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_whatever_else_is_called(onednn_is_faster):
    x = torch.randn(3, 40)

    def taken(layer, x=x):
        with torch.no_grad():
            return products(lambda: linear.linear(layer, x))

    hooked = nn.Linear(40, 24)
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    assert taken(hooked) == 0 and seen
    doubled = Doubled(40, 24)
    assert taken(doubled) == 0
    with torch.no_grad():
        assert torch.equal(linear.linear(doubled, x), doubled(x))
    plain = nn.Linear(40, 24)
    assert taken(plain) == 1
    replaced = nn.Linear(40, 24)
    replaced.forward = lambda x: x
    assert taken(replaced) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(plain) == 0
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert taken(plain) == 0
    assert taken(nn.Linear(40, 24, dtype=torch.float64), x.double()) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 40), (2, 5, 40)])
def test_gradients(onednn_is_faster, bias, shape):
    layer = nn.Linear(40, 24, bias=bias)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(shape)
    dy = torch.randn(*shape[:-1], 24)

    def gradients(run, like, x, dy):
        x = x.clone().requires_grad_()
        return dict(zip(("x", "weight", "bias"), torch.autograd.grad(
            run(like, x), [x, *like.parameters()], dy), strict=False))  # fmt: skip

    found = gradients(linear.linear, layer, x, dy)
    plain = gradients(lambda m, x: m(x), layer, x, dy)
    true = gradients(lambda m, x: m(x), exact, x.double(), dy.double())
    assert found.keys() == true.keys() and len(found) == 2 + bias
    for name in true:
        testing.assert_parity(name, found[name], plain[name], true[name])
    step = x.clone().requires_grad_()
    assert products(lambda: linear.linear(layer, step).sum().backward()) == 2  # y and dx


def test_only_what_needs_a_gradient_gets_one(onednn_is_faster):
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    layer.weight.requires_grad_(False)
    linear.linear(layer, x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not linear.linear(layer, x).requires_grad


def test_gradients_of_gradients(onednn_is_faster):
    weight, x = torch.randn(4, 6), torch.randn(5, 6)

    def penalty(product, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        (dx,) = torch.autograd.grad(product(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    found = penalty(linear.product, torch.float32)
    plain = penalty(nn.functional.linear, torch.float32)
    exact = penalty(nn.functional.linear, torch.float64)
    for name, *three in zip(("x", "weight"), found, plain, exact, strict=True):
        testing.assert_parity(name, *three)


def test_models_take_it(onednn_is_faster):
    """Six products a BERT layer, four a ModernBERT layer."""
    from transformers import BertConfig, ModernBertConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 50}  # fmt: skip
    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    bert = fastenc.BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    modern = fastenc.ModernBertModel(ModernBertConfig(**sizes, **special)).eval()
    ids = torch.arange(5, 12).unsqueeze(0)
    with torch.inference_mode():
        assert products(lambda: bert(input_ids=ids)) == 12
        assert products(lambda: modern(input_ids=ids)) == 8
