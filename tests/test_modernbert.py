"""ModernBertModel: the numbers of transformers, forward and every gradient."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import transformers
from model_tests import at, check_model, padded, telling

import fastenc
from fastenc.nn import VarlenBatch, linear
from fastenc.testing import assert_parity

# as transformers' own tests: 7 tokens, head_dim 8, intermediate 37
TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 4, "local_attention": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
        "original_max_position_embeddings": 16}  # fmt: skip
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "rope_theta": 1e4, "original_max_position_embeddings": 16}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}  # fmt: skip
CONFIGS = {
    "plain": {},
    "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "silu": {"hidden_activation": "silu"},
    "tanh": {"hidden_activation": "gelu_pytorch_tanh"},
    "relu": {"hidden_activation": "relu"},
    "all global": {"layer_types": ["full_attention"] * 3},
    "all local": {"layer_types": ["sliding_attention"] * 3},
    "one layer": {"layer_types": ["full_attention"]},
    "local first": {"layer_types": ["sliding_attention", "full_attention"]},
    "window of one": {"local_attention": 1},
    "a wide eps": {"norm_eps": 0.5},
    "wide heads": {"num_attention_heads": 1, "hidden_size": 96},
    "linear rope": {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
    "llama and long rope": {
        "rope_parameters": {"full_attention": LLAMA, "sliding_attention": LONG}
    },
    "dynamic rope": {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": YARN}},
}


def config_of(layer_types=None, **options) -> transformers.ModernBertConfig:
    config = transformers.ModernBertConfig(**TINY | options)
    if layer_types is not None:  # transformers refuses a single layer type on construction
        config.num_hidden_layers, config.layer_types = len(layer_types), layer_types
    return config


def pair(**options):
    """(ours, transformers') with the same telling weights, in eval mode."""
    reference = telling(transformers.ModernBertModel(config_of(**options))).eval()
    ours = fastenc.ModernBertModel(copy.deepcopy(reference.config)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name):
    ours, reference = pair(**CONFIGS[name])
    ids, mask = padded((23, 7, 1), 23, 99)
    with fastenc.record() as ran:
        check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})
    kernels = {"rope_varlen_attention", "add_layer_norm"} | ({"geglu"} if name != "relu" else set())
    assert kernels <= ran.calls.keys()
    assert ran.fallbacks == (
        ["ModernBERT: no gated kernel for ReLU, plain PyTorch runs"] if name == "relu" else []
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["plain", "biases", "relu", "one layer", "local first", "a wide eps"]
)
def test_without_gradients_sums_are_made_in_place(name, dtype, monkeypatch):
    """To the bit what comes with gradients, whatever lies in the memory that the layers share;
    states that are returned are nobody's to take."""
    monkeypatch.setattr(linear, "prefers_own", lambda gradients=False: True)
    ours = at(pair(**CONFIGS[name])[0], dtype)
    ids, mask = padded((23, 7, 1), 23, 99)
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = ours(**inputs, output_hidden_states=True)
    empty = torch.Tensor.new_empty
    poison = lambda *args, **options: empty(*args, **options).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    with torch.no_grad(), fastenc.record() as ran:
        actual = ours(**inputs).last_hidden_state
        states = ours(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(actual, expected.last_hidden_state)
    assert all(map(torch.equal, states, expected.hidden_states))
    layers = ours.config.num_hidden_layers
    assert ran.calls["add_layer_norm_inplace"]["cpu"] == 2 * layers


@pytest.fixture
def own_product(monkeypatch):
    """As on a machine that takes fastenc's product: layers run without Python between them."""
    monkeypatch.setattr(linear, "prefers_own", lambda gradients=False: True)


def test_without_gradients_other_layers_run_as_with_them(own_product):
    """Given positions, heads wider than the kernels, a layer pruned to another size."""
    ids, mask = padded((23, 7, 1), 23, 99)
    inputs = {"input_ids": ids, "attention_mask": mask}
    positions = torch.arange(23) * torch.tensor([[2], [3], [1]])
    pruned = pair()[0]
    mlp = pruned.layers[1].mlp
    mlp.Wi, mlp.Wo = torch.nn.Linear(32, 20, bias=False), torch.nn.Linear(10, 32, bias=False)
    for model, given in (
        (pair()[0], inputs | {"position_ids": positions}),
        (pair(num_attention_heads=1, hidden_size=260)[0], inputs),
        (pruned, inputs),
    ):
        expected = model(**given).last_hidden_state
        with torch.no_grad():
            torch.testing.assert_close(model(**given).last_hidden_state, expected)


def test_embeddings_that_are_given_are_not_overwritten(own_product):
    ours, _ = pair()
    ours.embeddings.norm = torch.nn.Identity()
    embeds = torch.randn(1, 70, 32)
    before = embeds.clone()
    with torch.no_grad():
        ours(inputs_embeds=embeds)
    assert torch.equal(embeds, before)


class Keeping(torch.nn.Linear):
    """An adapter that keeps what it was given and what it returned."""

    kept = ()

    def forward(self, x):
        y = super().forward(x)
        self.kept, self.copies = (x, y), (x.clone(), y.clone())
        return y


@pytest.mark.parametrize(
    "path",
    [
        "layers.1.mlp.Wo", "layers.0.mlp.Wo", "layers.1.attn.Wo", "layers.0.attn.Wqkv",
        "layers.1.attn.Wqkv", "layers.1.mlp.Wi",
    ],
)  # fmt: skip
def test_what_an_adapter_keeps_is_not_overwritten(path):
    ours, _ = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    ours.get_submodule(path).__class__ = Keeping
    with torch.no_grad(), fastenc.record() as ran:
        ours(input_ids=ids, attention_mask=mask)
    assert not ran.fallbacks and "add_layer_norm" in ran.calls
    adapter = ours.get_submodule(path)
    assert len(adapter.kept) == 2 and all(map(torch.equal, adapter.kept, adapter.copies))


def test_what_a_hook_on_every_module_keeps_is_not_overwritten():
    ours, _ = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    kept = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: (
            kept.append((output, output.clone())) if isinstance(output, torch.Tensor) else None
        )
    )
    try:
        with torch.no_grad():
            ours(input_ids=ids, attention_mask=mask)
    finally:
        hook.remove()
    assert len(kept) > 9 and all(torch.equal(*pair) for pair in kept)


