"""ModernBERT checkpoints: both ways, both config formats, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from model_tests import telling
from safetensors.torch import load_file, save_file
from test_modernbert import config_of, pair

import fastenc

IDS = torch.arange(3, 17).view(2, 7)


def same_output(a, b) -> bool:
    return torch.equal(a(IDS).last_hidden_state, b(IDS).last_hidden_state)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_both_ways(tmp_path, shard):
    ours, reference = pair()
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shard)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "ours/model.safetensors.index.json").exists() == (shard == "20KB")
    back, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert same_output(back, reference)
    assert same_output(fastenc.ModernBertModel.from_pretrained(tmp_path / "theirs"), ours)


def test_from_a_checkpoint_with_a_head(tmp_path):
    whole = telling(transformers.ModernBertForMaskedLM(config_of()))
    whole.save_pretrained(tmp_path)
    ours, info = fastenc.ModernBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert same_output(fastenc.accelerate(whole.model.eval()), ours)
    assert not info["missing_keys"]


def test_half_precision(tmp_path):
    ours, _ = pair()
    ours.to(torch.bfloat16).save_pretrained(tmp_path)
    back = fastenc.ModernBertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert back.final_norm.weight.dtype == torch.bfloat16
    assert back.rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_config_says_both_formats(tmp_path):
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3}}  # fmt: skip
    ours, _ = pair(rope_parameters=rope)
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["global_rope_theta"] == 5e4 and written["local_rope_theta"] == 7e3
    assert written["global_attn_every_n_layers"] == 3
    assert written["rope_parameters"] == rope
    assert written["layer_types"] == ours.config.layer_types
    assert not hasattr(ours.config, "global_rope_theta")
    ours.config.global_rope_theta = 1.0
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["global_rope_theta"] == 5e4
    assert ours.config.global_rope_theta == 1.0  # a saved config is as it was


def test_layer_types_without_a_rule_write_no_rule(tmp_path):
    ours, _ = pair(layer_types=["sliding_attention", "full_attention", "full_attention"])
    ours.save_pretrained(tmp_path)
    assert "global_attn_every_n_layers" not in json.loads((tmp_path / "config.json").read_text())


def test_the_first_config_format_is_read(tmp_path):
    ours, _ = pair(num_hidden_layers=4)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    for key in ("rope_parameters", "layer_types"):
        del written[key]
    written |= {"global_rope_theta": 5e4, "local_rope_theta": 7e3, "global_attn_every_n_layers": 2}
    path.write_text(json.dumps(written))
    back = fastenc.ModernBertModel.from_pretrained(tmp_path)
    assert back.config.layer_types == ["full_attention", "sliding_attention"] * 2
    assert back.config.rope_parameters["full_attention"]["rope_theta"] == 5e4
    assert back.config.rope_parameters["sliding_attention"]["rope_theta"] == 7e3
    assert not same_output(back, ours)


@pytest.fixture
def damaged(tmp_path):
    """Saves a checkpoint, lets the caller change its tensors, and returns the folder."""

    def make(change):
        ours, _ = pair()
        ours.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


DAMAGE = {
    r"missing keys: layers\.1\.mlp\.Wi\.weight": lambda w: w.pop("layers.1.mlp.Wi.weight"),
    r"unexpected keys: layers\.7\.extra": lambda w: w.update({"layers.7.extra": torch.zeros(2)}),
    r"misshaped keys: final_norm\.weight \(\(3,\) in": lambda w: w.update(
        {"final_norm.weight": torch.zeros(3)}
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_checkpoint_that_does_not_fit(damaged, message):
    folder = damaged(DAMAGE[message])
    with pytest.raises(ValueError, match=message):
        fastenc.ModernBertModel.from_pretrained(folder)
    lenient = {"strict": False, "ignore_mismatched_sizes": True}
    assert fastenc.ModernBertModel.from_pretrained(folder, **lenient)(IDS)


def test_strict_false_still_minds_shapes(damaged):
    folder = damaged(lambda w: w.update({"final_norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="misshaped"):
        fastenc.ModernBertModel.from_pretrained(folder, strict=False)


def test_no_pickle_runs(tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights_only"):
        fastenc.ModernBertModel.from_pretrained(tmp_path, weights_only=False)
