"""Real English of mixed length that every Python brings along: its own documentation.

The language reference (``pydoc_data.topics``) by paragraph and by page, and the docstrings of a
fixed list of standard modules. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from dataclasses import dataclass

MODULES = (
    "argparse", "array", "ast", "base64", "bisect", "bz2", "calendar", "cmath", "collections",
    "colorsys", "concurrent.futures", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "email.message", "enum", "filecmp", "fileinput", "fnmatch",
    "fractions", "ftplib", "functools", "getpass", "glob", "gzip", "hashlib", "heapq", "hmac",
    "html", "http.client", "http.cookies", "imaplib", "inspect", "io", "ipaddress", "itertools",
    "json", "logging", "lzma", "mailbox", "math", "mimetypes", "multiprocessing.pool", "numbers",
    "operator", "os", "os.path", "pathlib", "pdb", "pickle", "platform", "poplib", "pprint",
    "queue", "random", "re", "sched", "secrets", "select", "selectors", "shelve", "shlex",
    "shutil", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string", "struct",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "trace",
    "traceback", "types", "typing", "unittest.mock", "urllib.parse", "urllib.request", "uuid",
    "warnings", "wave", "weakref", "xml.etree.ElementTree", "zipfile", "zlib",
)  # fmt: skip

QUERIES = (
    "What happens when a with block raises an exception?",
    "How do I start another program and read its output?",
    "How do I compare two text files line by line?",
)


@dataclass(frozen=True)
class Passage:
    """A text and where it stands, such as ``csv.DictReader``."""

    title: str
    text: str


def passages() -> list[Passage]:
    """Everything there is, in a fixed order, without duplicates."""
    found: dict[str, Passage] = {}
    for passage in (*_topics(), *_docstrings()):
        words = re.findall(r"[A-Za-z]{2,}", passage.text)
        letters = sum(map(len, words))
        if len(words) >= 4 and letters > 0.6 * len(re.sub(r"\s", "", passage.text)):
            found.setdefault(passage.text, passage)
    return list(found.values())


def sample(count: int) -> list[Passage]:
    """``count`` passages, the same on every run, with long ones among them.

    One in eight is drawn from the passages of more than 150 words, the others from all.
    """
    everything = passages()
    chance = random.Random(0)
    long = [p for p in everything if len(p.text.split()) > 150]
    drawn = chance.sample(long, min(len(long), count // 8))
    taken = set(drawn)
    rest = [p for p in everything if p not in taken]
    drawn += chance.sample(rest, min(len(rest), count - len(drawn)))
    chance.shuffle(drawn)
    return drawn


def _topics() -> list[Passage]:
    from pydoc_data.topics import topics

    found = []
    for name, page in sorted(topics.items()):
        plain = re.sub(r"[*`\"]|^[=*~^#-]{3,}$", "", page, flags=re.MULTILINE).strip()
        paragraphs = [re.sub(r"\s+", " ", p).strip() for p in plain.split("\n\n")]
        found.append(Passage(f"topic {name}", " ".join(paragraphs)))
        found += [Passage(f"topic {name} §{i}", p) for i, p in enumerate(paragraphs, 1)]
    return found


def _docstrings() -> list[Passage]:
    found = []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found.append(_described(name, module))
        for member, value in sorted(vars(module).items()):
            own = getattr(value, "__module__", None) == name
            if member.startswith("_") or not own or not callable(value):
                continue
            found.append(_described(f"{name}.{member}", value))
            if inspect.isclass(value):
                found += [
                    _described(f"{name}.{member}.{method}", vars(value)[method])
                    for method in sorted(vars(value))
                    if not method.startswith("_")
                ]
    return found


def _described(title: str, value: object) -> Passage:
    """The docstring's prose: examples at a prompt are left out."""
    text = value.__doc__ if isinstance(getattr(value, "__doc__", None), str) else ""
    lines = [line.strip() for line in text.splitlines()]
    return Passage(title, " ".join(line for line in lines if line and not line.startswith(">>>")))
