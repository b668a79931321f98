"""bench.setfit: its texts, and that it times nothing whose outputs disagree."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from bench import setfit as bench
from bench import setfit_report, setfit_training


def test_texts_are_mixed_and_the_same_each_time():
    texts = bench.mixed_texts(300)
    words = [len(t.split()) for t in texts]
    assert texts == bench.mixed_texts(300) != bench.mixed_texts(300, seed=1)
    assert min(words) >= 1 and max(words) == bench.LONGEST and 8 <= np.median(words) <= 16


def test_rows_compare_before_they_time():
    calls = {"peer": lambda: np.ones(3), "ours": lambda: np.ones(3) + 1e-6}
    found = bench.row("sums", calls, rounds=2, least=0.0, texts=3)
    assert found["ahead"]["peer"] == 1.0 and len(found["samples"]["ours"]) == 2
    assert found["differences"]["ours"] == pytest.approx(1e-6) and found["texts"] == 3
    assert "| sums | ours |" in bench.table([found])
    with pytest.raises(RuntimeError, match="sums, ours: differs by 1"):
        bench.row("sums", calls | {"ours": lambda: np.zeros(3)}, 2, 0.0)


def test_rows_refuse_a_fallback():
    from fastenc.ops._registry import note_fallback

    def slow():
        note_fallback("runs padded")
        return np.ones(3)

    with pytest.raises(RuntimeError, match="runs padded"):
        bench.row("sums", {"peer": lambda: np.ones(3), "ours": slow}, 2, 0.0)


def test_rows_are_kept_one_by_one(tmp_path, monkeypatch):
    path = tmp_path / "setfit.json"
    setfit_report.keep("training", {"a": {"ratio": 2.0}}, path)
    setfit_report.keep("training", {"b": {"ratio": 3.0}}, path)
    setfit_report.keep("memory", {"a": {"fastenc_peak_mib": 1}}, path)
    kept = json.loads(path.read_text())
    assert {name: row["ratio"] for name, row in kept["training"].items()} == {"a": 2.0, "b": 3.0}
    assert kept["memory"]["a"]["date"] == kept["date"]
    monkeypatch.setattr(setfit_report.measure, "versions", lambda: {"setfit": "0"})
    setfit_report.keep("training", {"c": {"ratio": 1.0}}, path)
    kept = json.loads(path.read_text())
    assert set(kept["training"]) == {"c"} and "memory" not in kept


def test_the_report_has_every_row(tmp_path):
    speed = {
        "inference": {
            "single predict": {
                "seconds": {"fastenc.SetFitModel": 0.01, "setfit": 0.02},
                "ahead": {"fastenc.SetFitModel": 2.0, "setfit": 1.0},
            }
        },
        "training": {"exact 2x8": {"setfit_seconds": 3.0, "fastenc_seconds": 1.0, "ratio": 3.0}},
        "memory": {"exact 2x8": {"setfit_peak_mib": 500, "fastenc_peak_mib": 200}},
    }
    text = setfit_report.speed_table(speed)
    assert "| single predict: fastenc.SetFitModel | 20.0 ms | 10.0 ms | 2.00x | – |" in text
    assert "| train exact 2x8 | 3.0 s | 1.0 s | 3.00x | 500 / 200 |" in text
    right = {"summary": {"mails/8": {
        "frozen": {"accuracy": 78.0, "seeds": 10}, "setfit": {"accuracy": 79.7, "seeds": 10},
        "block": {"accuracy": 81.0, "seeds": 10,
                  "minus_setfit": {"mean": 1.3, "lower_95": 0.7, "seeds": 10}},
    }}}  # fmt: skip
    assert "| mails, spam or not, 8 a class | 78.0 (10) |" in setfit_report.accuracy_table(right)
    assert "| +0.70 (10) |" in setfit_report.accuracy_table(right)
    setfit_report.plot(speed, right, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_fresh_process_has_its_own_peak():
    code = "from bench.setfit_training import own_peak; print(own_peak())"
    held = np.ones(2**27)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < held.nbytes / 2**20 < setfit_training.own_peak()
