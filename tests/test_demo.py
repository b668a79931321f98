"""`make demo` at a small size: what it prints, writes and claims."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_encoder_folder import MINILM, expected_of

from fastenc import testing

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "COLUMNS": "120"},
        **options,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    options = ("--texts", "40", "--layers", "2", "--rounds", "1", "--subset", "8")
    done = run(*options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "demo_output"


def test_it_prints_the_picture_last_and_the_search(small):
    printed, folder = small
    assert printed.strip().splitlines()[-1] == "demo_output/demo.png"
    assert printed.count("?") >= 3 and "fell back: nothing" in printed
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["demo.json", "demo.png"]


def test_its_figures(small):
    figures = json.loads((small[1] / "demo.json").read_text())
    assert {"machine", "versions", "date", "commit"} < set(figures)
    assert figures["versions"]["fastenc"]
    for part in ("minilm", "modernbert"):
        found = figures[part]
        runs = set(found["batches"])
        assert "fastenc" in runs and found["reference"] in runs
        assert set(found["difference"]) == set(found["tokens_per_second"]) == runs
        assert all(value >= 0 for value in found["difference"].values())
        assert all(value > 0 for value in found["tokens_per_second"].values())
        assert found["fallbacks"] == []
        assert all(set(backends) == {"cpu"} for backends in found["calls"].values())
    assert figures["minilm"]["texts"] == 40 and figures["modernbert"]["texts"] == 8
    assert "varlen_attention" in figures["minilm"]["calls"]
    ran = figures["modernbert"]["calls"].keys()
    assert "rope_varlen_attention" in ran and {"geglu", "linear_geglu"} & ran
    assert len(figures["search"]) == 3
    for answer in figures["search"]:
        scores = [hit["score"] for hit in answer["best"]]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[0] > 0.1


def test_its_differences_are_rounding(small, examples):
    """At most what the parity rule leaves between the two libraries; sdpa's own from eager's."""
    parts = json.loads((small[1] / "demo.json").read_text())
    given = [p.text for p in examples("demo_texts").sample(40)]
    theirs = expected_of(SentenceTransformer(MINILM, device="cpu"), given)
    error = testing.max_error(theirs.plain, theirs.exact)
    assert parts["minilm"]["difference"]["fastenc"] <= 3 * error + torch.finfo(torch.float32).eps
    found = dict(parts["modernbert"]["difference"])
    assert found.pop("fastenc") <= 3 * max(found.values())


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_the_texts(examples):
    texts = examples("demo_texts")
    drawn = texts.sample(512)
    assert len(drawn) == len({p.text for p in drawn}) == 512
    assert drawn == texts.sample(512)
    words = sorted(len(p.text.split()) for p in drawn)
    assert words[0] < 8 and words[-64] > 150


def test_rounds_end_in_time_and_differences_are_seen(examples):
    runs = examples("demo_runs")
    steps = []
    plan = runs.Plan(rounds=50, seconds=0.05, step=steps.append)
    comparison = runs.Comparison("t", "exact", 1, 10, {})

    def slow(offset):
        return lambda texts: time.sleep(0.01) or np.full(3, offset)

    runs.compare(comparison, {"fastenc": slow(1.5), "exact": slow(1.0)}, ["x"], plan)
    assert comparison.difference == {"fastenc": 0.5, "exact": 0.0}
    assert 1 <= len(comparison.seconds["fastenc"]) < 4
    assert len(steps) == 2 * len(comparison.seconds["exact"])
    assert 0 < comparison.rate("fastenc") < 1000 and 0.2 < comparison.ratio("exact") < 5


def test_vectors_that_differ_fail_the_demo(examples):
    demo = examples("demo")
    same = {"fastenc": 2e-7, "exact": 0.0}
    for value, wrong in ((1e-5, 0), (1.1e-5, 1), (float("nan"), 1)):
        part = SimpleNamespace(difference=same | {"fastenc": value})
        other = SimpleNamespace(difference=same)
        assert len(demo.disagreements({"minilm": part, "modernbert": other})) == wrong


def test_what_is_missing_is_named(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'matplotlib' else find(name)\n"
        "import demo"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "the demo needs matplotlib" in done.stderr
