"""Precision, recall and F1 of entities: exact boundaries and type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass
class Counts:
    """Entities of one type: found and right, found, annotated."""

    right: int = 0
    found: int = 0
    true: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.right + other.right, self.found + other.found, self.true + other.true)

    def scores(self) -> tuple[float, float, float]:
        """Precision, recall, F1; 0 where they are undefined."""
        precision = self.right / self.found if self.found else 0.0
        recall = self.right / self.true if self.true else 0.0
        total = self.found + self.true
        return precision, recall, 2 * self.right / total if total else 0.0


Entity = tuple[int, int, str]


def count(true: Iterable[Entity], found: Iterable[Entity]) -> dict[str, Counts]:
    """Counts by type of one text; an entity counts once."""
    annotated, predicted = set(true), set(found)
    counts: dict[str, Counts] = {}
    for entities, field in ((annotated, "true"), (predicted, "found")):
        for entity in entities:
            one = counts.setdefault(entity[2], Counts())
            setattr(one, field, getattr(one, field) + 1)
            one.right += field == "found" and entity in annotated
    return counts


def summary(counts: Mapping[str, Counts], prefix: str = "") -> dict[str, float]:
    """Micro and macro scores, and those of each type.

    Keys: precision, recall, f1 (micro, over all entities), macro_precision, macro_recall, macro_f1
    (means over types that are annotated or found), and ``f1/TYPE``, ``precision/TYPE``,
    ``recall/TYPE``; each after ``prefix``.
    """
    names = ("precision", "recall", "f1")
    micro = sum(counts.values(), Counts()).scores()
    each = {name: one.scores() for name, one in sorted(counts.items())}
    found = dict(zip(names, micro, strict=True))
    for i, name in enumerate(names):
        values = [scores[i] for scores in each.values()]
        found[f"macro_{name}"] = sum(values) / len(values) if values else 0.0
    for kind, scores in each.items():
        found |= {f"{name}/{kind}": value for name, value in zip(names, scores, strict=True)}
    return {prefix + name: value for name, value in found.items()}
