"""fastenc.GLiNER against the gliner package: files, logits, gradients."""

from __future__ import annotations

import copy
import json
import shutil

import gliner_tests
import pytest
import torch
from model_tests import COTANGENTS, check_draws, check_gradients

import fastenc
from fastenc.nn import VarlenBatch
from fastenc.testing import assert_parity

WORDS = [
    text.split()
    for text in (
        "Marie Curie arbeitet in Paris für Siemens AG .",
        "東京都",
        "one two three four five six seven eight nine ten eleven twelve thirteen São Paulo",
        "x y",
    )
]
LABELS = ["person", "city", "company name", "date"]


def packed(model, words=WORDS, labels=LABELS):
    rows = labels if isinstance(labels[0], list) else [labels] * len(words)
    return model.words.batch(words, rows)


def logits_of(model, words, labels):
    """(logits, which of them exist)."""
    if model.config.bi_encoder:
        tokens = VarlenBatch.from_lists(model.labels_tokenizer(labels)["input_ids"])
        batch = model.words.batch(words, None)
        logits = model.logits(batch, model.embed_labels(tokens))
    else:
        batch = packed(model, words, labels)
        logits = model.logits(batch)
    if model.config.token_level:
        return logits, torch.ones(batch.words, dtype=torch.bool)
    return logits, batch.span_mask(model.config.max_width)


def check(theirs, model, words=WORDS, labels=LABELS):
    """Logits on valid spans and every gradient, by the parity rule."""
    exact_model = copy.deepcopy(theirs)
    exact_model.model.double()

    def seen_by_each(words, labels):
        ours, valid = logits_of(model, words, labels)
        others = (gliner_tests.their_logits(m, words, labels)[0] for m in (theirs, exact_model))
        return tuple(logits[valid] for logits in (ours, *others))

    def gradients(seen, parameters):
        named = {n: p for n, p in parameters if p.requires_grad}
        drawn = []
        for seed in COTANGENTS:
            g = torch.Generator().manual_seed(seed)
            weights = torch.randn(seen.shape, generator=g).to(seen)
            grads = torch.autograd.grad(
                (seen * weights).sum(), list(named.values()), allow_unused=True, retain_graph=True
            )
            drawn.append(dict(zip(named, grads, strict=True)))
        return drawn

    seen = seen_by_each(words, labels)
    owners = (model, theirs.model, exact_model.model)
    grads, plain_grads, exact_grads = (
        gradients(x, m.named_parameters()) for x, m in zip(seen, owners, strict=True)
    )
    assert seen[2].std() > 0.1
    others = ((words[::-1], labels), (words, labels[::-1]))
    check_draws("logits", [seen, *(seen_by_each(*other) for other in others)])
    used = {n for n, g in exact_grads[0].items() if g is not None and g.abs().max() > 0}
    assert len(used) > 20 and all(g[n] is not None for g in grads for n in used)
    check_gradients(
        *([{n: g[n] for n in used} for g in of] for of in (grads, plain_grads, exact_grads))
    )


@pytest.mark.parametrize("backbone", gliner_tests.BACKBONES)
def test_logits_and_gradients(backbone, tmp_path):
    theirs = gliner_tests.their_model(backbone)
    with fastenc.record() as ran:
        check(theirs, gliner_tests.ours(theirs, tmp_path))
    assert ran.fallbacks == []
    assert ran.calls["span_score"]["cpu"] == 3  # of check's inputs