@pytest.mark.parametrize("side", ["right", "left", "mixed", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding(side, dtype):
    ours, reference = pair()
    ids, mask = padded((23, 7, 1), 23, 99, side or "right")
    inputs = {"input_ids": ids} if side is None else {"input_ids": ids, "attention_mask": mask}
    check_model(ours, reference, inputs, dtype)


def test_half_precision():
    ours, reference = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    check_model(ours, reference, {"input_ids": ids, "attention_mask": mask}, torch.float16)


def test_beyond_the_dynamic_rope_and_the_table():
    for options in (CONFIGS["dynamic rope"], CONFIGS["llama and long rope"], {}):
        ours, reference = pair(**options)
        for columns in (12, 90, 30):
            inputs = {"input_ids": padded((columns,), columns, 99)[0]}
            check_model(ours, reference, inputs)
        ids, mask = padded((50, 20), 90, 99, "right")  # frequencies follow the padded width
        check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})


def test_a_real_shape():
    ours, reference = pair(
        vocab_size=1000, hidden_size=768, intermediate_size=1152, num_hidden_layers=2,
        num_attention_heads=12, local_attention=128, max_position_embeddings=8192,
    )  # fmt: skip
    ids, mask = padded((140, 90), 140, 1000)
    with fastenc.record() as ran:
        check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})
    assert ran.fallbacks == []


def test_autocast():
    ours, reference = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact = at(reference, torch.float64)(**inputs).last_hidden_state[mask == 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = reference(**inputs).last_hidden_state[mask == 1]
        actual = ours(**inputs).last_hidden_state[mask == 1]
    assert_parity("last_hidden_state", actual, plain, exact)


def test_hidden_states_and_tuples():
    ours, reference = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    actual, plain = ours(**inputs), reference(**inputs)
    exact = at(reference, torch.float64)(**inputs)
    assert len(actual.hidden_states) == len(exact.hidden_states) == 4
    for i, states in enumerate(
        zip(actual.hidden_states, plain.hidden_states, exact.hidden_states, strict=True)
    ):
        assert_parity(f"hidden state {i}", *(x[mask == 1] for x in states))
        assert (states[0][mask == 0] == 0).all()
    as_tuple = ours(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], actual.last_hidden_state)
    assert isinstance(actual, type(plain)) and actual.keys() == plain.keys()
    for model in (ours, reference):
        model.config.output_hidden_states, model.config.return_dict = True, False
        first, states = model(ids, attention_mask=mask)
        assert first.shape == (3, 23, 32) and len(states) == 4
        assert len(model(ids, attention_mask=mask, output_hidden_states=False)) == 1


def test_inputs_embeds():
    ours, reference = pair()
    _, mask = padded((23, 7, 1), 23, 99)
    embeds = torch.randn(3, 23, 32)
    for options in ({"attention_mask": mask}, {}):
        exact = at(reference, torch.float64)(inputs_embeds=embeds.double(), **options)
        plain, actual = (model(inputs_embeds=embeds, **options) for model in (reference, ours))
        real = mask == 1 if options else slice(None)
        assert_parity("out", *(x.last_hidden_state[real] for x in (actual, plain, exact)))


