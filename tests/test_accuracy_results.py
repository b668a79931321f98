"""Accuracy results belong to the sources that they were made from."""

from __future__ import annotations

import json
import warnings

import pytest

from bench import accuracy
from bench.accuracy_corpus import (
    LISTS,
    NAMES,
    RENAMED,
    TEST_TEMPLATES,
    TRAIN_TEMPLATES,
    UNSEEN,
    UNSEEN_TEMPLATES,
)


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


def test_training_never_sees_what_is_judged():
    names = {name for row in NAMES.values() for name in row}
    assert not names & set(RENAMED.values()) and not set(NAMES) & set(UNSEEN)
    assert not names & set(UNSEEN.values())
    assert not set(TRAIN_TEMPLATES) & {*TEST_TEMPLATES, *UNSEEN_TEMPLATES}
    values = {kind: set(row.split(",")) for kind, row in LISTS.items()}
    for kind in UNSEEN:
        for other in NAMES:
            assert not values.get(kind, set()) & values.get(other, set()), (kind, other)
