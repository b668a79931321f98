"""accelerate on live SentenceTransformer, CrossEncoder and setfit.SetFitModel objects."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import peft
import pytest
import sentence_transformers as st
import setfit
import tokenizers
import torch
import transformers
from embedding_tests import Expected
from model_tests import telling
from sentence_transformers.sentence_transformer import modules as st_modules
from test_encoder_folder import MINILM, TEXTS, expected_of, tiny_body

import fastenc
from fastenc.integrations.sentence_transformers import _cuts
from fastenc.nn import PrepackedLinear
from fastenc.testing import assert_parity

PAIRS = [(a, b) for a, b in zip(TEXTS, reversed(TEXTS), strict=True)]


@pytest.fixture(scope="module")
def minilm() -> st.SentenceTransformer:
    return st.SentenceTransformer(MINILM, device="cpu")


def tiny(tmp_path: Path, *head, **options) -> st.SentenceTransformer:
    modules = [tiny_body(tmp_path / "body"), st_modules.Pooling(32, "mean"), *head]
    return st.SentenceTransformer(modules=modules, device="cpu", **options)


def pair_model(folder: Path, kind: str = "Bert", labels: int = 1) -> st.CrossEncoder:
    """A CrossEncoder with a tiny random encoder and MiniLM's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": labels,
             "pad_token_id": 0}  # fmt: skip
    if kind == "ModernBert":
        small |= {f"{n}_token_id": i for i, n in enumerate(("bos", "eos", "cls", "sep"), 1)}
    config = getattr(transformers, f"{kind}Config")(**small)
    model = telling(getattr(transformers, f"{kind}ForSequenceClassification")(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return st.CrossEncoder(str(folder), device="cpu", max_length=96)


def files(folder: Path) -> dict:
    """{name: content}. A tokenizer keeps the truncation and padding of its last call: left out."""
    names = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    found = {name: p.read_bytes() for name, p in names.items() if name != "README.md"}
    tokenizer = json.loads(found["tokenizer.json"])
    found["tokenizer.json"] = tokenizer | {"truncation": None, "padding": None}
    return found


# ---- SentenceTransformer -------------------------------------------------------------------------


def test_encode_of_real_weights(minilm):
    expected = expected_of(minilm)
    before = type(minilm[0].auto_model)
    assert fastenc.accelerate(minilm) is minilm is fastenc.accelerate(minilm)
    try:
        with fastenc.record() as ran:
            found, one = minilm.encode(TEXTS), minilm.encode(TEXTS[0])
            tensor = minilm.encode(TEXTS[:3], convert_to_tensor=True, normalize_embeddings=True)
        assert ran.fallbacks == [] and "varlen_attention" in ran.calls
        assert isinstance(minilm, st.SentenceTransformer) and one.shape == (384,)
        expected.check(found)
        expected.check(one, 0)
        expected.check(tensor, slice(3))
    finally:
        assert fastenc.restore(minilm) is minilm
    assert type(minilm) is st.SentenceTransformer and type(minilm[0].auto_model) is before
    assert np.array_equal(minilm.encode(TEXTS), expected.plain)


def test_no_texts(tmp_path):
    plain = tiny(tmp_path)
    ours = fastenc.accelerate(copy.deepcopy(plain))
    for options in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}):
        found, expected = (model.encode([], **options) for model in (ours, plain))
        assert type(found) is type(expected)
        assert getattr(found, "shape", None) == getattr(expected, "shape", None)


def test_what_encode_can_be_asked(tmp_path):
    head = [st_modules.Dense(32, 12), st_modules.Normalize()]
    plain = tiny(tmp_path, *head, prompts={"query": "find: "}, default_prompt_name=None)
    ours = fastenc.accelerate(copy.deepcopy(plain))
    for options in (
        {},
        {"prompt_name": "query"},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "binary"},
        {"batch_size": 3, "show_progress_bar": True},
    ):
        with fastenc.record() as ran:
            found = ours.encode(TEXTS, **options)
        expected = plain.encode(TEXTS, **options)
        assert ran.fallbacks == [] and type(found) is type(expected), options
        if options.get("precision"):
            assert np.array_equal(found, expected)
            continue
        expected_of(plain, **options).check(found)
    assert ours.encode([]).shape == plain.encode([]).shape
    with fastenc.record() as ran:
        tokens = ours.encode(TEXTS[:3], output_value="token_embeddings")
    assert ran.fallbacks == ["SentenceTransformer: output_value='token_embeddings'"]
    assert [len(x) for x in tokens] == [
        len(x) for x in plain.encode(TEXTS[:3], output_value="token_embeddings")
    ]


