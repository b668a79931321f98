"""What was read of compiled kernels, kept in the repository: readings/VERSION-TARGET.json.

A line a launch, named by :func:`digest` of everything that the reading follows from, so that an
unchanged kernel is not compiled anew, on whatever machine. Verdicts are not kept: every run judges
afresh. FASTENC_GATES_AFRESH=1 compiles everything anew and replaces what is on record.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import triton
from triton import language as tl
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.runtime.jit import JITCallable

FOLDER = Path(__file__).parent / "readings"

# ---- the digest --------------------------------------------------------------------------------


def _without_docstring(function: ast.FunctionDef) -> str:
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    return ast.unparse(function)


def _names(tree: ast.AST, found: dict) -> Iterator[tuple[str, object]]:
    """The globals that ``tree`` names, a module's members under their dotted names."""
    for node in ast.walk(tree):
        path = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in found:
            continue
        name, value = node.id, found[node.id]
        for part in reversed(path):
            if not isinstance(value, ModuleType):
                break
            name, value = f"{name}.{part}", getattr(value, part)
        yield name, value


@functools.cache
def sources(kernel: JITCallable) -> str:
    """The source of ``kernel`` and of all of ours that it calls, with the constants they name:
    no comment, line number or path. (Triton's own ``cache_key`` has line numbers, and depends on
    which kernels were hashed before.)"""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if name in found:
            continue
        if inspect.getclosurevars(function.fn).nonlocals:
            raise ValueError(f"{name}: a kernel with a closure has no digest")
        (tree,) = ast.parse(function.src).body
        parts = [_without_docstring(tree), f"noinline {getattr(function, 'noinline', None)}"]
        for used, value in sorted(_names(tree, function.fn.__globals__), key=lambda n: n[0]):
            if isinstance(value, JITCallable):
                if not value.fn.__module__.startswith("triton."):
                    waiting.append(value)
            elif isinstance(value, tl.constexpr):
                parts.append(f"{used} = {value.value!r}")
        found[name] = "\n".join(dict.fromkeys(parts))
    return "\n".join(found[name] for name in sorted(found))


def digest(target: object, kernel: JITCallable, specialisation: str, readers: str) -> str:
    """Of all that a reading follows from: sources, the types, alignments and constants of the
    arguments with the options (``specialisation``), target, Triton's version and switches, and the
    code that reads."""
    switches = get_cache_invalidating_env_vars()
    switches |= {name: x for name, x in os.environ.items() if name.startswith("TRITON_PTXAS")}
    follows = triton.__version__, sources(kernel), specialisation, str(target), readers
    text = repr((*follows, sorted(switches.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:14]


# ---- the files ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Record:
    """The readings of one target under the Triton that runs."""

    def __init__(self, chip: str):
        self.path = FOLDER / f"{triton.__version__}-{chip}.json"
        self.load()

    def load(self) -> None:
        text = self.path.read_text() if self.path.exists() else "{}"
        groups = json.loads(text)
        self.readings = {key: r for group in groups.values() for key, r in group.items()}
        self.names = {key: name for name, group in groups.items() for key in group}

    def get(self, key: str) -> list[int] | None:
        if os.environ.get("FASTENC_GATES_AFRESH") == "1":
            return None
        return self.readings.get(key)

    def _change(self, added: dict[str, tuple[str, list[int]]], kept: Iterable[str] | None) -> None:
        """On top of what other processes have written meanwhile."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        with _locked(FOLDER):
            self.load()
            for key, (name, reading) in added.items():
                self.names[key], self.readings[key] = name, reading
            groups: dict[str, list[str]] = {}
            for key in sorted(self.readings if kept is None else set(kept) & set(self.readings)):
                line = f'"{key}": {json.dumps(self.readings[key], separators=(",", ":"))}'
                groups.setdefault(self.names[key], []).append(line)
            texts = [
                f'"{name}": {{\n' + ",\n".join(groups[name]) + "\n}" for name in sorted(groups)
            ]
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text("{\n" + ",\n".join(sorted(texts)) + "\n}\n")
            partial.replace(self.path)
            self.load()

    def add(self, readings: dict[str, tuple[str, list[int]]]) -> None:
        """``readings``: {digest: (kernel, reading)}."""
        self._change(readings, None)

    def keep(self, keys: Iterable[str]) -> None:
        """Drop every other reading: nothing launches it any more."""
        self._change({}, keys)
