"""Which texts leave no decision of GLiNER's decoding to rounding, by gliner's scores in float64.

Greedy search takes spans by descending score, so two that overlap and score alike may swap where
arithmetic differs in its last bit, and a span at the threshold may come or go. How far a text is
from that can be computed: such texts must decode to the same entities whatever the arithmetic.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterable

import gliner_tests
import numpy as np
import torch

APART = 1e-4
"""In logits: more than twice the largest error of these models' scores in float32, 4e-5."""


def candidates(logits: np.ndarray, token_level: bool) -> tuple[np.ndarray, ...]:
    """(start, last, label, score) of every span, in the order in which gliner finds them.

    ``logits``: (words, widths, labels), or (words, labels, 3) of a token-level head: start, end and
    inside; a span scores as the least of what it needs.
    """
    words = len(logits)
    if not token_level:
        start, width, label = (x.ravel() for x in np.indices(logits.shape))
        inside = start + width < words
        found = start, start + width, label, logits.ravel()
        return tuple(x[inside] for x in found)
    rows = []
    for first in range(words):
        for label in range(logits.shape[1]):
            least = np.minimum.accumulate(logits[first:, label, 2])
            score = np.minimum(np.minimum(least, logits[first:, label, 1]), logits[first, label, 0])
            rows += [(first, first + k, label, s) for k, s in enumerate(score)]
    return tuple(np.array(x) for x in zip(*rows, strict=True))


def margin(
    logits: np.ndarray, threshold: float, flat: bool, multi_label: bool, token_level: bool
) -> float:
    """How far, in logits, the closest decision is from going the other way.

    A chosen span is ``score - limit`` from being none. Another span stays out by the limit or by a
    chosen span that it conflicts with and that outscores it: by whichever is farther. (Equal scores
    are one number read twice: their order is that of the search.) Chosen spans of one start are
    listed by score.
    """
    if len(logits) == 0:
        return math.inf
    start, last, label, score = candidates(logits, token_level)
    limit = math.log(threshold / (1 - threshold))
    order = np.argsort(-score, kind="stable")
    start, last, label, score = (x[order] for x in (start, last, label, score))

    def conflicts(k: int) -> np.ndarray:
        same = (start == start[k]) & (last == last[k])
        found = (start <= last[k]) & (start[k] <= last)
        if not flat:
            nested = (start <= start[k]) & (last >= last[k])
            nested |= (start >= start[k]) & (last <= last[k])
            found &= ~nested
        return np.where(same, not multi_label, found)

    chosen = np.zeros(len(score), bool)
    out_by = limit - score
    for k in range(len(score)):
        if score[k] <= limit:
            break
        if out_by[k] > 0:
            continue
        chosen[k] = True
        later = np.arange(len(score)) > k
        gap = np.where(score == score[k], math.inf, score[k] - score)
        out_by = np.maximum(out_by, np.where(later & conflicts(k), gap, -math.inf))
    closest = min(np.min(out_by[~chosen], initial=math.inf),
                  np.min(score[chosen] - limit, initial=math.inf))  # fmt: skip
    for first in np.unique(start[chosen]):
        of_one = score[chosen & (start == first)]
        gaps = of_one[:-1] - of_one[1:]
        closest = min(closest, np.min(gaps[gaps > 0], initial=math.inf))
    return float(closest)


@functools.lru_cache(maxsize=1)
def exact_model(model):
    """``model`` in float64."""
    exact = copy.deepcopy(model)
    exact.model.double()
    return exact


@functools.lru_cache(maxsize=300)
def exact_logits(model, text: str, labels: tuple[str, ...]) -> np.ndarray:
    """Scores of the words of ``text`` that ``model`` reads, in float64."""
    words = [word for word, *_ in model.data_processor.words_splitter(text)]
    if not words:
        return np.empty(0)
    words = words[: model.config.max_len]
    with torch.no_grad():
        return gliner_tests.their_logits(exact_model(model), [words], [*labels])[0].numpy()


def decided(
    model, texts: Iterable[str], count: int, labels: list[str], threshold: float = 0.5,
    flat_ner: bool = True, multi_label: bool = False,
) -> list[str]:  # fmt: skip
    """The first ``count`` of ``texts`` in which every decision is ``APART``; 4 of 5 must be."""
    token_level = model.config.span_mode == "token_level"
    kept = []
    for text in itertools.islice(texts, count + count // 4):
        logits = exact_logits(model, text, tuple(labels))
        if margin(logits, threshold, flat_ner, multi_label, token_level) > APART:
            kept.append(text)
        if len(kept) == count:
            return kept
    raise AssertionError(f"only {len(kept)} texts are decided")