def test_queries_and_documents(tmp_path):
    plain = tiny(tmp_path, prompts={"query": "find: "})
    ours = fastenc.accelerate(copy.deepcopy(plain))
    for name in ("encode_query", "encode_document"):
        with fastenc.record() as ran:
            found = getattr(ours, name)(TEXTS)
        assert ran.fallbacks == []
        Expected.of(plain, lambda model, n=name: getattr(model, n)(TEXTS)).check(found)
    plain[0].query_length = ours[0].query_length = 4
    with fastenc.record() as ran:
        found = ours.encode_query(TEXTS)
    assert ran.fallbacks == ["SentenceTransformer: arguments (task)"]
    Expected.of(plain, lambda model: model.encode_query(TEXTS)).check(found)


def test_changes_to_the_live_object_are_seen(tmp_path):
    plain = tiny(tmp_path)
    ours = fastenc.accelerate(copy.deepcopy(plain))
    ours.encode(TEXTS[:2])
    cased = copy.deepcopy(plain.tokenizer)
    cased.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    before = plain.encode(TEXTS)
    for change in (
        lambda m: setattr(m[0], "processor", cased),
        lambda m: setattr(m, "max_seq_length", 9),
        lambda m: setattr(m.tokenizer, "truncation_side", "left"),
        lambda m: setattr(m[0], "model", telling(copy.deepcopy(m[0].model)).eval()),
        lambda m: m.append(st_modules.Normalize()),
        lambda m: m[0].auto_model.embeddings.word_embeddings.weight.data.mul_(2),
        lambda m: setattr(m[1], "pooling_mode", "cls"),
        lambda m: setattr(m, "truncate_dim", 7),
    ):
        change(plain)
        change(ours)
        expected = expected_of(plain)
        expected.check(ours.encode(TEXTS))
        assert not np.array_equal(expected.plain, before)  # the change is one that can be seen
        before = expected.plain
    for kind in ("forward", "forward_pre"):
        calls = []
        hook = getattr(ours[1], f"register_{kind}_hook")(lambda *args, c=calls: c.append(1))
        with fastenc.record() as ran:
            ours.encode(TEXTS)
        hook.remove()
        assert calls and "hooks on its modules" in ran.fallbacks[0]
    torch.compiler.reset()
    ours.compile(backend="eager")
    with fastenc.record() as ran:
        ours.encode(TEXTS[:1])
    assert "compiled" in ran.fallbacks[0]


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_encoding_ends_training_as_theirs_does(tmp_path, kind, monkeypatch):
    """And runs where it is told to."""
    plain = tiny(tmp_path) if kind == "SentenceTransformer" else pair_model(tmp_path)
    ours = fastenc.accelerate(copy.deepcopy(plain))
    asked = []
    resolve = type(plain)._resolve_inference_device

    def resolved(self, device):
        asked.append(device)
        return resolve(self, device)

    monkeypatch.setattr(st.base.model.BaseModel, "_resolve_inference_device", resolved)
    for model in (plain, ours):
        run, texts = (
            (model.encode, TEXTS) if kind == "SentenceTransformer" else (model.predict, PAIRS)
        )
        model.train()
        first = run(texts[:4])
        assert not any(module.training for module in model.modules())
        assert np.array_equal(run(texts[:4]), first)
        asked.clear()
        run(texts[:4], device="cpu")
        assert asked == ["cpu"]


@pytest.mark.parametrize(
    "change",
    [
        {"processing_kwargs": {"text": {"max_length": 8}}},
        {"processing_kwargs": {"text": {"add_special_tokens": False}}},
        {"modality_config": {"text": {"method": "forward",
                                      "method_output_name": ["hidden_states", -2]}}},
    ],
)  # fmt: skip
def test_what_the_transformer_module_does_to_texts(tmp_path, change):
    texts = [text for text in TEXTS if text]  # no special tokens: theirs fails on an empty text
    plain = tiny(tmp_path)
    ours = fastenc.accelerate(copy.deepcopy(plain))
    ours.encode(texts[:2])
    for model in (plain, ours):
        vars(model[0]).update(change)
    with fastenc.record() as ran:
        found = ours.encode(texts)
    expected_of(plain, texts).check(found)
    assert len(ran.fallbacks) == 1 and "is not supported" in ran.fallbacks[0]
    with pytest.raises(NotImplementedError, match="is not supported"):
        fastenc.Encoder(plain)


