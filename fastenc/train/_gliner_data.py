"""gliner's training data: checked, given entity types, packed.

An example is ``{"tokenized_text": [word, …], "ner": [[first word, last word, type], …]}``, both
words inclusive; optional keys: ``ner_labels``, the types to ask for, in that order, and
``ner_negatives``, types to ask for beside its own.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastenc.models._gliner_batch import GLiNERBatch
from fastenc.models.gliner import GLiNER
from fastenc.nn import VarlenBatch

log = logging.getLogger("fastenc")

SAMPLED_NEGATIVES = 100
"""Most types of a batch that serve as negatives of its examples, as in gliner."""


@dataclass(frozen=True)
class Example:
    """A checked example. ``types`` is empty until types are sampled."""

    words: list[str]
    entities: list[tuple[int, int, str]]
    labels: list[str] | None = None
    negatives: list[str] | None = None
    index: int = -1
    types: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """A packed batch with its targets.

    Attributes:
        batch: words and labels.
        label_tokens: of a bi-encoder, the labels of the batch, one sequence each.
        positives: (n, 3) int64, the places of ones in the shape of the logits.
        examples: of which it is made, to make smaller ones.
    """

    batch: GLiNERBatch
    label_tokens: VarlenBatch | None
    positives: Tensor
    examples: list[Example]

    def to(self, device: torch.device | str) -> TrainingBatch:
        moved = {"batch": self.batch.to(device), "positives": self.positives.to(device)}
        if self.label_tokens is not None:
            moved["label_tokens"] = self.label_tokens.to(device)
        return replace(self, **moved)


# ---- checks --------------------------------------------------------------------------------------


def check_example(example: Any, where: str = "example", index: int = -1) -> Example:
    """The example, checked.

    Raises:
        TypeError, ValueError: says which example, what was expected and what came.
    """
    if not isinstance(example, Mapping):
        raise TypeError(f"{where}: expected a dictionary, got {type(example).__name__}")
    for key in ("tokenized_text", "ner"):
        if key not in example:
            raise ValueError(f"{where}: expected the key {key!r}, got {sorted(example)}")
    words = example["tokenized_text"]
    if not _is_list(words) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"{where}: tokenized_text: expected a list of strings, got {_short(words)}")
    entities = example["ner"] if example["ner"] is not None else []
    if not _is_list(entities):
        raise TypeError(f"{where}: ner: expected a list of entities, got {_short(entities)}")
    checked = [_entity(e, len(words), f"{where}: ner[{i}]") for i, e in enumerate(entities)]
    given = {}
    for key in ("ner_labels", "ner_negatives"):
        types = example.get(key)
        if types is not None:
            if not _is_list(types) or not all(isinstance(t, str) and t.strip() for t in types):
                raise TypeError(f"{where}: {key}: expected a list of names, got {_short(types)}")
            if len(set(types)) < len(types):
                raise ValueError(f"{where}: {key}: expected each name once, got {_short(types)}")
            types = list(types)
        given[key] = types
    return Example(list(words), checked, given["ner_labels"], given["ner_negatives"], index)


def _entity(entity: Any, words: int, where: str) -> tuple[int, int, str]:
    if not _is_list(entity) or len(entity) != 3:
        raise TypeError(f"{where}: expected [first word, last word, type], got {_short(entity)}")
    first, last, kind = entity
    for place in (first, last):
        if isinstance(place, bool) or not isinstance(place, int):
            raise TypeError(f"{where}: expected word indices as integers, got {_short(entity)}")
    if not isinstance(kind, str) or not kind.strip():
        raise TypeError(f"{where}: expected a type's name, got {_short(kind)}")
    if not 0 <= first <= last < words:
        raise ValueError(
            f"{where}: expected 0 <= first <= last < {words} words, got {first} to {last}"
        )
    return first, last, kind


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes))


def _short(x: Any) -> str:
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---- types ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TypeSampling:
    """Which types are asked for beside an example's own.

    max_neg_type_ratio: an example of n entities gets up to n times randint(0, ratio) types of the
    rest of its batch. random_drop: of the shuffled types a random number, at least one, is kept.
    max_types: most types of an example.
    """

    max_types: int
    max_neg_type_ratio: int
    random_drop: bool = False
    shuffle_types: bool = True

    def sample(
        self, examples: Sequence[Example], shared: bool, draw: random.Random
    ) -> list[Example]:
        """The examples with their types; ``shared``: one list for all, as bi-encoders take."""
        own = sorted({kind for e in examples for *_, kind in e.entities})
        pool = draw.sample(own, min(SAMPLED_NEGATIVES, len(own)))
        chosen = [self._types(e, pool, shared, draw) for e in examples]
        if shared:
            union = list(dict.fromkeys(kind for types in chosen for kind in types))
            if self.shuffle_types:
                draw.shuffle(union)
            chosen = [union[: self.max_types * len(examples)]] * len(examples)
        return [
            replace(e, types=tuple(types) or ("",))
            for e, types in zip(examples, chosen, strict=True)
        ]

    def _types(
        self, example: Example, pool: list[str], shared: bool, draw: random.Random
    ) -> list[str]:
        if example.labels is not None:
            return example.labels
        negatives = example.negatives
        if negatives is None:
            ratio = draw.randint(0, self.max_neg_type_ratio) if self.max_neg_type_ratio else 0
            negatives = [] if shared else pool[: len(example.entities) * ratio]
        types = list(dict.fromkeys([kind for *_, kind in example.entities] + negatives))
        if self.shuffle_types:
            draw.shuffle(types)
        if self.random_drop and types:
            types = types[: draw.randint(1, len(types))]
        return types if shared else types[: self.max_types]


# ---- packing -------------------------------------------------------------------------------------


class Collator:
    """Examples to :class:`TrainingBatch`.

    Args:
        types: how types are sampled; or a fixed list for every example.
        seed: of the samples, with ``epoch`` and the texts of the batch: the same whenever and
            wherever a batch is made.
    """

    def __init__(self, model: GLiNER, types: TypeSampling | Sequence[str], seed: int = 0) -> None:
        self.words, self.config = model.words, model.config
        self.labels_tokenizer = model.labels_tokenizer
        self.max_tokens = getattr(model, "max_tokens", None)
        self.types, self.seed, self.epoch = types, seed, 0
        self._told: set[str] = set()

    def __call__(self, examples: Sequence[Any]) -> dict[str, TrainingBatch]:
        checked = [
            e if isinstance(e, Example) else check_example(e, f"example {i} of a batch", i)
            for i, e in enumerate(examples)
        ]
        if isinstance(self.types, TypeSampling):
            checked = self.types.sample(checked, self.config.bi_encoder, self._draw(checked))
        else:
            checked = [replace(e, types=tuple(e.labels or self.types) or ("",)) for e in checked]
            if self.config.bi_encoder:
                union = dict.fromkeys(kind for e in checked for kind in e.types)
                checked = [replace(e, types=tuple(union)) for e in checked]
        return {"batch": self.pack(checked)}

    def _draw(self, examples: Sequence[Example]) -> random.Random:
        texts = zlib.crc32("\0".join(" ".join(e.words) for e in examples).encode())
        return random.Random(f"{self.seed} {self.epoch} {texts}")

    def pack(self, examples: Sequence[Example]) -> TrainingBatch:
        """A batch of examples that have types."""
        cut = [self._cut(e) for e in examples]
        bi_encoder = self.config.bi_encoder
        labels = None if bi_encoder else [e.types for e in cut]
        batch = self.words.batch([e.words for e in cut], labels, max_tokens=self.max_tokens)
        label_tokens = None
        if bi_encoder:
            ids = self.labels_tokenizer(list(cut[0].types), truncation=True)["input_ids"]
            label_tokens = VarlenBatch.from_lists(ids)
        places = torch.tensor(self._positives(cut), dtype=torch.int64).view(-1, 3)
        return TrainingBatch(batch, label_tokens, places, list(examples))

    def _cut(self, example: Example) -> Example:
        limit = self.config.max_len
        if len(example.words) <= limit:
            return example
        self._tell(f"texts longer than max_len = {limit} words are cut; entities behind are lost")
        inside = [e for e in example.entities if e[1] < limit]
        return replace(example, words=example.words[:limit], entities=inside)

    def _positives(self, examples: list[Example]) -> list[tuple[int, int, int]]:
        places: list[tuple[int, int, int]] = []
        first_word, width = 0, self.config.max_width
        for example in examples:
            index = {kind: i for i, kind in enumerate(example.types)}
            for first, last, kind in example.entities:
                label = index.get(kind)
                if label is None:
                    continue
                start, end = first_word + first, first_word + last
                if self.config.token_level:
                    places += [(start, label, 0), (end, label, 1)]
                    places += [(word, label, 2) for word in range(start, end + 1)]
                elif last - first < width:
                    places.append((start, last - first, label))
                else:
                    self._tell(f"entities of more than max_width = {width} words are not learned")
            first_word += len(example.words)
        return places

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("GLiNER training: %s", message)
