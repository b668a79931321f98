"""The GLiNER benchmark at toy size: outputs are compared, and what is ahead of what is computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import gliner as bench
from bench import gliner_report


@pytest.mark.slow
def test_the_benchmark_at_toy_size():
    rows = tuple(replace(row, hidden=64, others=False) for row in bench.TOY)
    found = [measured() for measured in bench.steps(rows, 24, 64, 1, 1).values()]
    assert len(found) == len(rows) + 2
    for row in found:
        assert row["ahead"]["gliner"] == 1.0 and row["seconds"]["fastenc"] > 0
    head = found[0]["kept_for_backward_mib"]
    assert head["fastenc"] < head["folded, plain PyTorch"] < head["gliner"]
    assert found[1]["differences"]["fastenc"]["entities"] > 0


def test_rows_of_an_earlier_day_stay(tmp_path):
    def saved(date, **rows):
        each = [{"name": name, "commit": commit} for name, commit in rows.items()]
        text = json.dumps({"date": date, "commit": "new", "gliner": each})
        (tmp_path / f"gliner-{date}.json").write_text(text)

    assert bench.earlier_rows(tmp_path) == []
    saved("2026-01-01", lost="a")
    saved("2026-01-02", **{"training step, 384 words": "b", "head alone, D 8": "c", "gone": "d"})
    new = [{"name": "training step, 384 words", "commit": "e", "date": "2026-01-03"}]
    rows = bench.merged(bench.earlier_rows(tmp_path), new, ["head", "middle", "training"])
    assert rows == [
        {"name": "head alone, D 8", "commit": "c", "date": "2026-01-02"},
        {"name": "training step, 384 words", "commit": "e", "date": "2026-01-03"},
    ]


def test_the_table_has_memory_commits_and_dates():
    row = {"name": "head", "seconds": {"gliner": 2.0, "fastenc": 1.0}, "ahead": {"fastenc": 2.0},
           "kept_for_backward_mib": {"gliner": 146.3, "fastenc": 26.3},
           "commit": "abc1234", "date": "2026-01-02"}  # fmt: skip
    text = gliner_report.table([row])
    assert "kept for the backward 26.3 of 146.3 MiB (0.18)" in text
    assert "abc1234, 2026-01-02" in text


def test_differences_are_counted():
    one = [[{"start": 0, "end": 1, "label": "x", "score": 0.5}]]
    other = [[{"start": 0, "end": 1, "label": "x", "score": 0.7}, {**one[0][0], "label": "y"}]]
    found = bench.difference(one, other)
    assert found == {"entities": 2, "not_in_both": 1, "score": pytest.approx(0.2)}