def test_saved_folders_stay_vanilla(tmp_path):
    head = [st_modules.Dense(32, 12), st_modules.Normalize()]
    model = tiny(tmp_path, *head)
    model.save(str(tmp_path / "plain"))
    fastenc.accelerate(model, prepack=True)
    assert PrepackedLinear in map(type, model.modules())
    model.encode(TEXTS)
    model.save(str(tmp_path / "ours"))
    assert files(tmp_path / "ours") == files(tmp_path / "plain")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(twin.encode(TEXTS), model.encode(TEXTS))
        assert type(fastenc.restore(twin)) is st.SentenceTransformer


def test_training_runs_packed(tmp_path):
    plain = tiny(tmp_path)
    ours = fastenc.accelerate(copy.deepcopy(plain))

    def gradient(model):
        model.eval()(model.preprocess(TEXTS[:6]))["sentence_embedding"].square().sum().backward()
        return model[0].auto_model.embeddings.word_embeddings.weight.grad

    with fastenc.record() as ran:
        found = gradient(ours)
    assert "varlen_attention_bwd" in ran.calls and ran.fallbacks == []
    Expected.of(plain, gradient).check(found, name="gradient of the word embeddings")


def test_another_architecture_runs_padded(tmp_path):
    config = transformers.DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    model = st.SentenceTransformer(str(tmp_path), device="cpu")
    expected = expected_of(model)
    with fastenc.record() as ran:
        found = fastenc.accelerate(model).encode(TEXTS)
    assert any("no packed form" in why for why in ran.fallbacks)
    expected.check(found)


