"""MPNetModel: the numbers of transformers, forward and every gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from model_tests import at, check_model, padded, telling

import fastenc
from fastenc.nn import VarlenBatch, packed_forward_of
from fastenc.testing import assert_parity

TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 160, "pad_token_id": 1,
}  # fmt: skip


def pair(**options):
    """(ours, transformers') with the same telling weights, in eval mode."""
    reference = telling(transformers.MPNetModel(transformers.MPNetConfig(**TINY | options))).eval()
    with torch.no_grad():
        reference.encoder.relative_attention_bias.weight.mul_(20)  # a bias that can be missed
    ours = fastenc.MPNetModel(copy.deepcopy(reference.config)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def inputs_of(side: str = "right", longest: int = 23) -> dict:
    ids, mask = padded((longest, 7, 1), longest, 99, side)
    ids = ids.masked_fill(ids == 1, 2)  # only padding holds the padding token
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("longest", [23, 150])
def test_forward_and_gradients(dtype, longest):
    """Past 128 tokens relative positions share the last bucket."""
    ours, reference = pair(num_hidden_layers=3 if longest == 23 else 1)
    with fastenc.record() as ran:
        check_model(ours, reference, inputs_of("right", longest), dtype)
    assert {"varlen_attention", "add_layer_norm"} <= ran.calls.keys() and ran.fallbacks == []


@pytest.mark.parametrize("side", ["left", "mixed"])
def test_padding(side):
    """Hidden states are transformers'; the pooler reads the first real token."""
    ours, reference = pair()
    inputs = inputs_of(side)
    bare = [type(m)(m.config, add_pooling_layer=False).eval() for m in (ours, reference)]
    for model, whole in zip(bare, (ours, reference), strict=True):
        model.load_state_dict(whole.state_dict(), strict=False)
    check_model(*bare, inputs)
    out = ours(**inputs)
    first = out.last_hidden_state[torch.arange(3), inputs["attention_mask"].argmax(1)].unsqueeze(1)
    assert torch.equal(out.pooler_output, ours.pooler(first))


def test_the_relative_bias_matters():
    """The gate on it can fail: without it the outputs differ."""
    ours, reference = pair()
    expected = reference(**inputs_of()).last_hidden_state[0]
    with torch.no_grad():
        ours.encoder.relative_attention_bias.weight.zero_()
    assert (ours(**inputs_of()).last_hidden_state[0] - expected).abs().max() > 1e-2


def test_no_mask_hidden_states_and_embeds():
    ours, reference = pair()
    ids = inputs_of()["input_ids"][:1]
    check_model(ours, reference, {"input_ids": ids})
    check_model(ours, reference, {"inputs_embeds": torch.randn(2, 9, 32)})
    models = ours, reference, at(reference, torch.float64)
    states = [m(ids, output_hidden_states=True).hidden_states for m in models]
    for i, (one, other, exact) in enumerate(zip(*states, strict=True)):
        assert_parity(f"hidden state {i}", one, other, exact)


def test_packed_is_each_sequence_alone():
    ours, reference = pair()
    lists = [list(range(3, 3 + n)) for n in (9, 1, 17)]
    packed = ours.forward_packed(VarlenBatch.from_lists(lists))
    alone = [torch.tensor([x]) for x in lists]
    exact_model = at(reference, torch.float64)
    plain, exact = (
        torch.cat([m(x).last_hidden_state[0] for x in alone]) for m in (reference, exact_model)
    )
    assert_parity("packed", packed, plain, exact)


@pytest.mark.parametrize("where", ["hidden", "attention_probs"])
def test_every_dropout_acts(where):
    """On attention alone, and on both branches of a layer and the embeddings alone."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, _ = pair(**rates | {f"{where}_dropout_prob": 0.5}, num_hidden_layers=2)
    ours.train()
    inputs = inputs_of()

    def run(seed):
        torch.manual_seed(seed)
        return ours(**inputs).last_hidden_state

    with fastenc.record() as ran:
        first = run(1)
    assert torch.equal(run(1), first) and not torch.equal(run(2), first)
    assert ran.calls.get("dropout", {}) == ({"cpu": 4} if where == "hidden" else {})


def test_falls_back_where_it_must():
    ours, reference = pair()
    inputs = inputs_of()
    inputs["attention_mask"][0, 3] = 0
    wide, wide_reference = pair(relative_attention_num_buckets=40)
    for model, theirs, given, why in (
        (ours, reference, inputs, "an attention_mask with holes"),
        (ours, reference, inputs_of() | {"output_attentions": True}, "output_attentions"),
        (wide, wide_reference, inputs_of(), "relative_attention_num_buckets = 40"),
    ):
        with fastenc.record() as ran:
            out = model(**given).last_hidden_state
        assert ran.fallbacks == [f"MPNetModel: {why}"]
        assert torch.equal(out, theirs(**given).last_hidden_state)


def test_checkpoints_both_ways(tmp_path):
    ours, reference = pair()
    reference.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    inputs = inputs_of()
    back = fastenc.MPNetModel.from_pretrained(tmp_path / "theirs")
    assert torch.equal(back(**inputs).last_hidden_state, ours(**inputs).last_hidden_state)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(theirs(**inputs).last_hidden_state, reference(**inputs).last_hidden_state)
    assert type(theirs) is transformers.MPNetModel


def test_accelerate_and_restore():
    _, reference = pair()
    model = copy.deepcopy(reference)
    assert fastenc.accelerate(model) is model and type(model) is fastenc.MPNetModel
    with fastenc.record() as ran:
        check_model(model, reference, inputs_of())
    assert ran.fallbacks == [] and packed_forward_of(model) is not None
    assert type(pickle.loads(pickle.dumps(model))) is fastenc.MPNetModel
    fastenc.restore(model)
    assert type(model) is transformers.MPNetModel
    inputs = inputs_of()
    assert torch.equal(model(**inputs).last_hidden_state, reference(**inputs).last_hidden_state)
    head = telling(transformers.MPNetForSequenceClassification(reference.config)).eval()
    expected, exact = (m(**inputs).logits for m in (head, at(head, torch.float64)))
    assert_parity("logits", fastenc.accelerate(head)(**inputs).logits, expected, exact)
    assert type(head.mpnet) is fastenc.MPNetModel


def test_bad_input():
    with pytest.raises(ValueError, match="too long: position 160"):
        pair()[0](torch.full((1, 159), 5))
    with pytest.raises(ValueError, match="vocabulary size 99"):
        pair()[0](torch.full((1, 3), 99))
