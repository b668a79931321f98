"""The record of ``python -m bench.gpu`` while it is made: on disk before each run, so that a run
which takes the process with it costs its own figure and the next process goes on behind it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench import measure
from bench.gpu_process import OUT_OF_TIME
from bench.gpu_timing import CUDA, Deadline, context_is_lost

Found = dict[str, object]
LOST = 3  # exit status: CUDA refuses everything in this process
HUNG, DIED = "hung", "died"
IDENTITY = ("op", "model", "shape", "direction")
# Seconds after which a run counts as hung; a compiled peer may compile for a minute.
LIMIT, COMPILED_LIMIT = (45.0, 120.0) if CUDA else (1200.0, 1200.0)
OURS, PEERS, COMPILED = "fastenc", "peers", "compiled"  # kinds of runs, in the order they come

COMPILE_LAST = {"phases": ((COMPILED,),)}
# {step: (its share of the time, module of bench/, what its ``measure`` is given)}
STEPS: dict[str, tuple[float, str, dict]] = {
    "ops": (0.40, "gpu_ops", {}),
    "models": (0.13, "gpu_models", {}),
    "training": (0.09, "gpu_training", {}),
    "gliner": (0.07, "gpu_gliner", {}),
    "embedding": (0.05, "gpu_embedding", {}),
    "setfit": (0.05, "gpu_setfit", {}),
    "compiled ops": (0.12, "gpu_ops", COMPILE_LAST),
    "compiled models": (0.06, "gpu_models", COMPILE_LAST),
    "compiled gliner": (0.03, "gpu_gliner", COMPILE_LAST),
}


def budget(name: str, shares: dict[str, float], left: float) -> float:
    """Seconds of ``name`` out of what is left for it and all behind it in ``shares``."""
    names = list(shares)
    behind = sum(shares[n] for n in names[names.index(name) :])
    return left * shares[name] / behind


def kind_of(name: str) -> str:
    """Which of OURS, PEERS and COMPILED the run ``name`` is."""
    if name.startswith("fastenc"):
        return OURS
    return COMPILED if "torch.compile" in name or name == "FlexAttention" else PEERS


def of_kinds(runs: dict[str, Callable], kinds: Iterable[str]) -> dict[str, Callable]:
    return {name: run for name, run in runs.items() if kind_of(name) in kinds}


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def rows_of(result: dict) -> Iterator[dict]:
    for part in result.values():
        if isinstance(part, list):
            yield from (row for row in part if "runs" in row)


def shown(row: dict, names: Iterable[str], figure: Callable[[Found], str]) -> str:
    """What is printed of a row's runs: the ``figure`` of each, or its error."""
    runs = ((name, row["runs"][name]) for name in names)
    return " | ".join(
        f"{name} {figure(run)}"
        if "seconds" in run
        else f"{name}: {run['error'].splitlines()[0][:60]}"
        for name, run in runs
    )


def out_of_time(run: Found) -> bool:
    return run.get("error") == OUT_OF_TIME


class Record:
    """``result`` and the file that it is written to.

    A step is a part of the benchmark with a time of its own; its rows are in ``result[part]``. What
    is recorded already is not run again, unless only time was missing.
    """

    def __init__(self, path: Path, result: dict):
        self.path, self.result = path, result
        self.deadline = Deadline(0)
        self.name = ""
        for key, empty in (("step_seconds", {}), ("step_errors", {}), ("lost", [])):
            result.setdefault(key, empty)

    def write(self) -> None:
        measure.write_json(self.path, self.result, indent=None)

    def step(self, name: str, seconds: float, body: Callable[[Record], None]) -> None:
        """``body`` with ``seconds`` to go; an error ends the step and is recorded."""
        if name in self.result["step_seconds"]:
            return
        self.name, self.deadline = name, Deadline(seconds)
        self.result["running"] = {"step": name}
        self.write()
        try:
            body(self)
        except Exception as error:
            traceback.print_exc()
            self.error(name, error)
            self._leave_if_lost({"step": name}, said(error))
        self.result["running"] = None
        self.result["step_seconds"][name] = round(seconds - self.deadline.left, 1)
        self.write()

    def error(self, name: str, error: Exception) -> None:
        self.result["step_errors"][name] = said(error)

    def row(self, part: str, **head: object) -> dict:
        """The row of ``head`` in ``result[part]``, made where it is not there yet."""
        rows = self.result.setdefault(part, [])
        for row in rows:
            if all(row.get(key) == head.get(key) for key in IDENTITY):
                return row
        rows.append({**head, "runs": {}})
        return rows[-1]

    def run(self, row: dict, name: str, call: Callable[[Found], None]) -> None:
        """``row["runs"][name]``: what ``call`` puts into the dict it is given, and its error."""
        runs = row["runs"]
        if name in runs and not out_of_time(runs[name]):
            return
        if why := self._refusal(row, name):
            runs[name] = {"error": why}
            return
        limit = COMPILED_LIMIT if kind_of(name) == COMPILED else LIMIT
        runs[name] = {"error": "the process ended during this run"}
        key = {k: row[k] for k in IDENTITY if k in row}
        self.result["running"] = {"step": self.name, "row": key, "name": name, "limit": limit}
        self.write()
        found: Found = {}
        # Ends the process from a thread of its own where a kernel never ends.
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
        try:
            call(found)
        except Exception as error:
            found["error"] = said(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
        runs[name] = found
        self.result["running"] = {"step": self.name}
        if "error" in found:
            self._leave_if_lost({"row": key, "name": name}, f"{DIED}: {found['error']}")
        self.write()

    def _refusal(self, row: dict, name: str) -> str | None:
        if self.deadline.left <= 0:
            return OUT_OF_TIME
        what = row.get("op") or row.get("model")
        lost = [
            x for x in self.result["lost"]
            if x.get("name") == name and what in (x["row"].get("op"), x["row"].get("model"))
        ]  # fmt: skip
        # A process costs time: a second one for the same kernel, no more; none for one that hangs.
        if len(lost) > 1 or any(x["how"].startswith(HUNG) for x in lost):
            return f"left out: {lost[-1]['how']}, at {lost[-1]['row']['shape']}"
        return None

    def _leave_if_lost(self, where: dict, how: str) -> None:
        if not context_is_lost():
            return
        if "name" in where:
            self.result["lost"].append({**where, "how": how})
        else:
            self.result["step_seconds"][where["step"]] = None
        self.result["running"] = None
        self.write()
        sys.stdout.flush()
        os._exit(LOST)  # destructors would wait for CUDA


def note_death(result: dict, status: int | str, output: str) -> bool:
    """Say in ``result`` what the process that ended with ``status`` was doing; False: nothing."""
    running = result.pop("running", None)
    if not running:
        return False
    died = f"{DIED}: exit status {status}: {output[-200:].strip()}"
    if status == OUT_OF_TIME:
        died = f"{OUT_OF_TIME} while it ran"
    if "name" not in running:
        result["step_errors"][running["step"]] = died
        result["step_seconds"][running["step"]] = None
        return True
    hung = "Timeout (" in output  # faulthandler's word
    how = f"{HUNG} for {running['limit']:.0f} s" if hung else died
    for row in rows_of(result):
        same = all(row.get(k) == running["row"].get(k) for k in IDENTITY)
        if same and running["name"] in row["runs"]:
            row["runs"][running["name"]] = {"error": how}
    result["lost"].append({"row": running["row"], "name": running["name"], "how": how})
    return True


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
