"""Training speed and memory against setfit 1.2, interleaved in one run: about six minutes.

    python -m bench.setfit_training [--rows "exact 2x8,block 6x8"] [--memory] [--small]

Writes its rows into bench/results/<machine>/setfit.json. MiniLM's weights, texts of the Debian
extract, dropout on, no checkpoints, no logging. Times are of ``train()`` alone, the median of the
repeats; both libraries alternate. setfit's stage 1 at 6 x 64 (7,680 steps) would take an hour: it
is timed over its first ``STEPS`` steps and scaled. ``--memory`` measures in place of the time the
peak memory of a process of its own, less what it held before training, by Linux's VmHWM.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastenc
from bench import setfit_data, setfit_peer, setfit_report
from bench.accuracy_setfit import body_folder

STEPS = 24


@dataclass(frozen=True)
class Row:
    """A comparison: ``goal`` times setfit's speed; ``peer_steps``: setfit's own, to scale to."""

    name: str
    classes: int
    shots: int
    goal: float
    ours: dict[str, Any]
    theirs: dict[str, Any]
    differentiable: bool = False
    peer_steps: int | None = None


STAGE_1 = {"num_epochs": (1, 1)}
HEAD = {"num_epochs": (0, 16)}
ROWS = (
    Row("exact 2x8", 2, 8, 2.5, {"pairing": "exact", **STAGE_1}, STAGE_1),
    Row("block 6x8", 6, 8, 6.0, STAGE_1, {**STAGE_1, "max_steps": STEPS}, peer_steps=120),
    Row("block 6x64", 6, 64, 20.0, STAGE_1, {**STAGE_1, "max_steps": STEPS}, peer_steps=7680),
    Row("head 6x8", 6, 8, 16.0, HEAD, HEAD, differentiable=True),
)


def examples(classes: int, shots: int) -> tuple[list[str], list[int]]:
    rows: dict[str, list[str]] = {}
    for line in setfit_data.DEBIAN.read_text(encoding="utf-8").splitlines():
        label, tab, text = line.partition("\t")
        if tab:
            rows.setdefault(label, []).append(text)
    chosen = list(rows.items())[:classes]
    texts = [text for _, found in chosen for text in found[:shots]]
    return texts, [i for i in range(classes) for _ in range(shots)]


def ours(row: Row, texts: list[str], labels: list[int]) -> float:
    head = {"use_differentiable_head": True, "head_params": {"out_features": row.classes}}
    model = fastenc.SetFitModel.from_pretrained(
        body_folder(), **(head if row.differentiable else {})
    )
    args = fastenc.SetFitTrainingArguments(show_progress_bar=False, **row.ours)
    trainer = fastenc.SetFitTrainer(model, args, {"text": texts, "label": labels})
    started = time.perf_counter()
    if row.differentiable:
        trainer.train_classifier()
    else:
        trainer.train_embeddings()
    return time.perf_counter() - started


def theirs(row: Row, texts: list[str], labels: list[int]) -> float:
    """Scaled to the whole of setfit's schedule where it was cut."""
    head = {"use_differentiable_head": True, "head_params": {"out_features": row.classes}}
    model = setfit_peer.load(body_folder(), **(head if row.differentiable else {}))
    import setfit

    kept = {}

    def timed(name: str):
        method = getattr(setfit.Trainer, name)

        def call(*args: Any, **given: Any) -> None:
            started = time.perf_counter()
            method(*args, **given)
            kept[name] = time.perf_counter() - started

        return method, call

    stages = ("train_embeddings", "train_classifier")
    before = {}
    for name in stages:
        before[name], call = timed(name)
        setattr(setfit.Trainer, name, call)
    if row.differentiable:
        setfit.Trainer.train_embeddings = lambda *args, **given: None
    try:
        setfit_peer.trained(model, texts, labels, **row.theirs)
    finally:
        for name in stages:
            setattr(setfit.Trainer, name, before[name])
    seconds = kept["train_classifier" if row.differentiable else "train_embeddings"]
    return seconds * (row.peer_steps / STEPS if row.peer_steps else 1)


RUN = {"fastenc": ours, "setfit": theirs}


def peak(row: Row, library: str) -> float:
    """MiB that training adds to the peak of a fresh process."""
    code = (
        "from bench import setfit_peer, setfit_training as t\n"
        "import sentence_transformers, setfit, sklearn.linear_model\n"
        "setfit_peer.quiet()\n"
        f"row = t.ROWS[{ROWS.index(row)}]\n"
        "before = t.own_peak()\n"
        f"t.RUN[{library!r}](row, *t.examples(row.classes, row.shots))\n"
        "print(t.own_peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def own_peak() -> float:
    """MiB; not getrusage's ru_maxrss, which a process takes over from the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def memory(row: Row) -> dict[str, Any]:
    return {f"{name}_peak_mib": round(peak(row, name)) for name in RUN}


def measure(row: Row, repeats: int) -> dict[str, Any]:
    texts, labels = examples(row.classes, row.shots)
    times: dict[str, list[float]] = {name: [] for name in RUN}
    for _ in range(repeats):
        for name, run in RUN.items():
            times[name].append(run(row, texts, labels))
    medians = {name: statistics.median(found) for name, found in times.items()}
    result = {f"{name}_seconds": round(value, 3) for name, value in medians.items()}
    return result | {"ratio": round(medians["setfit"] / medians["fastenc"], 2), "goal": row.goal}


def training(names: Sequence[str], what: str, repeats: int, kept: bool) -> None:
    """Measure rows one by one, each kept when it is there; ``what``: "training" or "memory"."""
    setfit_peer.quiet()
    for row in ROWS:
        if row.name not in names:
            continue
        # the longest row is steady: one pass over it keeps the run short
        count = 1 if row.name == "block 6x64" else repeats
        found = memory(row) if what == "memory" else measure(row, count)
        print(f"{row.name:12} {found}", flush=True)
        if kept:
            setfit_report.keep(what, {row.name: found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [row.name for row in ROWS]
    parser.add_argument("--rows", default=",".join(known), help="some of: " + ", ".join(known))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory, not time")
    parser.add_argument("--small", action="store_true", help="once, nothing kept")
    asked = parser.parse_args()
    names = asked.rows.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"--rows: no {', '.join(sorted(unknown))}")
    repeats = 1 if asked.small else asked.repeats
    training(names, "memory" if asked.memory else "training", repeats, not asked.small)


if __name__ == "__main__":
    main()
