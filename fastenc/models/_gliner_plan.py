"""What a GLiNER call is asked, checked, and cut into sequences: words, label sets, windows, passes.

A text longer than the model's window is read in windows that overlap. Every word belongs to one
window, the one in which it stands farther from the edge; a span belongs to its first word. So each
span and label is scored exactly once, and the text's entities are chosen among all of them at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_WORD = re.compile(r"\w+(?:[-_]\w+)*|\S")
LABELS_PER_PASS = 100
"""Labels read beside a text at once: four times gliner's max_types. With 965 in one pass GLiNER
finds next to nothing."""


@dataclass
class Text:
    """One text: its words, where they are, and which label set is asked of it.

    starts, ends: character offsets of the words. ids: their tokens. cut: words dropped by
    ``truncate``. allowed: (first word, last word) of the spans to classify, None: all.
    """

    text: str
    words: list[str]
    starts: list[int]
    ends: list[int]
    labels: LabelSet
    ids: Sequence[tuple[int, ...]] = ()
    cut: int = 0
    allowed: set[tuple[int, int]] | None = None


@dataclass
class LabelSet:
    """Labels asked together. prompts: what the model reads; names: what the caller sees."""

    prompts: list[str]
    names: list[str]
    passes: list[Pass] = field(default_factory=list)


@dataclass
class Pass:
    """Labels ``first`` to ``first + count`` of a set, read at once; their prompt's tokens."""

    first: int
    count: int
    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Window:
    """Words first to stop of a text, of which it owns own_first to own_stop."""

    first: int
    stop: int
    own_first: int
    own_stop: int


# ---- arguments -----------------------------------------------------------------------------------


def split_words(text: str) -> tuple[list[str], list[int], list[int]]:
    """gliner's words, with the offsets of their first character and past their last."""
    words, starts, ends = [], [], []
    for match in _WORD.finditer(text):
        words.append(match.group())
        starts.append(match.start())
        ends.append(match.end())
    return words, starts, ends


def check_texts(texts: Any) -> list[str]:
    """A list of strings; a single string is a list of one."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a string or strings, got {type(texts).__name__}")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} at index {i}")
    return texts


def check_labels(labels: Any, num_texts: int, max_words: int) -> list[LabelSet]:
    """The label set of each text; texts that share their labels share the object.

    Args:
        labels: a string, strings, {name: description}, or one of the last two for each text.
            Duplicates are asked once.
        max_words: of a label.
    """
    if isinstance(labels, (bytes, type(None))) or not isinstance(labels, Iterable):
        raise TypeError(f"labels: expected strings, got {type(labels).__name__}")
    if not isinstance(labels, (str, Mapping)):
        labels = list(labels)
        if any(isinstance(x, (list, tuple, Mapping)) for x in labels):
            if len(labels) != num_texts:
                raise ValueError(
                    f"labels: expected a set for each of {num_texts} texts, got {len(labels)}"
                )
            made: dict[Any, LabelSet] = {}
            return [_shared(made, x, max_words, f"labels[{i}]") for i, x in enumerate(labels)]
    one = _label_set(labels, max_words, "labels")
    if not one.prompts:
        raise ValueError("labels: expected at least one, got none")
    return [one] * num_texts


def _shared(made: dict, labels: Any, max_words: int, where: str) -> LabelSet:
    if not isinstance(labels, (list, tuple, Mapping)):
        raise TypeError(f"{where}: expected a set of labels, got {type(labels).__name__}")
    key = tuple(labels.items()) if isinstance(labels, Mapping) else (tuple(labels), None)
    try:
        if key not in made:
            made[key] = _label_set(labels, max_words, where)
    except TypeError as error:
        raise TypeError(f"{where}: expected strings ({error})") from None
    return made[key]


def _label_set(labels: Any, max_words: int, where: str) -> LabelSet:
    if isinstance(labels, Mapping):
        names, prompts = list(labels), list(labels.values())
    else:
        names = prompts = [labels] if isinstance(labels, str) else list(labels)
    for label in (*names, *prompts):
        if not isinstance(label, str):
            raise TypeError(f"{where}: expected strings, got {type(label).__name__} ({label!r})")
        if not label.strip():
            raise ValueError(f"{where}: expected words, got the blank label {label!r}")
        words = len(_WORD.findall(label))
        if words > max_words:
            raise ValueError(
                f"{where}: {label[:40]!r}… has {words} words, a text's window only {max_words}"
            )
    if isinstance(labels, Mapping):
        if len(set(prompts)) != len(prompts):
            raise ValueError(f"{where}: two labels have the same description")
        return LabelSet(prompts, names)
    unique = list(dict.fromkeys(prompts))
    return LabelSet(unique, unique)


def allowed_spans(text: Text, spans: Any, where: str) -> set[tuple[int, int]]:
    """Character spans to spans of words, without those that cut through words."""
    first = {start: word for word, start in enumerate(text.starts)}
    last = {end: word for word, end in enumerate(text.ends)}
    found = set()
    for span in spans:
        try:
            pair = first.get(span["start"]), last.get(span["end"])
        except (TypeError, KeyError):
            raise TypeError(f"{where}: expected {{'start': …, 'end': …}}, got {span!r}") from None
        if None not in pair and pair[1] >= pair[0]:
            found.add(pair)
    return found


# ---- passes and windows --------------------------------------------------------------------------


def even_passes(count: int, most: int) -> list[Pass]:
    """``count`` labels in as few passes of at most ``most`` as it takes, of nearly equal size."""
    passes = max(1, -(-count // most))
    edges = [i * count // passes for i in range(passes + 1)]
    return [Pass(a, b - a) for a, b in itertools.pairwise(edges)]


def windows(
    sizes: Sequence[int], max_words: int, max_width: int, room: int | None = None
) -> list[Window]:
    """Windows over words of ``sizes`` tokens: at most ``max_words`` words and ``room`` tokens each.

    Neighbours share an eighth of a window, or twice ``max_width`` where that is more, and at most
    half a window; what they share is owned half by the one and half by the other.
    """
    count = len(sizes)
    shared = min(max(2 * max_width, max_words // 8), max_words // 2)
    found: list[Window] = []
    first = own_first = 0
    while True:
        stop = _reach(sizes, first, max_words, room)
        if stop >= count:
            found.append(Window(first, count, own_first, count))
            return found
        following = max(first + 1, stop - min(shared, (stop - first) // 2))
        middle = (following + stop) // 2
        own_stop = max(following, min(middle, stop - max_width + 1), own_first)
        found.append(Window(first, stop, own_first, own_stop))
        first, own_first = following, own_stop


def _reach(sizes: Sequence[int], first: int, max_words: int, room: int | None) -> int:
    """The word past the last that fits beside word ``first``; at least one word."""
    stop = min(len(sizes), first + max_words)
    if room is None:
        return stop
    taken = 0
    for word in range(first, stop):
        taken += sizes[word]
        if taken > room and word > first:
            return word
    return stop
