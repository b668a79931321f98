"""Datasets as columns: ``datasets.Dataset``, a dictionary of lists, or a list of dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mapped(
    name: str, dataset: Any, mapping: dict[str, str] | None, required: Sequence[str]
) -> dict[str, Any]:
    """{"text": column, "label": column} of what is there.

    Args:
        name: for messages.
        mapping: {column of the data: "text" or "label"}.
        required: columns that must be there.

    Raises:
        TypeError: it is no dataset. ValueError: a column is missing.
    """
    columns = _columns(name, dataset)
    mapping = mapping or {}
    for source, target in mapping.items():
        if source not in columns:
            raise ValueError(f"column_mapping: {name} has no {source!r}, only {sorted(columns)}")
        if target not in ("text", "label"):
            raise ValueError(f"column_mapping: expected 'text' or 'label', got {target!r}")
    of = {target: source for source, target in mapping.items()}
    found = {}
    for target in ("text", "label"):
        source = of.get(target, target)
        if source in columns and (target in of or target not in mapping):
            found[target] = columns[source]
        elif target in required:
            raise ValueError(
                f"{name}: expected the columns {list(required)}, got {sorted(columns)} "
                f"(column_mapping renames them)"
            )
    return found


def _columns(name: str, dataset: Any) -> dict[str, Any]:
    if isinstance(getattr(dataset, "column_names", None), Mapping):
        splits = sorted(dataset.column_names)
        raise ValueError(f"{name}: expected one split, got the splits {splits}: take one of them")
    if hasattr(dataset, "column_names"):
        return {column: _Lazy(dataset, column) for column in dataset.column_names}
    if isinstance(dataset, Mapping):
        return dict(dataset)
    if isinstance(dataset, Sequence) and not isinstance(dataset, (str, bytes)):
        if not all(isinstance(row, Mapping) for row in dataset):
            raise TypeError(f"{name}: expected a list of dictionaries")
        names = {key for row in dataset for key in row}
        return {key: [row.get(key) for row in dataset] for key in names}
    raise TypeError(
        f"{name}: expected a datasets.Dataset, a dictionary of lists or a list of dictionaries, "
        f"got {type(dataset).__name__}"
    )


class _Lazy:
    """A column that is read when it is needed."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset, name

    def __iter__(self):
        return iter(self.dataset[self.name])


def column(dataset: dict[str, Any], name: str) -> list[Any]:
    """A column as a list."""
    return list(dataset[name])


def distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(texts without repeats, each text's place among them (n,))."""
    place: dict[str, int] = {}
    rows = [place.setdefault(text, len(place)) for text in texts]
    return list(place), np.asarray(rows, np.int64)