def test_without_a_length_limit(tmp_path):
    """T5's and XLNet's tokenizers name none: transformers says 10**30."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM, model_max_length=None)
    small = {"vocab_size": len(tokenizer), "d_model": 32, "pad_token_id": 0, "num_labels": 1}
    t5 = transformers.T5Config(**small, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    xlnet = transformers.XLNetConfig(**small, n_layer=2, n_head=2, d_inner=64)
    transformers.T5Model(t5).save_pretrained(tmp_path / "t5")
    transformers.XLNetForSequenceClassification(xlnet).save_pretrained(tmp_path / "xlnet")
    for name in ("t5", "xlnet"):
        tokenizer.save_pretrained(tmp_path / name)
    plain = st.SentenceTransformer(str(tmp_path / "t5"), device="cpu")
    assert plain.max_seq_length > 10**9
    expected = expected_of(plain)
    expected.check(fastenc.Encoder(plain).encode(TEXTS))
    expected.check(fastenc.accelerate(plain).encode(TEXTS))
    pairs = st.CrossEncoder(str(tmp_path / "xlnet"), device="cpu")
    assert pairs.max_seq_length > 10**9
    scores = Expected.of(pairs, lambda model: model.predict(PAIRS[:6]))
    scores.check(fastenc.accelerate(pairs).predict(PAIRS[:6]))


def test_a_class_of_its_own_keeps_its_encode(tmp_path):
    class Mine(st.SentenceTransformer):
        def encode(self, *args, **kwargs):
            return "mine"

    model = Mine(modules=list(tiny(tmp_path)), device="cpu")
    with fastenc.record() as ran:
        assert fastenc.accelerate(model).encode(TEXTS) == "mine"
    assert "a class of its own" in ran.fallbacks[0] and type(model) is Mine


@pytest.mark.parametrize("attend", [False, True])
def test_query_expansion_of_colbert(tmp_path, attend):
    body = tiny_body(tmp_path)
    body.query_expansion = {"strategy": "fixed", "length": 16, "attend": attend}
    mask = st.multi_vector_encoder.modules.MultiVectorMask()
    plain = st.MultiVectorEncoder(modules=[body, mask], device="cpu")
    with fastenc.record() as ran:
        ours = fastenc.accelerate(copy.deepcopy(plain))
        found = ours.encode_query(TEXTS[:3])
    Expected.of(plain, lambda model: model.encode_query(TEXTS[:3])).check(found)
    if attend:
        assert ran.fallbacks == [] and "varlen_attention" in ran.calls
        return
    assert len(ran.fallbacks) == 1 and "unattended" in ran.fallbacks[0]


@pytest.mark.parametrize("adapter", ["PromptTuning", "PrefixTuning", "Lora"])
def test_peft_inside(tmp_path, adapter):
    options = {"r": 2, "target_modules": ["query"], "init_lora_weights": False}
    if adapter != "Lora":
        options = {"num_virtual_tokens": 3}
    config = getattr(peft, f"{adapter}Config")(task_type="FEATURE_EXTRACTION", **options)
    plain = tiny(tmp_path).eval()
    plain[0].model = wrapped = peft.get_peft_model(plain[0].model, config).eval()
    with fastenc.record() as ran:
        ours = fastenc.accelerate(copy.deepcopy(plain))
        found = ours.encode(TEXTS)
    expected_of(plain).check(found)
    with fastenc.record() as alone:
        rows = fastenc.Encoder(ours[0].model, plain.tokenizer).encode(TEXTS)

    def mean(model):
        made = (plain.tokenizer(text, return_tensors="pt", truncation=True) for text in TEXTS)
        return [model(**x).last_hidden_state[0, -x.input_ids.shape[1] :].mean(0) for x in made]

    Expected.of(wrapped, mean).check(rows)
    if adapter == "Lora":
        assert ran.fallbacks == alone.fallbacks == [] and "varlen_attention" in alone.calls
        return
    assert len(ran.fallbacks) == 1 and "learns prompts" in ran.fallbacks[0]
    assert len(alone.fallbacks) == 1 and "runs padded" in alone.fallbacks[0]


# ---- CrossEncoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, labels", [("Bert", 1), ("Bert", 3), ("Roberta", 1),
                                          ("ModernBert", 1)])  # fmt: skip
def test_cross_encoder(tmp_path, kind, labels):
    plain = pair_model(tmp_path, kind, labels)
    ours = copy.deepcopy(plain)
    before = ours.predict(PAIRS)  # not plain's: MKL's bits depend on where the weights lie
    assert fastenc.accelerate(ours) is ours
    assert type(ours).__name__ == "CrossEncoder" and isinstance(ours, st.CrossEncoder)
    for options in ({}, {"apply_softmax": True}, {"convert_to_tensor": True}, {"prompt": "find: "},
                    {"activation_fn": torch.nn.Tanh()}):  # fmt: skip
        with fastenc.record() as ran:
            found = ours.predict(PAIRS, **options)
        expected = Expected.of(plain, lambda model, o=options: model.predict(PAIRS, **o))
        assert ran.fallbacks == [] and type(found) is type(plain.predict(PAIRS, **options))
        expected.check(found)
    expected = Expected.of(plain, lambda model: model.predict(PAIRS))
    expected.check(ours.predict(PAIRS[0]), 0)
    assert len(ours.predict([])) == 0
    if labels == 1:
        ranked = ours.rank(TEXTS[0], TEXTS[2:6])
        assert [r["corpus_id"] for r in ranked] == [
            r["corpus_id"] for r in plain.rank(TEXTS[0], TEXTS[2:6])
        ]
    plain.save_pretrained(str(tmp_path / "plain"))
    ours.save_pretrained(str(tmp_path / "ours"))
    saved = [files(tmp_path / name) for name in ("plain", "ours")]
    if kind == "ModernBert":  # its config is written for old and new readers
        old, new = (json.loads(found.pop("config.json")) for found in saved)
        assert old.items() <= new.items()
    assert saved[0] == saved[1]
    assert type(fastenc.restore(ours)) is st.CrossEncoder
    assert np.array_equal(ours.predict(PAIRS), before)


def test_scores_of_bfloat16_are_made_in_float32(tmp_path):
    plain = pair_model(tmp_path).bfloat16()
    ours = fastenc.accelerate(copy.deepcopy(plain))
    for model in (plain, ours):
        found = model.predict(PAIRS, convert_to_tensor=True)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())


def test_batches_of_pairs():
    lengths = np.array([4000, 400, 400, 40, 4, 0])
    assert _cuts(lengths, 210, None) == [(0, 1), (1, 3), (3, 6)]
    assert _cuts(lengths, 10**6, 256) == [(0, 6)]
    assert _cuts(lengths[:0], 100, None) == []


# ---- setfit --------------------------------------------------------------------------------------


def test_setfit_model(tmp_path):
    tiny(tmp_path).save(str(tmp_path / "body"))
    model = setfit.SetFitModel.from_pretrained(str(tmp_path / "body"), labels=["no", "yes"])
    model.fit(TEXTS[5:25], [0, 1] * 10, num_epochs=1, show_progress_bar=False)
    expected, scores = model.predict(TEXTS), model.predict_proba(TEXTS)
    exact_model = copy.deepcopy(model)
    exact_model.model_body.double()
    exact = exact_model.predict_proba(TEXTS)
    model.save_pretrained(tmp_path / "plain")
    assert fastenc.accelerate(model) is model is fastenc.accelerate(model)
    with fastenc.record() as ran:
        assert model.predict(TEXTS) == expected and model.predict(TEXTS[0]) == expected[0]
        found = model.predict_proba(TEXTS)
    vectors = torch.float32  # what both compute scores from
    assert_parity("scores", found.to(vectors), scores.to(vectors), exact)
    assert ran.fallbacks == [] and "varlen_attention" in ran.calls
    model.save_pretrained(tmp_path / "ours")
    plain, ours = files(tmp_path / "plain"), files(tmp_path / "ours")
    assert {k: v for k, v in ours.items() if k != "config_setfit.json"} == {
        k: v for k, v in plain.items() if k != "config_setfit.json"
    }
    name = "config_setfit.json"  # setfit writes a set's items in any order
    assert json.loads(ours[name]) == json.loads(plain[name])
    trainer = setfit.Trainer(model)
    assert fastenc.restore(trainer) is trainer
    assert type(model.model_body) is st.SentenceTransformer
    assert torch.equal(model.predict_proba(TEXTS), scores)
    assert fastenc.accelerate(trainer) is trainer
    assert type(model.model_body) is not st.SentenceTransformer
    with pytest.raises(TypeError, match="with a body"):
        fastenc.accelerate(setfit.SetFitModel())


def test_what_holds_setfits_models(tmp_path):
    """A Trainer around a model, and an AbsaModel, which has two."""
    tiny(tmp_path).save(str(tmp_path / "body"))
    load = {kind: kind.from_pretrained(str(tmp_path / "body"))
            for kind in (setfit.SetFitModel, setfit.AspectModel, setfit.PolarityModel)}  # fmt: skip
    model, *pair = load.values()
    args = setfit.TrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = setfit.Trainer(model, args)
    both = setfit.AbsaModel(None, *pair)
    expected = [one.encode(TEXTS) for one in load.values()]
    assert fastenc.accelerate(trainer) is trainer and fastenc.accelerate(both) is both
    for one, vectors in zip(load.values(), expected, strict=True):
        with fastenc.record() as ran:
            found = one.encode(TEXTS)
        assert np.abs(found - vectors).max() < 1e-5 and "varlen_attention" in ran.calls
    with fastenc.record() as ran:
        fastenc.accelerate(trainer, cuda_graphs=True), fastenc.accelerate(both, cuda_graphs=True)
        [one.encode(TEXTS) for one in load.values()]
    assert [why for why in ran.fallbacks if "cuda_graphs" in why]
    fastenc.restore(trainer), fastenc.restore(both)


def test_setfit_model_on_cuda_graphs(tmp_path):
    """The wish reaches the encoder that the object holds, and leaves it again."""
    tiny(tmp_path).save(str(tmp_path / "body"))
    model = fastenc.accelerate(
        setfit.SetFitModel.from_pretrained(str(tmp_path / "body")), cuda_graphs=True
    )
    with fastenc.record() as ran:
        model.model_body.encode(TEXTS[:2])
    assert ran.fallbacks == ["cuda_graphs: the batch is on cpu"]
    fastenc.restore(model)
    assert not [name for name in vars(model.model_body[0].auto_model) if "fastenc" in name]