def test_explicit_positions():
    ours, reference = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    positions = torch.arange(23).mul(2).expand(3, 23)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    check_model(ours, reference, inputs)
    with fastenc.record() as ran:
        ours(ids, position_ids=torch.arange(23).unsqueeze(0))
    assert "rope" not in ran.calls and ran.fallbacks == []


def test_holes_in_the_mask():
    ours, reference = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    mask[0, 4:9] = mask[0, 20] = mask[1, 11] = 0
    with fastenc.record() as ran:
        check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})
    assert ran.fallbacks == ["attention_mask with holes: windowed attention runs in plain PyTorch"]


def test_packed_entry_and_packed_inputs():
    """One row of several sequences, said in three ways, is each sequence alone."""
    ours, reference = pair()
    lists = [list(range(3, 3 + n)) for n in (9, 1, 17)]
    flat = torch.tensor([[*itertools.chain(*lists)]])
    positions = torch.cat([torch.arange(len(x)) for x in lists]).unsqueeze(0)
    cu_seqlens = torch.tensor([0, 9, 10, 27], dtype=torch.int32)
    rows = {
        "forward_packed": ours.forward_packed(VarlenBatch.from_lists(lists)),
        "position_ids": ours(flat, position_ids=positions).last_hidden_state[0],
        "cu_seq_lens": ours(
            flat, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=17,
            max_length_k=17,
        ).last_hidden_state[0],
    }  # fmt: skip
    alone = [torch.tensor([x]) for x in lists]
    plain = torch.cat([reference(x).last_hidden_state[0] for x in alone])
    exact_model = at(reference, torch.float64)
    exact = torch.cat([exact_model(x).last_hidden_state[0] for x in alone])
    for name, actual in rows.items():
        assert_parity(name, actual, plain, exact)


