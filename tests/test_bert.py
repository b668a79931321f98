"""BertModel: the numbers of transformers, forward and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from model_tests import at, check_model, check_wanted_rows, padded, telling

import fastenc
from fastenc.models import bert
from fastenc.nn import VarlenBatch
from fastenc.testing import assert_parity

TINY = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 32, "type_vocab_size": 3,
}  # fmt: skip


def pair(**options):
    """(ours, transformers') with the same telling weights, in eval mode."""
    reference = telling(transformers.BertModel(transformers.BertConfig(**TINY | options))).eval()
    ours = fastenc.BertModel(copy.deepcopy(reference.config)).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def inputs_of(side: str = "right") -> dict:
    ids, mask = padded((23, 7, 1), 23, 99, side)
    types = torch.randint(0, 3, ids.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@pytest.mark.parametrize("options", [{}, {"hidden_act": "silu"}, {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_configurations(options, dtype):
    ours, reference = pair(**options)
    with fastenc.record() as ran:
        check_model(ours, reference, inputs_of(), dtype)
    assert {"varlen_attention", "add_layer_norm"} <= ran.calls.keys() and ran.fallbacks == []


@pytest.mark.parametrize("side", ["left", "mixed"])
def test_padding(side):
    """Hidden states are transformers'; the pooler reads the first real token."""
    ours, reference = pair()
    inputs = inputs_of(side)
    mask, no_pooler = inputs["attention_mask"], {"add_pooling_layer": False}
    bare = [type(model)(model.config, **no_pooler).eval() for model in (ours, reference)]
    for model, whole in zip(bare, (ours, reference), strict=True):
        model.load_state_dict(whole.state_dict(), strict=False)
    check_model(*bare, inputs)
    out = ours(**inputs)
    first = out.last_hidden_state[torch.arange(3), mask.argmax(1)].unsqueeze(1)
    assert torch.equal(out.pooler_output, ours.pooler(first))
    with fastenc.record() as ran:
        attended = ours(**inputs, output_attentions=True)
    assert ran.fallbacks == ["BertModel: output_attentions"]
    torch.testing.assert_close(attended.pooler_output, out.pooler_output)


def test_no_mask_no_types_no_pooler():
    ours, reference = pair()
    check_model(ours, reference, {"input_ids": inputs_of()["input_ids"]})
    bare = fastenc.BertModel(ours.config, add_pooling_layer=False)
    assert bare(torch.ones(1, 4, dtype=torch.long)).pooler_output is None


def test_the_shape_of_minilm():
    ours, reference = pair(
        vocab_size=1000, hidden_size=384, intermediate_size=1536, num_hidden_layers=2,
        num_attention_heads=12, max_position_embeddings=512,
    )  # fmt: skip
    ids, mask = padded((130, 90, 3), 130, 1000, "right")
    check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})


def test_hidden_states():
    ours, reference = pair()
    inputs = inputs_of() | {"output_hidden_states": True}
    real = inputs["attention_mask"] == 1
    actual, plain, exact = (m(**inputs) for m in (ours, reference, at(reference, torch.float64)))
    assert actual.keys() == plain.keys() and len(actual.hidden_states) == 4
    for i, states in enumerate(
        zip(actual.hidden_states, plain.hidden_states, exact.hidden_states, strict=True)
    ):
        assert_parity(f"hidden state {i}", *(x[real] for x in states))
        assert (states[0][~real] == 0).all()


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


def test_roberta_counts_positions_from_token_ids():
    """A padding token inside of a sequence has none of its own; embeddings are counted plainly."""
    config = transformers.RobertaConfig(**TINY | {"max_position_embeddings": 40, "pad_token_id": 1})
    reference = telling(transformers.RobertaModel(config, add_pooling_layer=False)).eval()
    ours = fastenc.RobertaModel(config, add_pooling_layer=False).eval()
    ours.load_state_dict(reference.state_dict())
    lists = [[5, 6, 1, 7, 1, 8], [9], [1, 3, 4]]
    rows = [torch.tensor([x]) for x in lists]
    embeds = [torch.randn(1, len(x), 32) for x in lists]
    batch = VarlenBatch.from_lists([*lists, []])
    bare = VarlenBatch.from_cu_seqlens(batch.cu_seqlens)
    packed = ours.forward_packed(bare, inputs_embeds=torch.cat(embeds, 1)[0])
    check_model(ours, reference, {"input_ids": rows[0]})
    check_model(ours, reference, {"inputs_embeds": embeds[0]})
    for name, found, inputs in (
        ("ids", ours.forward_packed(batch), [{"input_ids": x} for x in rows]),
        ("embeds", packed, [{"inputs_embeds": x} for x in embeds]),
    ):
        exact_model = at(reference, torch.float64)
        exact = [{k: x.double() if x.is_floating_point() else x for k, x in given.items()}
                 for given in inputs]  # fmt: skip
        plain, true = (
            torch.cat([m(**given).last_hidden_state[0] for given in of])
            for m, of in ((reference, inputs), (exact_model, exact))
        )
        assert_parity(name, found, plain, true)


def test_the_last_layer_makes_wanted_rows_only(monkeypatch):
    check_wanted_rows(bert, *pair(), monkeypatch)


def test_dropout_is_seeded():
    ours, _ = pair()
    ours.train()

    def run(seed):
        torch.manual_seed(seed)
        return ours(**inputs_of()).last_hidden_state

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_dropout_is_fair(monkeypatch):
    """In training the mean over draws of what attention mixes comes near that without dropout."""
    ours, _ = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5, num_hidden_layers=1)
    mixed, add_norm = [], bert.add_norm

    def kept(output, x, residual):
        mixed.append(x)
        return add_norm(output, x, residual)

    monkeypatch.setattr(bert, "add_norm", kept)
    with torch.no_grad():
        ours(**inputs_of())
        still = mixed[0]
        mixed.clear()
        ours.train()
        for _ in range(200):
            ours(**inputs_of())
    drawn = torch.stack(mixed[::2])  # a layer has two norms, the first of them after attention
    assert drawn.std(0).max() > 0
    assert (drawn.mean(0) - still).norm() < 0.1 * still.norm()


@pytest.mark.parametrize("message, inputs", [
    ("too long: position 32", {"input_ids": torch.ones(1, 33, dtype=torch.long)}),
    ("vocabulary size 99, got 99", {"input_ids": torch.full((1, 3), 99)}),
    ("exactly one of input_ids", {}),
    ("token_type_ids: expected", {"input_ids": torch.ones(2, 3, dtype=torch.long),
                                  "token_type_ids": torch.zeros(2, 4, dtype=torch.long)}),
])  # fmt: skip
def test_bad_input(message, inputs):
    with pytest.raises(ValueError, match=message):
        pair()[0](**inputs)


def test_bad_positions():
    ours, _ = pair()
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="position_ids: expected 0 to 31, got -2"):
        ours(ids, position_ids=torch.tensor([[-2, 0, 1]]))
    with pytest.raises(TypeError, match=r"position_ids: expected integers, got torch\.float32"):
        ours(ids, position_ids=torch.tensor([[0.0, 1.0, 2.0]]))


def test_rows_of_padding():
    ours, _ = pair()
    ids, mask = padded((5, 0, 3), 6, 99)
    out = ours(ids, attention_mask=mask)
    assert (out.last_hidden_state[1] == 0).all() and out.pooler_output.isfinite().all()


def test_checkpoints_both_ways(tmp_path):
    ours, reference = pair()
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours.save_pretrained(tmp_path / "ours")
    ids = inputs_of()["input_ids"]
    back = fastenc.BertModel.from_pretrained(tmp_path / "theirs")
    assert torch.equal(back(ids).last_hidden_state, ours(ids).last_hidden_state)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(theirs(ids).last_hidden_state, reference(ids).last_hidden_state)


def test_a_masked_language_model_has_no_pooler(tmp_path):
    """transformers initialises the missing pooler with a warning; so it is here."""
    transformers.BertForMaskedLM(transformers.BertConfig(**TINY)).save_pretrained(tmp_path)
    assert fastenc.BertModel.from_pretrained(tmp_path).pooler is not None


def test_decoders_fall_back():
    ours, reference = pair(is_decoder=True)
    ids = inputs_of()["input_ids"]
    with fastenc.record() as ran:
        assert torch.equal(ours(ids).last_hidden_state, reference(ids).last_hidden_state)
    assert ran.fallbacks == ["BertModel: a decoder configuration"]


def test_compiles_whole_over_many_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    ours, _ = pair(num_hidden_layers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.forward_packed, backend=counter, fullgraph=True)
    with torch.no_grad():
        for lengths in ((5, 7, 9), (3, 4), (11, 2, 30, 8), (23, 6, 1)):
            batch = VarlenBatch.from_lists([[5] * n for n in lengths])
            torch.testing.assert_close(compiled(batch), ours.forward_packed(batch))
    assert counter.frame_count <= 2
