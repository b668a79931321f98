"""fastenc.GLiNER's bi-encoders: labels embedded alone, once, and used with texts later."""

from __future__ import annotations

import copy

import gliner_tests
import numpy as np
import pytest
import torch
from gliner_decisions import decided
from test_gliner_predict import LABELS, same, texts

import fastenc
from fastenc.testing import assert_parity

KINDS = {"span": {}, "token": {"span_mode": "token_level"}}


@pytest.fixture(scope="module", params=KINDS)
def models(request, tmp_path_factory):
    """(gliner's, fastenc's) bi-encoders with the same weights."""
    theirs = gliner_tests.their_model(labels="bert", decisive=True, **KINDS[request.param])
    return theirs, gliner_tests.ours(theirs, tmp_path_factory.mktemp("bi"))


def test_embeddings_of_labels_are_gliners(models):
    theirs, ours = models
    labels = [*LABELS, "a label of many more words than the others", "é", *map(str, range(40))]
    exact = copy.deepcopy(theirs)
    exact.model.double()
    found = ours.encode_labels(labels)
    assert found.shape == (len(labels), 32) and not found.requires_grad
    assert_parity("labels", found, theirs.encode_labels(labels), exact.encode_labels(labels))


@pytest.mark.parametrize("options", [{}, {"flat_ner": False, "multi_label": True}], ids=str)
def test_entities_from_embeddings(models, options):
    theirs, ours = models
    asked = decided(theirs, (text[:400] for text in texts(seed=2)), 40, LABELS, **options)
    kept = ours.encode_labels(LABELS)
    found = ours.batch_predict_with_embeds(asked, kept, LABELS, **options)
    given = theirs.encode_labels(LABELS)
    same(found, theirs.batch_predict_with_embeds(asked, given, LABELS, batch_size=8, **options))
    assert sum(map(len, found)) > 40
    assert found == ours.inference(asked, LABELS, **options)
    assert found == ours.batch_predict_entities(asked, LABELS, **options)
    one = next(text for text, entities in zip(asked, found, strict=True) if entities)
    alone = ours.predict_with_embeds(one, kept, LABELS, **options)
    same([alone], [theirs.predict_with_embeds(one, given, LABELS, **options)])
    turned = ours.predict_with_embeds(one, kept.roll(1, 0), LABELS, **options)
    after = dict(zip(LABELS, [*LABELS[1:], LABELS[0]], strict=True))
    assert {e["label"] for e in turned} == {after[e["label"]] for e in alone}


def test_one_text_from_embeddings_takes_what_gliner_takes(models):
    """gliner's arguments by place, its own numbers for a threshold, and ``return_cut``."""
    theirs, ours = models
    text, kept = "Marie Curie works in Paris", ours.encode_labels(LABELS)
    given = False, np.float32(0.2), True, True
    found = ours.predict_with_embeds(text, kept, LABELS, *given)
    same([found], [theirs.predict_with_embeds(text, theirs.encode_labels(LABELS), LABELS, *given)])
    assert ours.predict_with_embeds(text, kept, LABELS, *given, return_cut=True) == (found, 0)


def test_labels_are_embedded_once_until_a_weight_changes(models, monkeypatch):
    ours = copy.deepcopy(models[1])
    embedded, embed = [], type(ours).embed_labels

    def counting(self, tokens):
        embedded.append(tokens.num_seqs)
        return embed(self, tokens)

    monkeypatch.setattr(type(ours), "embed_labels", counting)
    first = ours.encode_labels(["new", "newer"])
    ours.predict_entities("Marie Curie", ["newer", "new", "newest"])
    ours.inference(["Marie", "Curie"], [["new"], ["newest", "newer"]])
    assert embedded == [2, 1]
    with torch.no_grad():
        for p in ours.token_rep_layer.labels_encoder.parameters():
            p.mul_(1.5)
    assert not torch.equal(ours.encode_labels(["new", "newer"]), first) and embedded == [2, 1, 2]


def test_misuse(models, tmp_path):
    _, ours = models
    rows = ours.encode_labels(LABELS)
    with pytest.raises(ValueError, match=r"labels_embeds: expected a tensor \(5, 32\).*\(4, 32\)"):
        ours.batch_predict_with_embeds(["x"], rows[:4], LABELS)
    with pytest.raises(ValueError, match="labels_embeds"):
        ours.batch_predict_with_embeds(["x"], rows.tolist(), LABELS)
    with pytest.raises(ValueError, match="one set of labels for all texts"):
        ours.batch_predict_with_embeds(["x", "y"], rows, [LABELS, LABELS[::-1]])
    with pytest.raises(ValueError, match="at least one"):
        ours.encode_labels([])
    with pytest.raises(TypeError, match="index 1"):
        ours.encode_labels(["a", 3])
    plain = gliner_tests.ours(gliner_tests.their_model(), tmp_path)
    with pytest.raises(NotImplementedError, match="only bi-encoders"):
        plain.encode_labels(LABELS)
    with pytest.raises(ValueError, match="need labels_embeds"), fastenc.record():
        ours.logits(ours.words.batch([["x"]], None))
