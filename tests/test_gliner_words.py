"""GLiNER's words as rows of the packed tokens, also where the tokenizer drops a word."""

from __future__ import annotations

from types import SimpleNamespace

import gliner_tests
import pytest
import torch

from fastenc.integrations._gliner_padded import Padded
from fastenc.models._gliner_batch import GLiNERBatch, WordTokenizer
from fastenc.models._gliner_encode import pool_words
from fastenc.nn import VarlenBatch


def batch_of(first: list[int], last: list[int], tokens: int) -> GLiNERBatch:
    ids = torch.arange(tokens)
    return GLiNERBatch(
        tokens=VarlenBatch.from_lists([ids.tolist()]),
        word_rows=torch.tensor(first),
        word_ends=torch.tensor(last),
        cu_words=torch.tensor([0, len(first)], dtype=torch.int32),
        label_rows=torch.empty(1, 0, dtype=torch.int64),
        num_labels=[0],
        word_lengths=[len(first)],
    )


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_each_word_is_pooled_alone(mode):
    batch = batch_of([3, 5, 5, 9, 12], [4, 4, 8, 9, 11], 12)  # the second and the last are dropped
    hidden = torch.randn(12, 6, requires_grad=True)
    pooled = pool_words(hidden, batch, mode)
    grad = torch.randn_like(pooled)
    expected = torch.zeros(5, 6)
    weights = torch.zeros(12, 6)
    for word, rows in ((0, slice(3, 5)), (2, slice(5, 9)), (3, slice(9, 10))):
        x = hidden.detach()[rows]
        expected[word] = x.mean(0) if mode == "mean" else x.amax(0)
        share = torch.full_like(x, 1 / len(x)) if mode == "mean" else (x == x.amax(0)).float()
        weights[rows] = share * grad[word]
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(torch.autograd.grad(pooled, hidden, grad)[0], weights)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_gpu_is_not_waited_for(mode):
    """The meta device has no contents to read: see test_no_synchronisation.py."""
    batch = batch_of([3, 5, 5], [4, 4, 8], 12).to("meta")
    assert pool_words(torch.empty(12, 6, device="meta"), batch, mode).shape == (3, 6)


def test_tokens_added_later_are_seen():
    tokenizer = gliner_tests.tokenizer()
    tokenizer.add_tokens(["<<ENT>>", "<<SEP>>"], special_tokens=True)
    words = WordTokenizer(tokenizer, "<<ENT>>", "<<SEP>>")
    before = words.word_ids(["blorp", "Paris"])
    tokenizer.add_tokens(["blorp"])
    after = words.word_ids(["blorp", "Paris"])
    assert after[0] == (len(tokenizer) - 1,) != before[0] and after[1] == before[1]


def test_words_that_are_dropped_from_padded_texts_are_empty():
    words_mask = torch.tensor([[0, 1, 1, 3, 0, 0], [0, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    found = Padded.read(
        SimpleNamespace(class_token_index=99), torch.arange(18).view(3, 6), attention_mask,
        words_mask, torch.tensor([[3], [3], [1]]), None, None, markers=False,
    ).batch  # fmt: skip
    assert found.word_rows.tolist() == [1, 3, 3, 7, 7, 12, 12]
    assert found.word_ends.tolist() == [2, 2, 3, 6, 8, 11, 11]
    assert found.dropped and found.word_lengths == [3, 3, 1]
