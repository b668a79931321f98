"""The measuring part of ``python -m bench.gpu``, a process of its own: it is started after the
library is installed, and again behind a run that took it down.

fastenc and the quick peers of everything come first, what has to be compiled last.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import re
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import fastenc
from bench import gpu_timing, measure
from bench.gpu_record import STEPS, Record, budget, load, out_of_time, rows_of
from bench.gpu_timing import Deadline


def machine() -> dict[str, object]:
    try:
        found: dict[str, object] = {"host": measure.machine()}
    except (ImportError, AttributeError) as error:
        found = {"host": {"error": str(error)}}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": p.name, "multiprocessors": p.multi_processor_count,
            "memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": p.L2_cache_size / 2**20,
            "capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }  # fmt: skip
        name = re.sub(r"[^a-z0-9]+", "-", p.name.lower()).strip("-")
        found["name"] = next((chip for chip in ("h200", "h100", "a100") if chip in name), name)
    else:
        found["name"] = "interpreter"
    return found


def check_backends(backends: dict[str, dict[str, str]]) -> None:
    """Refuse to measure where a GPU would have no Triton kernel: the install is broken."""
    reasons = {reason["triton"] for reason in backends.values()} - {"available"}
    missing = all(reason["triton"] != "available" for reason in backends.values())
    if missing:
        raise RuntimeError(f"Triton serves no op here: {'; '.join(sorted(reasons))}")


def stamp(record: Record) -> None:
    backends = fastenc.backends()
    record.result |= {
        "machine": machine(), "date": datetime.date.today().isoformat(),
        "commit": measure.commit(), "versions": measure.versions(), "backends": backends,
    }  # fmt: skip
    check_backends(backends)
    record.result["ceilings"] = gpu_timing.ceilings()
    print(json.dumps(record.result["ceilings"]), flush=True)


def step(module: str, options: dict, record: Record) -> None:
    importlib.import_module(f"bench.{module}").measure(record, **options)


def take(record: Record, deadline: Deadline, suffix: str) -> None:
    """The steps of STEPS that are not done, each with its share of what is left."""
    done = record.result["step_seconds"]
    shares = {name: of[0] for name, of in STEPS.items() if f"{name}{suffix}" not in done}
    for name in shares:
        _, module, options = STEPS[name]
        seconds = budget(name, shares, deadline.left)
        record.step(f"{name}{suffix}", seconds, functools.partial(step, module, options))


def main(path: Path, seconds: float) -> None:
    record = Record(path, load(path))
    deadline = Deadline(seconds)
    record.step("stamp", seconds, stamp)
    if "ceilings" not in record.result:
        return
    take(record, deadline, "")
    if any(out_of_time(run) for row in rows_of(record.result) for run in row["runs"].values()):
        take(record, deadline, ", again")  # in what other steps have left
    record.result.pop("running", None)
    record.write()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__)
    parser.add_argument("path", type=Path, help="the JSON file that is read and gone on with")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    main(options.path, options.seconds)