def test_neighbours_do_not_matter():
    ours, _ = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    before = ours(ids, attention_mask=mask).last_hidden_state
    ids[0] = ids[0].flip(0)
    after = ours(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


def test_nan_in_the_padding_reaches_nothing():
    ours, _ = pair()
    _, mask = padded((23, 7, 1), 23, 99)
    embeds = torch.randn(3, 23, 32)
    clean = ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    embeds[mask == 0] = torch.nan
    embeds.requires_grad_()
    out = ours(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert torch.equal(out, clean)
    out.sum().backward()
    assert (embeds.grad[mask == 0] == 0).all()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_rows_of_padding_are_zeros():
    ours, _ = pair()
    ids, mask = padded((5, 0, 3), 6, 99)
    out = ours(ids, attention_mask=mask).last_hidden_state
    assert (out[1] == 0).all()
    alone = ours(ids[:1], attention_mask=mask[:1]).last_hidden_state
    torch.testing.assert_close(out[:1], alone)
    nothing = ours(ids, attention_mask=torch.zeros_like(mask)).last_hidden_state
    assert nothing.shape == (3, 6, 32) and (nothing == 0).all()


def test_dropout():
    """Reproducible under a seed, different under another, silent in eval mode."""
    options = {"embedding_dropout": 0.1, "attention_dropout": 0.2, "mlp_dropout": 0.1}
    ours, _ = pair(**options)
    assert drawn_in_training(ours)


def drawn_in_training(ours, **inputs) -> bool:
    """Whether dropout acts: the same under one seed, with and without gradients."""
    ids, mask = padded((23, 7, 1), 23, 99)
    inputs = {"input_ids": ids, "attention_mask": mask} | inputs
    ours.train()

    def run(seed, gradients):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(gradients):
            return ours(**inputs).last_hidden_state

    differs = set()
    for gradients in (True, False):
        assert torch.equal(run(1, gradients), run(1, gradients))
        differs.add(not torch.equal(run(1, gradients), run(2, gradients)))
    assert len(differs) == 1
    return differs.pop()


@pytest.mark.parametrize("where", ["attention", "attention_output", "mlp", "embeddings", "nowhere"])
@pytest.mark.parametrize("given", ["mask", "positions", "holes"])
def test_every_dropout_acts(where, given, own_product):
    """Each alone, on every way through attention."""
    ours, _ = pair()
    for layer in ours.layers:
        layer.attn.attention_dropout = 0.5 * (where == "attention")
        layer.attn.out_drop = torch.nn.Dropout(0.5 * (where == "attention_output"))
        layer.mlp.drop = torch.nn.Dropout(0.5 * (where == "mlp"))
    ours.embeddings.drop = torch.nn.Dropout(0.5 * (where == "embeddings"))
    _, mask = padded((23, 7, 1), 23, 99)
    mask[0, 4:9] = 0
    inputs = {
        "mask": {},
        "positions": {"position_ids": torch.arange(23).mul(2).expand(3, 23)},
        "holes": {"attention_mask": mask},
    }[given]
    if given == "holes":  # global layers take another way
        ours.layers = ours.layers[1:]
    assert drawn_in_training(ours, **inputs) == (where != "nowhere")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """The same gradients, dropout included, with the layers run twice."""
    ours, _ = pair(attention_dropout=0.2, mlp_dropout=0.1)
    ids, mask = padded((23, 7, 1), 23, 99)
    ours.train()

    def gradients():
        ours.zero_grad()
        torch.manual_seed(3)
        with fastenc.record() as ran:
            ours(ids, attention_mask=mask).last_hidden_state.square().sum().backward()
        assert ran.fallbacks == []
        found = {name: p.grad.clone() for name, p in ours.named_parameters()}
        return found, sum(ran.calls["rope_varlen_attention"].values())

    expected, once = gradients()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, twice = gradients()
    assert (once, twice) == (3, 6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_copies_and_pickles():
    ours, _ = pair()
    ids, mask = padded((23, 7, 1), 23, 99)
    expected = ours(ids, attention_mask=mask).last_hidden_state
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is fastenc.ModernBertModel
        assert torch.equal(twin(ids, attention_mask=mask).last_hidden_state, expected)


def test_inference_mode_then_training():
    """A cos and sin table made under inference_mode serves a later backward."""
    ours, _ = pair()
    with torch.inference_mode():
        ours(torch.ones(1, 9, dtype=torch.long))
    ours(torch.ones(1, 9, dtype=torch.long)).last_hidden_state.sum().backward()


def test_rope_tables_follow_the_frequencies():
    ours, _ = pair()
    ids = torch.arange(20).unsqueeze(0)
    before = ours(ids).last_hidden_state
    found = [before]
    for _ in range(2):
        ours.rotary_emb.full_attention_inv_freq = ours.rotary_emb.full_attention_inv_freq * 0.5
        found.append(ours(ids).last_hidden_state)
        assert not torch.equal(found[-1], found[-2])
    ours.rotary_emb.full_attention_inv_freq.mul_(4)
    assert torch.equal(ours(ids).last_hidden_state, before)


def test_rope_tables_follow_the_dtype():
    """Tables of bfloat16 do not serve float32, nor the other way around."""
    ours, _ = pair()
    low = at(ours, torch.bfloat16)
    ids = torch.arange(20).unsqueeze(0)
    expected = ours(ids).last_hidden_state
    expected_low = low(ids).last_hidden_state
    for parameter, other in zip(ours.parameters(), low.parameters(), strict=True):
        parameter.data, other.data = other.data, parameter.data
    assert torch.equal(ours(ids).last_hidden_state, expected_low)
    assert torch.equal(low(ids).last_hidden_state, expected)


def test_compiles_whole_over_many_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    ours, _ = pair()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.forward_packed, backend=counter, fullgraph=True)
    with torch.no_grad():
        for lengths in ((5, 7, 9), (3, 4), (11, 2, 40, 8), (100, 3), (77, 6, 1)):
            batch = VarlenBatch.from_lists([[5] * n for n in lengths])
            torch.testing.assert_close(compiled(batch), ours.forward_packed(batch))
    assert counter.frame_count <= 2


def bad_inputs():
    ids, mask = padded((5, 3), 6, 99)
    too_big, negative = ids.clone(), ids.clone()
    too_big[0, 1], negative[0, 1] = 99, -4
    embeds = torch.randn(2, 6, 32)
    return {
        "vocabulary size 99, got 99": {"input_ids": too_big},
        "vocabulary size 99, got -4": {"input_ids": negative},
        "exactly one of input_ids": {"input_ids": ids, "inputs_embeds": embeds},
        "exactly one of": {"attention_mask": mask},
        "attention_mask: expected the input's shape": {
            "input_ids": ids, "attention_mask": mask[:, :5]},
        "attention_mask: expected the input": {"input_ids": ids, "attention_mask": mask[:1]},
        "position_ids: expected": {"input_ids": ids, "position_ids": torch.arange(5)[None]},
        "input_ids: expected 2 dimensions": {"input_ids": ids[0]},
    }  # fmt: skip


@pytest.mark.parametrize("message", bad_inputs())
def test_bad_input(message):
    ours, _ = pair()
    with pytest.raises(ValueError, match=message):
        ours(**bad_inputs()[message])


def test_padding_ids_are_not_looked_up():
    ours, _ = pair()
    ids, mask = padded((5, 3), 6, 99, "left")
    expected = ours(ids, attention_mask=mask).last_hidden_state
    ids[mask == 0] = -100
    assert torch.equal(ours(ids, attention_mask=mask).last_hidden_state, expected)
