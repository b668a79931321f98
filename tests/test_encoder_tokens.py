"""Windows, batches and the tokenising thread: nothing lost, nothing over budget."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastenc import _encoder_tokens as module
from fastenc._encoder_tokens import Tokens, batches, sorted_window, tokenised, window_edges

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def word_tokenizer() -> tokenizers.Tokenizer:
    """w0 ... w99 -> 0 ... 99, no special tokens."""
    vocabulary = {f"w{i}": i for i in range(100)} | {"[UNK]": 100}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def text_of(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


@given(LENGTHS, st.integers(1, 100), st.booleans())
def test_batches_cover_every_row_once_within_the_budget(lengths, budget, padded):
    lengths = np.sort(np.array(lengths))[::-1]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    cuts = batches(edges, budget, padded)
    assert [row for cut in cuts for row in range(*cut)] == list(range(len(lengths)))

    def cost(start, stop):
        rows = lengths[start:stop]
        return rows[0] * len(rows) if padded else rows.sum()

    for start, stop in cuts:
        assert cost(start, stop) <= budget or stop == start + 1
        if stop < len(lengths) and cost(start, stop + 1) <= budget:
            assert padded and lengths[start] == 0, "a row more would have fitted"


@given(st.integers(0, 400_000))
def test_windows_cover_every_text_once(count):
    edges = window_edges(count)
    assert [start for start, _ in edges] == [0, *(stop for _, stop in edges)][: len(edges)]
    assert (edges[-1][1] if edges else 0) == count
    assert all(0 < stop - start <= module.LAST_WINDOW for start, stop in edges)


@given(LENGTHS)
def test_a_window_keeps_every_row_and_puts_the_longest_first(lengths):
    rows = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]
    window = sorted_window(7, rows)
    assert window.start == 7 and window.ids.dtype == np.int32
    assert (np.diff(np.diff(window.edges)) <= 0).all()
    for place, start, stop in zip(window.order, window.edges, window.edges[1:], strict=False):
        np.testing.assert_array_equal(window.ids[start:stop], rows[place])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), max_size=8), min_size=1, max_size=50))
def test_tokenised_windows_hold_every_text(texts):
    before = module.FIRST_WINDOW, module.CHUNK
    module.FIRST_WINDOW, module.CHUNK = 3, 2
    try:
        found = {}
        for window in tokenised([text_of(t) for t in texts], Tokens(word_tokenizer(), None, True)):
            for row, place in enumerate(window.order):
                found[window.start + place] = list(
                    window.ids[window.edges[row] : window.edges[row + 1]]
                )
    finally:
        module.FIRST_WINDOW, module.CHUNK = before
    assert [found[i] for i in range(len(texts))] == texts


def test_truncation_and_its_refusal():
    text = text_of(range(9))
    assert len(Tokens(word_tokenizer(), 5, True)([text])[0]) == 5
    assert len(Tokens(word_tokenizer(), 9, False)([text])[0]) == 9
    refusing = Tokens(word_tokenizer(), 5, False)
    for tokens in (refusing, copy.deepcopy(refusing), pickle.loads(pickle.dumps(refusing))):
        with pytest.raises(ValueError, match="text 41 has 9 tokens, the model takes 5"):
            tokens(["w1", text], first=40)


def test_a_tokenizer_of_its_own_is_called_as_transformers_are():
    calls = []

    def tokenizer(texts, **options):
        calls.append(options)
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    rows = Tokens(tokenizer, 4, True)(["1 2 3", ""])
    assert [list(row) for row in rows] == [[1, 2, 3], []] and rows[1].dtype == np.int32
    assert calls == [{"truncation": True, "max_length": 4}]
    with pytest.raises(ValueError, match="text 0 has 3 tokens"):
        Tokens(tokenizer, 2, False)(["1 2 3"])
    assert calls[-1] == {}


def test_an_error_of_the_thread_reaches_the_caller():
    def tokenizer(texts, **_):
        if "bad" in texts:
            raise RuntimeError("no such text")
        return {"input_ids": [[1] for _ in texts]}

    texts = ["good"] * 3000 + ["bad"]
    with pytest.raises(RuntimeError, match="no such text"):
        list(tokenised(texts, Tokens(tokenizer, None, True)))


def test_closing_early_stops_the_thread():
    calls = []

    def tokenizer(texts, **_):
        calls.append(len(texts))
        return {"input_ids": [[1] for _ in texts]}

    windows = tokenised(["text"] * 200_000, Tokens(tokenizer, None, True))
    next(windows)
    windows.close()
    assert sum(calls) < 100_000
    assert not [t for t in threading.enumerate() if t.name.startswith("fastenc-tokenise")]


def test_the_given_tokenizer_is_left_alone():
    tokenizer = word_tokenizer()
    tokenizer.enable_padding(length=7)
    tokenizer.enable_truncation(6)
    assert len(Tokens(tokenizer, 3, True)(["w1"])[0]) == 1
    assert tokenizer.padding["length"] == 7 and tokenizer.truncation["max_length"] == 6


def fast_tokenizer(cls=transformers.PreTrainedTokenizerFast, **options):
    names = {"unk_token": "[UNK]", "pad_token": "w0", "sep_token": "w7", "cls_token": "w8"}
    return cls(tokenizer_object=word_tokenizer(), **names, **options)


@pytest.mark.parametrize(
    "options", [{}, {"truncation_side": "left"}, {"split_special_tokens": True}], ids=str
)
def test_a_copy_does_what_transformers_tokenizer_does(options):
    tokenizer = fast_tokenizer(**options)
    texts = [text_of(range(9)), "w1w7w2", "w3 w8w7 w4"]
    given = tokenizer(texts, truncation=True, max_length=5)["input_ids"]
    rows = Tokens(tokenizer, 5, True)(texts)
    assert [row.tolist() for row in rows] == given
    assert (given[0][0] == 4) == ("truncation_side" in options)
    assert (given[1] == [100]) == ("split_special_tokens" in options)


def test_a_tokenizer_with_code_of_its_own_runs_it():
    class Reversed(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus([" ".join(x.split()[::-1]) for x in text], *args, **options)

    class Called(transformers.PreTrainedTokenizerFast):
        def __call__(self, text, *args, **options):
            return super().__call__([" ".join(x.split()[::-1]) for x in text], *args, **options)

    for cls in (Reversed, Called):
        rows = Tokens(fast_tokenizer(cls), None, True)([text_of(range(3)), "w5"])
        assert [row.tolist() for row in rows] == [[2, 1, 0], [5]], cls
