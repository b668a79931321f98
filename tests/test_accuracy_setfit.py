"""The accuracy harness of SetFit training: disjoint splits, paired differences, kept results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from bench import accuracy, accuracy_setfit, setfit_data, setfit_training


def test_splits_are_balanced_disjoint_and_seeded():
    task = setfit_data.load("debian")
    assert len(set(task.texts)) == len(task.texts)
    train, test = task.split(8, seed=3)
    assert not set(train) & set(test)
    assert np.bincount(task.labels[train]).tolist() == [8] * len(setfit_data.SECTIONS)
    assert np.bincount(task.labels[test]).tolist() == [task.test] * len(setfit_data.SECTIONS)
    again, other = task.split(8, seed=3)[0], task.split(8, seed=4)[0]
    assert np.array_equal(train, again) and not np.array_equal(train, other)


def test_the_bound_is_of_paired_differences():
    difference = [0.01, -0.01, 0.02, 0.0]
    cells = {}
    for seed, gained in enumerate(difference):
        for row, value in (("setfit", 0.5 + seed / 10), ("block", 0.5 + seed / 10 + gained)):
            cells[f"debian/8/{seed}/{row}"] = {"accuracy": value, "seconds": 1.0}
    found = accuracy_setfit.summary(cells)["debian/8"]["block"]["minus_setfit"]
    spread = 100 * np.std(difference, ddof=1)
    assert found["mean"] == pytest.approx(0.5)
    assert found["lower_95"] == pytest.approx(0.5 - 2.353 * spread / math.sqrt(4), abs=0.006)
    assert found["seeds"] == 4


def test_benchmark_rows_have_their_examples():
    for row in setfit_training.ROWS:
        texts, labels = setfit_training.examples(row.classes, row.shots)
        assert len(set(texts)) == row.classes * row.shots
        assert np.bincount(labels).tolist() == [row.shots] * row.classes


def test_committed_results_are_of_these_sources():
    assert accuracy.stale("setfit") is None
    kept = json.loads((accuracy.RESULTS / "setfit.json").read_text(encoding="utf-8"))
    assert kept["summary"] == accuracy_setfit.summary(kept["cells"])
    for key, value in kept["cells"].items():
        assert value["of"] == accuracy_setfit.source_of(key.split("/")[-1]), key
