"""Accuracy results belong to the sources that they were made from; the README has their figures."""

from __future__ import annotations

import json
import re
import warnings

import pytest

from bench import accuracy, accuracy_corpus, accuracy_gliner
from bench.accuracy_corpus import (
    ASIDES,
    NAMES,
    REPORT,
    TRAIN_TEMPLATES,
    TUNE,
    VALUES,
    WORDNET_NAMES,
    WORDNET_TYPES_OF,
    Corpus,
)
from bench.gliner_report import accuracy_section

README = accuracy.ROOT / "README.md"
UNSEEN = (TUNE, REPORT)


def test_the_result_says_when_it_is_stale():
    """A warning: the runs take hours, and each change of what they judge would wait."""
    reason = accuracy.stale("gliner")
    if reason is not None:
        warnings.warn(pytest.PytestWarning(reason))


def test_a_changed_source_makes_a_result_stale(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1\n")
    results = tmp_path / "bench" / "results" / "accuracy"
    results.mkdir(parents=True)
    assert "missing" in accuracy.stale("x", tmp_path)
    sources = {"patterns": ["*.py"], "sha256": accuracy.hash_of(["*.py"], tmp_path)}
    (results / "x.json").write_text(json.dumps({"sources": sources}))
    assert accuracy.stale("x", tmp_path) is None
    (tmp_path / "b.py").write_text("")
    assert "other sources" in accuracy.stale("x", tmp_path)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        accuracy.hash_of(["nothing.py"], tmp_path)


@pytest.fixture(scope="module")
def judged():
    return json.loads((accuracy.RESULTS / "gliner.json").read_text(encoding="utf-8"))


def test_the_readme_gives_the_result(judged):
    text = README.read_text(encoding="utf-8")
    shown = re.search(
        r"<!-- gliner-accuracy:[^>]*-->\n\n(.*?)\n\n<!-- /gliner-accuracy -->", text, re.DOTALL
    )
    assert shown[1] == accuracy_section(judged)
    for who, found in judged["f1"].items():
        for name, f1 in found.items():
            assert f1 == accuracy_gliner.f1(judged["runs"], who, name)


def test_what_is_not_held_follows_from_the_scores(judged):
    assert judged["not_held"] == accuracy_gliner.verdict(judged["runs"])


def test_a_verdict_names_what_is_missed():
    def run(ours, twin):
        scores = {"fastenc": ours, "gliner": twin}
        return {w: {"scores": {"unseen": {"f1": x}}} for w, x in scores.items()}

    assert accuracy_gliner.verdict([run(0.7, 0.71)]) == []
    assert accuracy_gliner.verdict([run(0.55, 0.5), run(0.65, 0.7)]) == []
    assert len(accuracy_gliner.verdict([run(0.7, 0.73)])) == 1
    assert len(accuracy_gliner.verdict([run(0.55, 0.6)])) == 2
    alone = run(0.7, 0.7)
    del alone["gliner"]
    assert accuracy_gliner.verdict([alone]) == ["the twin was not trained"]


def test_training_never_sees_what_is_judged():
    names = {name for row in [*NAMES.values(), *WORDNET_NAMES] for name in row}
    values = {v.lower() for row in [*VALUES.values(), WORDNET_TYPES_OF] for v in row}
    for unseen in UNSEEN:
        assert not names & {*unseen.renamed.values(), *unseen.types}
        assert not {*TRAIN_TEMPLATES, *ASIDES} & {*unseen.templates, *unseen.free}
        assert set(unseen.renamed) <= set(NAMES)
        for kind in unseen.types:
            drawn = Corpus(3, unseen)
            made = {drawn.value(kind).lower() for _ in range(300)}
            assert not made & values, kind


def test_the_two_sets_have_nothing_in_common():
    for field in ("templates", "free"):
        assert not set(getattr(TUNE, field)) & set(getattr(REPORT, field))
    assert not set(TUNE.types) & set(REPORT.types)
    assert not set(TUNE.renamed.values()) & set(REPORT.renamed.values())


def test_examples_are_what_they_claim():
    """Entities lie in their text and are asked for; each type of the judged sets occurs."""
    for row in Corpus(0).training(400):
        assert len(set(row["ner_labels"])) == len(row["ner_labels"])
        for first, last, kind in row["ner"]:
            assert 0 <= first <= last < len(row["tokenized_text"]) and kind in row["ner_labels"]
    for unseen in UNSEEN:
        for rows in accuracy_corpus.test_sets(unseen).values():
            assert {kind for row in rows for *_, kind in row["ner"]} == set(rows[0]["ner_labels"])