@pytest.mark.parametrize("span_mode", ["markerV0", "token_level"])
def test_gradients_under_autocast(span_mode, tmp_path):
    """Logits in bf16 and gradients in fp32, each within bf16's rounding of those in fp32."""
    model = gliner_tests.ours(gliner_tests.their_model(span_mode=span_mode), tmp_path)

    def run(autocast: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, valid = logits_of(model, WORDS, LABELS)
        head = {n: p for n, p in model.named_parameters() if "rep_layer.span" in n or "scorer" in n}
        grads = torch.autograd.grad(logits[valid].float().sum(), [*head.values()])
        return logits[valid], dict(zip(head, grads, strict=True))

    (exact, exact_grads), (logits, grads) = run(False), run(True)
    assert logits.dtype == torch.bfloat16 and len(grads) >= 8
    assert (logits - exact).norm() < 0.03 * exact.norm()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32, name
        assert (grad - exact_grads[name]).norm() <= 0.1 * exact_grads[name].norm(), name


@pytest.mark.parametrize("hidden", [512, 768])
def test_the_shape_of_deberta_v3(hidden, tmp_path):
    shape = {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        "position_buckets": 256, "max_position_embeddings": 512, "num_hidden_layers": 1,
    }  # fmt: skip
    theirs = gliner_tests.their_model(encoder=shape, hidden_size=hidden, max_width=12, dropout=0.4)
    check(theirs, gliner_tests.ours(theirs, tmp_path), [WORDS[0] * 4, WORDS[2]])


KINDS = {
    "marker": {"span_mode": "marker"},
    "token level": {"span_mode": "token_level"},
    "bi-encoder": {"labels": "bert"},
    "bi-encoder, token level": {"labels": "bert", "span_mode": "token_level"},
    "mean of subtokens": {"subtoken_pooling": "mean"},
    "largest subtoken": {"subtoken_pooling": "max"},
    "last subtoken, two LSTM layers": {"subtoken_pooling": "last", "num_rnn_layers": 2},
    "projected, no LSTM": {"hidden_size": 16, "num_rnn_layers": 0},
    "the label's own token": {"embed_ent_token": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, tmp_path):
    theirs = gliner_tests.their_model(**KINDS[kind])
    check(theirs, gliner_tests.ours(theirs, tmp_path))


@pytest.mark.parametrize("mode", ["markerV1", "markerV2"])
def test_context_is_the_text_alone(mode, tmp_path):
    """gliner's V1 and V2 agree where no padding is in the batch."""
    theirs = gliner_tests.their_model(span_mode=mode)
    model = gliner_tests.ours(theirs, tmp_path)
    for words in (WORDS[0], WORDS[2]):
        check(theirs, model, [words])
    exact_model = copy.deepcopy(theirs)
    exact_model.model.double()
    together, valid = logits_of(model, WORDS, LABELS)
    plain, exact = (
        torch.cat([gliner_tests.their_logits(m, [words], LABELS)[0] for words in WORDS])
        for m in (theirs, exact_model)
    )
    assert_parity("logits", together[valid], plain[valid], exact[valid])


def test_dropout_is_seeded_and_bound_to_training(tmp_path):
    model = gliner_tests.ours(gliner_tests.their_model(), tmp_path)
    batch = packed(model)
    with torch.no_grad():
        first, second = model.logits(batch, seed=1), model.logits(batch, seed=2)
        assert torch.equal(first, second)
        model.train()
        assert not torch.equal(model.logits(batch), first)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"labels": "bert"}, {"span_mode": "token_level"}], ids=str)
def test_gliner_loads_what_fastenc_saves(kind, tmp_path):
    from gliner import GLiNER

    theirs = gliner_tests.their_model(**kind)
    model = gliner_tests.ours(theirs, tmp_path / "theirs", safe=False)
    model.save_pretrained(tmp_path / "ours")
    assert not [p for p in (tmp_path / "ours").iterdir() if p.name.startswith(".")]
    back = GLiNER.from_pretrained(str(tmp_path / "ours"), strict=True)
    for name, x in theirs.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], x), name
    again = fastenc.GLiNER.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again, WORDS, LABELS)[0], logits_of(model, WORDS, LABELS)[0])
    text = "Marie Curie arbeitet in Paris"
    assert len(back.predict_entities(text, LABELS, threshold=0.3)) == len(
        again.predict_entities(text, LABELS, threshold=0.3)
    )


def test_a_model_small_enough_for_a_wheel(tmp_path):
    """docs/gliner.md's sizes: MiniLM's body, a markerV0 head at its width, in fp16."""
    from bench.accuracy_gliner import untrained

    untrained(tmp_path / "whole")
    model = fastenc.GLiNER.from_pretrained(tmp_path / "whole")
    count = {"words": 0, "body": 0, "head": 0}
    for name, p in model.named_parameters():
        inside = "body" if name.startswith("token_rep_layer") else "head"
        count["words" if "word_embeddings" in name else inside] += p.numel()
    assert {k: round(n / 1e6, 1) for k, n in count.items()} == {
        "words": 11.7, "body": 11.0, "head": 5.3
    }  # fmt: skip
    logits = logits_of(model, WORDS, LABELS)[0]
    model.half().save_pretrained(tmp_path / "half")
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert round(size / 1e6, 1) == 56.1
    again = fastenc.GLiNER.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    error = (logits_of(again, WORDS, LABELS)[0] - logits)[logits.isfinite()].abs().max()
    assert 0 < error < 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoint")
    gliner_tests.ours(gliner_tests.their_model(), made)
    return made


