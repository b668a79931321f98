"""Arguments of the models' forwards: transformers' names and order, None, tuples, caches."""

from __future__ import annotations

import copy
import inspect

import peft
import pytest
import test_bert
import test_modernbert
import torch
import transformers
from model_tests import padded, telling

import fastenc

KIN = test_bert.TINY | {"max_position_embeddings": 40, "pad_token_id": 1}
CONFIGS = {
    "ModernBert": lambda: test_modernbert.config_of(),
    "Bert": lambda: transformers.BertConfig(**test_bert.TINY),
    "Roberta": lambda: transformers.RobertaConfig(**KIN),
    "XLMRoberta": lambda: transformers.XLMRobertaConfig(**KIN),
    "MPNet": lambda: transformers.MPNetConfig(**KIN),
    "DebertaV2": lambda: transformers.DebertaV2Config(
        **test_bert.TINY, relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"]
    ),
}
OLD = ["MPNet", "DebertaV2"]
"""Whose forwards name their flags, and whose heads hand them on, None too."""


def pair(name: str, head: str = "Model"):
    """(accelerated, transformers' own), in eval mode."""
    reference = telling(getattr(transformers, name + head)(CONFIGS[name]())).eval()
    return fastenc.accelerate(copy.deepcopy(reference)), reference


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded((13, 7, 2), 13, 99, "right")
    return torch.where(mask == 1, ids.clamp(min=3), 1), mask


@pytest.mark.parametrize("name", CONFIGS)
def test_the_signature_and_the_order_are_transformers(name):
    ours, reference = pair(name)
    assert inspect.signature(ours.forward) == inspect.signature(reference.forward)
    ids, mask = inputs()
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(15, 28).expand(3, -1),
    }
    names = [*inspect.signature(reference.forward).parameters]
    args = [values.get(n) for n in names[: names.index("position_ids") + 1]]
    found, expected = (model(*args).last_hidden_state[mask == 1] for model in (ours, reference))
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="too many positional"):
        ours(*[None] * 20)
    with pytest.raises(TypeError, match="multiple values"):
        ours(ids, input_ids=ids)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize(
    ("in_config", "given"),
    [
        ({"output_hidden_states": True}, {}),
        ({"output_hidden_states": True}, {"output_hidden_states": None}),
        ({"output_hidden_states": True}, {"output_hidden_states": False}),
        ({"return_dict": False}, {}),
        ({"return_dict": False}, {"return_dict": None, "output_hidden_states": True}),
    ],
)
def test_flags_of_config_and_call(name, head, in_config, given):
    if "return_dict" in in_config and head != "Model" and name not in OLD:
        pytest.skip("transformers' own head fails")
    found, expected = [], []
    for model, outs in zip(pair(name, head), (found, expected), strict=True):
        model.config.__dict__.update(in_config)
        ids, mask = inputs()
        out = model(ids, attention_mask=mask, **given)
        outs += [type(out), *(out if isinstance(out, tuple) else out.keys())]
    assert [x if isinstance(x, (type, str)) else type(x) for x in found] == [
        x if isinstance(x, (type, str)) else type(x) for x in expected
    ]


def test_a_decoder_generates_with_and_without_a_cache():
    config = transformers.BertConfig(**test_bert.TINY, is_decoder=True)
    reference = telling(transformers.BertLMHeadModel(config)).eval()
    ours = fastenc.accelerate(copy.deepcopy(reference))
    ids = torch.arange(3, 11).view(2, 4)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for use_cache in (True, False):
        options = {"use_cache": use_cache, "max_new_tokens": 5, "pad_token_id": 0}
        found, expected = (
            m.generate(ids, attention_mask=mask, **options) for m in (ours, reference)
        )
        assert torch.equal(found, expected)
        found, expected = (m(ids, use_cache=use_cache) for m in (ours, reference))
        assert found.keys() == expected.keys()


def test_prefix_tuning_runs_in_transformers_own_forward():
    model = telling(transformers.BertForSequenceClassification(CONFIGS["Bert"]())).eval()
    tuned = peft.get_peft_model(
        model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ).eval()
    ids, mask = inputs()
    expected = tuned(input_ids=ids, attention_mask=mask).logits
    fastenc.accelerate(tuned)
    with fastenc.record() as ran:
        found = tuned(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)
    assert any("past_key_values" in reason for reason in ran.fallbacks)
