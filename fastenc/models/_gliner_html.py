"""Entities highlighted in their text, as one HTML page without scripts."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Entities</title>
<style>
body {{ font: 17px/2.1 system-ui, sans-serif; max-width: 46em; margin: 2.5em auto; padding: 0 1em;
       color: #1b1f24; background: #fff }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere }}
mark {{ color: inherit; border-radius: .35em; padding: .15em .35em }}
mark small {{ font-weight: 600; font-size: .68em; margin-left: .4em; opacity: .75 }}
</style>
{body}
</html>
"""


def to_html(
    texts: str | Sequence[str],
    entities: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
    path: str | os.PathLike | None = None,
) -> str:
    """A page that shows entities in their texts, each label in its colour.

    Args:
        texts: a text with its entities, or texts with a list of entities each, as ``inference``
            returns them; entities within entities are shown so.
        path: also write the page there.

    Raises:
        ValueError: the numbers of texts and lists differ, an entity is not within its text, or two
            entities cross.
    """
    if isinstance(texts, str):
        texts, entities = [texts], [entities]
    if len(texts) != len(entities):
        raise ValueError(f"to_html: {len(texts)} texts, but {len(entities)} lists of entities")
    labels = list(dict.fromkeys(e["label"] for found in entities for e in found))
    colours = {label: f"hsl({i * 137.5 % 360:.0f} 75% 84%)" for i, label in enumerate(labels)}
    rows = [f"<p>{_marked(t, e, colours)}</p>" for t, e in zip(texts, entities, strict=True)]
    page = _PAGE.format(body="\n".join(rows))
    if path is not None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    return page


def _marked(text: str, entities: Sequence[Mapping[str, Any]], colours: dict[str, str]) -> str:
    parts: list[str] = []
    open_ends: list[tuple[int, str]] = []
    at = 0

    def advance(to: int) -> None:
        nonlocal at
        while open_ends and open_ends[-1][0] <= to:
            end, closing = open_ends.pop()
            parts.append(html.escape(text[at:end]) + closing)
            at = end
        parts.append(html.escape(text[at:to]))
        at = to

    for e in sorted(entities, key=lambda e: (e["start"], -e["end"])):
        start, end = e["start"], e["end"]
        if not 0 <= start < end <= len(text):
            raise ValueError(f"to_html: entity {start}:{end} is not in a text of {len(text)}")
        advance(start)
        if open_ends and end > open_ends[-1][0]:
            raise ValueError(f"to_html: entity {start}:{end} crosses the one before it")
        score = f' title="{e["score"]:.3f}"' if "score" in e else ""
        parts.append(f'<mark style="background:{colours[e["label"]]}"{score}>')
        open_ends.append((end, f"<small>{html.escape(e['label'])}</small></mark>"))
    advance(len(text))
    return "".join(parts)