def test_a_hub_id_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    """The snapshot in the hub's cache, no network; by revision too."""
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    expected = logits_of(fastenc.GLiNER.from_pretrained(folder), WORDS, LABELS)[0]
    for given in ({}, {"revision": "0" * 40, "local_files_only": True}):
        model = fastenc.GLiNER.from_pretrained("someone/tiny", cache_dir=str(tmp_path), **given)
        assert torch.equal(logits_of(model, WORDS, LABELS)[0], expected)
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no folder"):
        fastenc.GLiNER.from_pretrained(
            "nobody/nothing", cache_dir=str(tmp_path), local_files_only=True
        )


def changed(folder, tmp_path, **values):
    """A copy of the checkpoint with other values in its configuration; None leaves a key out."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "gliner_config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path.parent


def test_unknown_keys_are_kept_and_said_missing_ones_defaulted(folder, tmp_path, caplog):
    model = fastenc.GLiNER.from_pretrained(
        changed(folder, tmp_path, lr_encoder=1e-5, max_types=None)
    )
    assert "lr_encoder" in caplog.text
    assert model.config.extra["lr_encoder"] == 1e-5 and model.config.max_types == 25
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "gliner_config.json").read_text())["lr_encoder"] == 1e-5


def test_fine_tune_changes_nothing(folder, tmp_path, caplog):
    """gliner keeps this key and reads it nowhere: a checkpoint with it off scores and trains."""
    expected = logits_of(fastenc.GLiNER.from_pretrained(folder), WORDS, LABELS)[0]
    model = fastenc.GLiNER.from_pretrained(changed(folder, tmp_path, fine_tune=False))
    assert "fine_tune" not in caplog.text and model.config.fine_tune is False
    logits = logits_of(model, WORDS, LABELS)[0]
    assert torch.equal(logits, expected) and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "gliner_config.json").read_text())
    assert again["fine_tune"] is False


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"max_width": "12"}, TypeError, "max_width: expected int"),
        ({"max_width": 0}, ValueError, "max_width"),
        ({"dropout": True}, TypeError, "dropout"),
        ({"span_mode": "query"}, NotImplementedError, "markerV0"),
        ({"subtoken_pooling": "median"}, NotImplementedError, "subtoken_pooling"),
        ({"relations_layer": "dot"}, NotImplementedError, "relation extraction"),
        ({"fuse_layers": True}, NotImplementedError, "fuse_layers"),
        ({"encoder_config": {"model_type": "t5"}}, NotImplementedError, "deberta-v2"),
        ({"hidden_size": 64}, ValueError, "misshaped keys"),
        ({"span_mode": "markerV2"}, ValueError, "missing keys"),
        ({"num_rnn_layers": 0}, ValueError, "unexpected keys: rnn"),
        ({"ent_token": "<<NIL>>"}, ValueError, "<<NIL>>"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(folder, tmp_path, values, error, words):
    with pytest.raises(error, match=words):
        fastenc.GLiNER.from_pretrained(changed(folder, tmp_path, **values))


def test_files_that_are_none(folder, tmp_path):
    path = changed(folder, tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        fastenc.GLiNER.from_pretrained(path)
    torch.save({"weight": Explosive()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="tensors only"):
        fastenc.GLiNER.from_pretrained(path)
    assert not Explosive.ran
    torch.save({"weight": [1, 2]}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="names to tensors"):
        fastenc.GLiNER.from_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="tensors only"):
        fastenc.GLiNER.from_pretrained(path)
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        fastenc.GLiNER.from_pretrained(path)
    (path / "gliner_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        fastenc.GLiNER.from_pretrained(path)
    (path / "gliner_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="gliner_config"):
        fastenc.GLiNER.from_pretrained(path)


class Explosive:
    """Sets a flag when it is unpickled."""

    ran = False

    def __reduce__(self):
        return (setattr, (Explosive, "ran", True))
