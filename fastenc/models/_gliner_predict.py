"""Texts and labels to entities: packed batches, one decoding of each text."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastenc import _C
from fastenc.models import _gliner_plan as plan
from fastenc.models._gliner_batch import GLiNERBatch
from fastenc.models._gliner_plan import LabelSet, Pass, Text, Window

if TYPE_CHECKING:
    from fastenc.models.gliner import GLiNER

log = logging.getLogger("fastenc")

CPU_TOKENS_PER_THREAD = 2048
GROUP, DENSE_GROUP = 512, 64
"""Texts that are cut into batches together, sorted by length; fewer where all scores are kept."""


@dataclass(frozen=True)
class Options:
    """How entities are chosen, and how the work is cut. See ``GLiNER.inference``."""

    threshold: float
    flat_ner: bool
    multi_label: bool
    truncate: bool
    class_probs: bool
    token_budget: int
    labels_per_pass: int
    show_progress: bool | None


@dataclass(frozen=True)
class Piece:
    """One packed sequence: a window of a text behind the labels of one pass."""

    text: int
    window: Window
    asked: Pass
    tokens: int

    def share(self, text: Text) -> float:
        """Which part of its text's work this is."""
        own = self.window.own_stop - self.window.own_first
        return own / max(len(text.words), 1) / len(text.labels.passes)


def predict(
    model: GLiNER,
    texts: list[str],
    labels: list[LabelSet],
    input_spans: Sequence | None,
    options: Options,
    embeds: dict[int, Tensor] | None = None,
) -> tuple[list[list[dict[str, Any]]], list[int]]:
    """(entities of each text, words that ``truncate`` cut off each text).

    ``embeds``: of a bi-encoder, label embeddings (C, D) by ``id`` of the label set.
    """
    results: list[list[dict[str, Any]]] = [[] for _ in texts]
    cut = [0] * len(texts)
    dense = model.config.token_level or options.class_probs
    asked = [i for i, text in enumerate(texts) if text.strip() and labels[i].prompts]
    limit = model.max_tokens
    for one in {id(labels[i]): labels[i] for i in asked}.values():
        _plan_passes(model, one, options.labels_per_pass, limit)
    with _progress(len(asked), options.show_progress) as advance:
        for places in _groups(asked, DENSE_GROUP if dense else GROUP):
            group = [Text(texts[i], *plan.split_words(texts[i]), labels[i]) for i in places]
            _tokenise(model, group)
            for i, text in zip(places, group, strict=True):
                _limit(model, text, options.truncate, limit)
                cut[i] = text.cut
                if input_spans is not None:
                    text.allowed = plan.allowed_spans(text, input_spans[i], f"input_spans[{i}]")
            run = _Dense if dense else _Sparse
            found = run(model, group, options)
            for batch in _batches(_sequences(model, group, limit), options.token_budget):
                found.score(batch, embeds)
                advance(sum(s.share(group[s.text]) for s in batch))
            for i, entities in zip(places, found.entities(), strict=True):
                results[i] = entities
    dropped = [i for i in asked if cut[i]]
    if dropped:
        log.warning("truncate: %d texts lost words, %d in all", len(dropped), sum(cut))
    return results, cut


# ---- cutting the work ----------------------------------------------------------------------------


