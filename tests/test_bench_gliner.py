"""The GLiNER benchmark at toy size: outputs are compared, and what is ahead of what is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import gliner as bench


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


def test_differences_are_counted():
    one = [[{"start": 0, "end": 1, "label": "x", "score": 0.5}]]
    other = [[{"start": 0, "end": 1, "label": "x", "score": 0.7}, {**one[0][0], "label": "y"}]]
    found = bench.difference(one, other)
    assert found == {"entities": 2, "not_in_both": 1, "score": pytest.approx(0.2)}
