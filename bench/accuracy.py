"""Accuracy results: JSON under ``bench/results/accuracy``, keyed by a hash of what they judge.

A result belongs to the sources that it was made from; tests/test_accuracy_results.py says when one
is stale. ``make accuracy`` makes them anew.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "accuracy"


def hash_of(patterns: Sequence[str], root: Path = ROOT) -> str:
    """SHA-256 over the files that match ``patterns`` (globs below ``root``), names included.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    found = set()
    for pattern in patterns:
        files = [path for path in root.glob(pattern) if path.is_file()]
        if not files:
            raise FileNotFoundError(f"no file matches {pattern} in {root}")
        found.update(files)
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()


def write(name: str, sources: Sequence[str], values: dict[str, Any], packages: Sequence[str]):
    """Write ``RESULTS/name.json``: the values, their sources' hash, versions, machine, date."""
    result = {
        **values,
        "sources": {"patterns": list(sources), "sha256": hash_of(sources)},
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    temporary = RESULTS / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(RESULTS / f"{name}.json")


def stale(name: str, root: Path = ROOT) -> str | None:
    """Why the result is not of these sources, or None."""
    path = root / "bench" / "results" / "accuracy" / f"{name}.json"
    if not path.is_file():
        return f"{path.relative_to(root)} is missing: make accuracy"
    sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
    try:
        same = hash_of(sources["patterns"], root) == sources["sha256"]
    except FileNotFoundError:
        same = False
    return None if same else f"{path.relative_to(root)} is of other sources: make accuracy"