def _plan_passes(model: GLiNER, one: LabelSet, most: int, limit: int | None) -> None:
    """The passes of a label set, each with its prompt's tokens."""
    if model.config.bi_encoder:
        one.passes = [Pass(0, len(one.prompts))]
        return
    around = sum(map(len, model.words.around))
    for label in one.prompts:
        size = len(model.words.prompt([label])[0]) + around
        if limit is not None and size >= limit:
            raise ValueError(
                f"labels: {label[:40]!r} takes {size} tokens, which leaves no room for a text: the "
                f"model takes {limit}"
            )
    while True:
        one.passes = plan.even_passes(len(one.prompts), most)
        for one_pass in one.passes:
            part = one.prompts[one_pass.first : one_pass.first + one_pass.count]
            one_pass.ids, one_pass.places = model.words.prompt(part)
        longest = max(len(p.ids) for p in one.passes)
        if limit is None or longest <= limit // 2 or most == 1:
            return
        most = max(1, most // 2)


def _tokenise(model: GLiNER, group: list[Text]) -> None:
    """Tokens of all words of a group, in one call of the tokenizer."""
    ids = model.words.word_ids([word for text in group for word in text.words])
    first = 0
    for text in group:
        text.ids = ids[first : first + len(text.words)]
        first += len(text.words)


def _room(model: GLiNER, labels: LabelSet, limit: int | None) -> int | None:
    """Tokens of words that fit beside the longest prompt."""
    if limit is None:
        return None
    around = sum(map(len, model.words.around))
    return max(1, limit - around - max(len(p.ids) for p in labels.passes))


def _limit(model: GLiNER, text: Text, truncate: bool, limit: int | None) -> None:
    """Cut the text as gliner does, where that is asked for."""
    if not truncate:
        return
    room = _room(model, text.labels, limit)
    sizes = [len(ids) for ids in text.ids]
    whole = plan.windows(sizes, model.config.max_len, model.config.max_width, room)[0]
    text.cut = len(text.words) - whole.stop
    for name in ("words", "starts", "ends", "ids"):
        setattr(text, name, getattr(text, name)[: whole.stop])


def _sequences(model: GLiNER, group: list[Text], limit: int | None) -> list[Piece]:
    """All sequences of a group, longest first."""
    around = sum(map(len, model.words.around))
    config = model.config
    found = []
    for i, text in enumerate(group):
        sizes = [len(ids) for ids in text.ids]
        room = _room(model, text.labels, limit)
        for window in plan.windows(sizes, config.max_len, config.max_width, room):
            tokens = around + sum(sizes[window.first : window.stop])
            found += [Piece(i, window, p, tokens + len(p.ids)) for p in text.labels.passes]
    return sorted(found, key=lambda s: -s.tokens)


def _batches(sequences: list[Piece], budget: int) -> Iterator[list[Piece]]:
    """Batches of at most ``budget`` tokens, prompts counted; a longer sequence is one by itself."""
    batch: list[Piece] = []
    taken = 0
    for sequence in sequences:
        if batch and taken + sequence.tokens > budget:
            yield batch
            batch, taken = [], 0
        batch.append(sequence)
        taken += sequence.tokens
    if batch:
        yield batch


def _groups(places: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(places), size):
        yield places[first : first + size]


# ---- scores --------------------------------------------------------------------------------------


class _Run:
    """Scores of a group of texts, batch by batch, then its entities."""

    def __init__(self, model: GLiNER, group: list[Text], options: Options) -> None:
        self.model, self.group, self.options = model, group, options

    def batch(self, sequences: list[Piece]) -> GLiNERBatch:
        words = []
        for s in sequences:
            words += self.group[s.text].ids[s.window.first : s.window.stop]
        lengths = [s.window.stop - s.window.first for s in sequences]
        prompts = [(s.asked.ids, s.asked.places) for s in sequences]
        packed = self.model.words.pack(words, lengths, prompts, self.model.max_tokens)
        return packed.to(self.model.device)

    def embeds(
        self, sequences: list[Piece], embeds: dict[int, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(label embeddings, label mask) of a bi-encoder's batch."""
        if embeds is None:
            return None, None
        rows = [embeds[id(self.group[s.text].labels)] for s in sequences]
        if all(row is rows[0] for row in rows):
            return rows[0], None
        most = max(len(row) for row in rows)
        mask = torch.tensor([[c < len(row) for c in range(most)] for row in rows])
        padded = [torch.nn.functional.pad(row, (0, 0, 0, most - len(row))) for row in rows]
        return torch.stack(padded), mask.to(self.model.device)


class _Sparse(_Run):
    """Span models: only what exceeds the threshold is ever written."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.hits: list[tuple[np.ndarray, ...]] = []

    def score(self, sequences: list[Piece], embeds: dict[int, Tensor] | None) -> None:
        batch = self.batch(sequences)
        given, mask = self.embeds(sequences, embeds)
        hits = self.model.candidates(batch, self.options.threshold, given, mask)
        word, width, label, score = (x.cpu().numpy() for x in hits)
        edges = np.array([0, *itertools.accumulate(batch.word_lengths)])
        seq = np.searchsorted(edges, word, side="right") - 1

        def of(values: list[int]) -> np.ndarray:
            return np.asarray(values, np.int64)[seq]

        start = word - edges[seq] + of([s.window.first for s in sequences])
        owned = (start >= of([s.window.own_first for s in sequences])) & (
            start < of([s.window.own_stop for s in sequences])
        )
        label = label + of([s.asked.first for s in sequences])
        columns = (of([s.text for s in sequences]), start, start + width, label, score)
        self.hits.append(tuple(x[owned] for x in columns))

    def entities(self) -> list[list[dict[str, Any]]]:
        text, start, end, label, score = (
            np.concatenate(columns) for columns in zip(*self.hits, strict=True)
        )
        order = np.lexsort((label, end, start, text))
        return choose(self.group, *(x[order] for x in (text, start, end, label, score)),
                      self.options)  # fmt: skip


class _Dense(_Run):
    """Token models, and span models of which the other classes' probabilities are wanted too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = self.model.config
        self.scores = []
        for text in self.group:
            words, labels = len(text.words), len(text.labels.prompts)
            shape = (words, labels, 3) if config.token_level else (words, config.max_width, labels)
            self.scores.append(np.zeros(shape, np.float32))

    def score(self, sequences: list[Piece], embeds: dict[int, Tensor] | None) -> None:
        batch = self.batch(sequences)
        logits = self.model.logits(batch, self.embeds(sequences, embeds)[0])
        probability = torch.sigmoid(logits.float()).cpu().numpy()
        edges = [0, *itertools.accumulate(batch.word_lengths)]
        for s, first in zip(sequences, edges, strict=False):
            w, c = s.window, slice(s.asked.first, s.asked.first + s.asked.count)
            rows = probability[first + w.own_first - w.first : first + w.own_stop - w.first]
            if self.model.config.token_level:
                self.scores[s.text][w.own_first : w.own_stop, c] = rows[:, : s.asked.count]
            else:
                self.scores[s.text][w.own_first : w.own_stop, :, c] = rows[..., : s.asked.count]

    def entities(self) -> list[list[dict[str, Any]]]:
        columns = []
        for i, scores in enumerate(self.scores):
            if self.model.config.token_level:
                edges = np.array([0, len(scores)])
                count = np.array([scores.shape[1]])
                found = _C.token_spans(scores, edges, count, self.options.threshold)[:4]
            else:
                start, width, label = np.nonzero(scores > np.float32(self.options.threshold))
                found = (start, start + width, label, scores[start, width, label])
            columns.append((np.full(len(found[0]), i), *found))
        merged = [np.concatenate(x) for x in zip(*columns, strict=True)]
        wanted = self.options.class_probs and not self.model.config.token_level
        return choose(self.group, *merged, self.options, self.scores if wanted else None)


def choose(
    group: list[Text],
    text: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    label: np.ndarray,
    score: np.ndarray,
    options: Options,
    probabilities: list[np.ndarray] | None = None,
) -> list[list[dict[str, Any]]]:
    """gliner's greedy search among candidates in its order, and its entities."""
    allowed = [i for i, t in enumerate(group) if t.allowed is not None]
    if allowed:
        keep = np.array(
            [group[t].allowed is None or (s, e) in group[t].allowed
             for t, s, e in zip(text.tolist(), start.tolist(), end.tolist(), strict=True)], bool
        )  # fmt: skip
        text, start, end, label, score = (x[keep] for x in (text, start, end, label, score))
    edges = np.searchsorted(text, np.arange(len(group) + 1))
    chosen, cuts = _C.select_spans(start, end, score, edges, options.flat_ner, options.multi_label)
    rows = [x[chosen].tolist() for x in (start, end, label, score)]
    found = []
    for i, source in enumerate(group):
        entities = []
        for s, e, c, p in zip(*(row[cuts[i] : cuts[i + 1]] for row in rows), strict=True):
            first, last = source.starts[s], source.ends[e]
            entity = {
                "start": first,
                "end": last,
                "text": source.text[first:last],
                "label": source.labels.names[c],
                "score": p,
            }
            if probabilities is not None:
                entity["class_probs"] = _best(probabilities[i][s, e - s], source.labels.names)
            entities.append(entity)
        found.append(entities)
    return found


def _best(row: np.ndarray, names: list[str]) -> dict[str, float]:
    """The five most probable labels."""
    values, places = torch.topk(torch.from_numpy(row), min(5, len(names)))
    return {names[i]: p for i, p in zip(places.tolist(), values.tolist(), strict=True)}


@contextlib.contextmanager
def _progress(texts: int, show: bool | None) -> Iterator[Any]:
    """A tqdm bar over texts; one that is read in several pieces counts by the share of each."""
    if show is False or texts == 0:
        yield lambda share: None
        return
    from tqdm import tqdm

    done = 0.0
    delay = 2.0 if show is None else 0.0
    with tqdm(total=texts, unit="text", desc="Entities", delay=delay) as bar:

        def advance(share: float) -> None:
            nonlocal done
            done += share
            bar.update(int(done + 1e-6) - bar.n)

        yield advance
