"""``attn_implementation="fastenc"``: registered in any import order, exact, and never leaking."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import test_bert
import test_modernbert
import torch
import transformers
from model_tests import at, check_model, padded, telling

import fastenc
from fastenc.integrations.attention import packed_attention, packed_mask
from fastenc.testing import assert_parity

KIN = test_bert.TINY | {"max_position_embeddings": 40, "pad_token_id": 1}
MODELS = {
    "ModernBert": lambda: transformers.ModernBertModel(test_modernbert.config_of()),
    "Bert": lambda: transformers.BertModel(
        transformers.BertConfig(**test_bert.TINY), add_pooling_layer=False
    ),
    "Roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**KIN), add_pooling_layer=False
    ),
}


def pair(name: str):
    """(transformers' model with fastenc's attention, the same with sdpa)."""
    reference = telling(MODELS[name]()).eval()
    ours = copy.deepcopy(reference)
    ours.set_attn_implementation("fastenc")
    return ours, reference


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_parity(name, side):
    ours, reference = pair(name)
    ids, mask = padded((23, 7, 1), 23, 99, side)
    with fastenc.record() as ran:
        check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})
    assert "varlen_attention" in ran.calls and ran.fallbacks == []
    assert type(ours).__module__.startswith("transformers.")


def test_no_mask_and_holes():
    ours, reference = pair("ModernBert")
    ids, mask = padded((23, 7, 1), 23, 99)
    check_model(ours, reference, {"input_ids": ids})
    mask[0, 5:9] = 0
    check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("said", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_do_not_see_each_other(name, said):
    ours, reference = pair(name)
    ids = torch.arange(3, 19).unsqueeze(0)
    spans = [(0, 6), (6, 7), (7, 16)]
    first = 2 if name == "Roberta" else 0
    positions = torch.cat([torch.arange(b - a) for a, b in spans]).unsqueeze(0) + first
    options = {"position_ids": positions}
    if said == "cu_seq_lens":
        edges = torch.tensor([0, 6, 7, 16], dtype=torch.int32)
        options |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges,
                    "max_length_q": 9, "max_length_k": 9}  # fmt: skip
    with torch.inference_mode():
        actual = ours(ids, **options).last_hidden_state
        again = ours(ids, **options).last_hidden_state
    assert torch.equal(actual, again)

    def alone(model):
        parts = [model(ids[:, a:b], position_ids=positions[:, a:b]) for a, b in spans]
        return torch.cat([part.last_hidden_state for part in parts], dim=1)

    assert_parity("packed", actual, alone(reference), alone(at(reference, torch.float64)))


def test_the_metadata_is_made_once(monkeypatch):
    """ModernBERT asks for a mask per layer type; the batch behind them is one."""
    from fastenc.nn import VarlenBatch

    made = []
    real = VarlenBatch.from_padded.__func__
    monkeypatch.setattr(
        VarlenBatch,
        "from_padded",
        classmethod(lambda cls, *a, **k: made.append(1) or real(cls, *a, **k)),
    )
    ids, mask = padded((23, 7, 1), 23, 99)
    for name in MODELS:
        made.clear()
        pair(name)[0](ids, attention_mask=mask)
        assert made == [1], name


@pytest.mark.parametrize("order", ["fastenc first", "transformers first", "modelling first"])
def test_any_import_order(tmp_path, order):
    MODELS["ModernBert"]().save_pretrained(tmp_path)
    lines = {
        "fastenc first": "import fastenc, transformers",
        "transformers first": "import transformers, fastenc",
        "modelling first": "from transformers import ModernBertModel, AutoModel; import fastenc",
    }
    code = (
        f"{lines[order]}; from transformers import AutoModel; import torch\n"
        f"m = AutoModel.from_pretrained({str(tmp_path)!r}, attn_implementation='fastenc')\n"
        "with fastenc.record() as r: m(torch.ones(1, 5, dtype=torch.long))\n"
        "assert 'varlen_attention' in r.calls, r.calls\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refusals():
    """What packed attention does not do is refused by name, never silently different."""
    q = torch.randn(2, 4, 5, 8)
    encoder = torch.nn.Module()
    encoder.is_causal = False
    decoder = torch.nn.Module()
    decoder.is_causal = True
    mask = packed_mask(2, 5, 5)
    for message, call in {
        "causal": lambda: packed_attention(decoder, q, q, q, mask),
        "cross-attention": lambda: packed_attention(encoder, q, q[:, :, :3], q[:, :, :3], mask),
        "position bias": lambda: packed_attention(encoder, q, q, q, mask, position_bias=q),
        "soft cap": lambda: packed_attention(encoder, q, q, q, mask, softcap=30.0),
        "attention_mask of type Tensor": lambda: packed_attention(
            encoder, q, q, q, torch.ones(2, 1, 5, 5)
        ),
        "5 queries and 7 keys": lambda: packed_mask(2, 5, 7),
        "without a cache": lambda: packed_mask(2, 5, 5, q_offset=3),
        "does not serve causal": lambda: packed_attention(encoder, q, q, q, mask, is_causal=True),
        "custom mask functions": lambda: packed_mask(2, 5, 5, use_vmap=True),
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            call()
    assert packed_attention(decoder, q, q, q, mask, is_causal=False)[0].shape == (2, 5, 4, 8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_that_change_or_serve_other_rows_are_read_again(mode):
    """One tensor of positions for any number of rows, written to between calls."""
    ours, reference = pair("Bert")
    with mode():
        positions = torch.zeros(1, 8, dtype=torch.int64)
        for cut, counts in ((4, (1, 3)), (5, (3, 1)), (2, (1, 2))):
            positions.copy_(torch.arange(8) - (torch.arange(8) >= cut) * cut)
            for rows in counts:
                ids = torch.randint(3, 99, (rows, 8))
                found = ours(ids, position_ids=positions).last_hidden_state
                parts = [reference(ids[:, :cut]), reference(ids[:, cut:])]
                expected = torch.cat([part.last_hidden_state for part in parts], 1)
                torch.testing.assert_close(found, expected)


def test_grouped_heads_and_a_window_in_the_mask_only():
    encoder = torch.nn.Module()
    encoder.is_causal = False
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    out, _ = packed_attention(encoder, q, k, v, packed_mask(2, 9, 9, local_size=2))
    near = (torch.arange(9).view(-1, 1) - torch.arange(9)).abs() <= 2
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=near, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("holes", [False, True])
def test_scaling_and_dropout(window, holes):
    """What transformers passes reaches every way through attention."""
    encoder = torch.nn.Module()
    encoder.is_causal = False
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 4] = mask[1, 8] = not holes
    packed = packed_mask(2, 9, 9, attention_mask=mask)
    given = {"scaling": 0.9, "sliding_window": window}
    out, _ = packed_attention(encoder, q, k, v, packed, **given)
    far = (torch.arange(9).view(-1, 1) - torch.arange(9)).abs()
    seen = mask[:, None, None] & (far < (window or 9))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.9)
    torch.testing.assert_close(out[mask], expected.transpose(1, 2)[mask])
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(packed_attention(encoder, q, k, v, packed, dropout=0.5, **given)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_a_window_that_mask_and_layer_both_tell(side):
    """Mistral without causality: its layers pass the mask's inclusive window."""
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=3, is_causal=False,
    )  # fmt: skip
    reference = telling(transformers.MistralModel(config)).eval()
    ours = copy.deepcopy(reference)
    ours.set_attn_implementation("fastenc")
    ids, mask = padded((23, 7, 1), 23, 99, side)
    check_model(ours, reference, {"input_ids": ids, "attention_mask": mask})
