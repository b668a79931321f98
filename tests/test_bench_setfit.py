"""bench.setfit: its texts, and that it times nothing whose outputs disagree."""

from __future__ import annotations

import numpy as np
import pytest

from bench import setfit as bench


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
