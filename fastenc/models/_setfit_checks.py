"""What is wrong with labels and embeddings, said before anything is trained on them."""

from __future__ import annotations

import collections
import logging
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

log = logging.getLogger("fastenc")


def check_labels(labels: Any, strategy: str | None) -> np.ndarray:
    """Labels as an array that a head can be fitted on.

    Args:
        labels: one label a text, all strings, all integers or all booleans; with a ``strategy``
            (n, outputs) of 0 and 1.
        strategy: the multi-target strategy, or None.

    Returns:
        (n,), or (n, outputs) integers.

    Raises:
        TypeError, ValueError: None, labels of mixed type, rows of different length, values other
            than 0 and 1, a single class.
    """
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    for i, label in enumerate(labels):
        if label is None:
            raise ValueError(f"labels: expected a label for every text, got None at index {i}")
    rows = [isinstance(label, (list, tuple, np.ndarray)) for label in labels]
    if any(rows):
        return _check_rows(labels, rows, strategy)
    if strategy in ("multi-output", "classifier-chain"):
        raise ValueError(f"labels: {strategy} expects a list of 0 and 1 for every text")
    kinds = {_kind(label) for label in labels}
    if len(kinds) > 1:
        raise TypeError(f"labels: expected one type, got {' and '.join(sorted(kinds))}")
    if kinds - {"str", "int", "bool"}:
        raise TypeError(f"labels: expected strings or integers, got {kinds.pop()}")
    found = np.asarray(labels)
    if len(found) and len(np.unique(found)) < 2:
        raise ValueError(
            f"labels: expected at least 2 classes, got only {labels[0]!r} in {len(found)} texts"
        )
    return found


def _kind(label: Any) -> str:
    if isinstance(label, (bool, np.bool_)):
        return "bool"
    if isinstance(label, str):
        return "str"
    return "int" if isinstance(label, numbers.Integral) else type(label).__name__


def _check_rows(labels: list, rows: list[bool], strategy: str | None) -> np.ndarray:
    if not all(rows):
        raise TypeError("labels: expected one type, got rows of labels and single labels")
    if strategy is None:
        raise ValueError("labels: rows of 0 and 1 need a multi_target_strategy")
    widths = {len(row) for row in labels}
    if len(widths) > 1:
        raise ValueError(f"labels: expected rows of one length, got {sorted(widths)}")
    values = {value for row in labels for value in row}
    if None in values or not values <= {0, 1}:
        odd = next(value for value in values if value is None or value not in (0, 1))
        raise ValueError(f"labels: expected 0 and 1 in every row, got {odd!r}")
    found = np.asarray(labels, dtype=int)
    constant = [i for i in range(found.shape[1]) if len(np.unique(found[:, i])) < 2]
    if constant and strategy != "one-vs-rest":
        raise ValueError(
            f"labels: expected both 0 and 1 for every output, got one value only for output"
            f"{'s' if len(constant) > 1 else ''} {', '.join(map(str, constant))}"
        )
    return found


def check_embeddings(embeddings: Any, count: int) -> np.ndarray:
    """(n, features) floating, finite; one row a label."""
    found = np.asarray(embeddings.detach().cpu() if hasattr(embeddings, "detach") else embeddings)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        raise ValueError(
            f"embeddings: expected (n, features) floating, got {found.shape} {found.dtype}"
        )
    if len(found) != count:
        raise ValueError(
            f"expected as many labels as texts, got {len(found)} texts, {count} labels"
        )
    if not np.isfinite(found).all():
        raise ValueError("embeddings: expected finite numbers, got NaN or infinity")
    return found


def check_examples(
    texts: Sequence[Any],
    labels: Any,
    strategy: str | None = None,
    names: Sequence[Any] | None = None,
) -> tuple[list[str], np.ndarray]:
    """Examples to train on: (texts, labels as :func:`check_labels` gives them).

    A text that occurs with different labels is warned of.

    Args:
        names: the model's label names, where it has them.

    Raises:
        TypeError, ValueError: see :func:`check_labels`; also texts that are no strings or empty,
            counts that differ, and fewer examples than ``names``.
    """
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} at index {i}")
        if not text.strip():
            raise ValueError(f"texts: expected something to learn from, got an empty text at {i}")
    if not texts:
        raise ValueError("texts: expected at least one example, got none")
    found = check_labels(labels, strategy)
    if len(found) != len(texts):
        raise ValueError(
            f"expected as many labels as texts, got {len(texts)} texts, {len(found)} labels"
        )
    if names and len(texts) < len(names):
        raise ValueError(
            f"expected an example of every label, got {len(texts)} examples, {len(names)} labels"
        )
    seen: dict[str, set] = collections.defaultdict(set)
    for text, label in zip(texts, found.tolist(), strict=True):
        seen[text].add(tuple(label) if isinstance(label, list) else label)
    torn = [text for text, given in seen.items() if len(given) > 1]
    if torn:
        log.warning(
            "%d text(s) occur with different labels, the first: %r with %s",
            len(torn), torn[0][:60], sorted(seen[torn[0]], key=str),
        )  # fmt: skip
    return texts, found
