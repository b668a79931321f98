"""Compiles every launch that is not on record, one target after another, and drops the readings of
launches that are no more.

``python tests/gates/compile_all.py sm_90 sm_80``: these targets, else all. It may be stopped at any
time and goes on where it was. ``--reverse``: from the end, for a second process beside the first.
``--count`` compiles nothing and says what is on record.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import tempfile
import time

import compiling
import launches
import torch
import triton

BATCH = 16  # so many are disassembled together


def distinct_launches(chip: str) -> dict[str, tuple]:
    """By digest: (kernel, grid, arguments, options) of all that the ops can launch on ``chip``."""
    found: dict[str, tuple] = {}

    def launch(kernel, grid, *args, **options):
        def known(specialisation: str) -> bool:
            key = compiling.digest_of(chip, kernel, specialisation)
            found.setdefault(key, (kernel, grid, args, options))
            return True

        compiling.build(kernel, grid, args, options, known)

    with compiling.target(chip, launch, every_candidate=True):
        for call in itertools.chain(launches.all_calls(), *launches.default_calls().values()):
            call()
    return found


def compile_missing(chip: str, reverse: bool) -> int:
    """How many could not be compiled."""
    jobs, record, failed = distinct_launches(chip), compiling.record_of(chip), 0
    begun = time.time()
    pending: dict[str, object] = {}

    def read_pending() -> None:
        if not pending:
            return
        readings = [reading for reading, _ in compiling.read(chip, [*pending.values()])]
        names = [compiling.name_of(jobs[key][0]) for key in pending]
        record.add(dict(zip(pending, zip(names, readings, strict=True), strict=True)))
        pending.clear()
        print(f"{chip} {len(record.readings)}, {time.time() - begun:.0f} s", flush=True)

    try:
        for key in sorted(jobs, reverse=reverse):
            record.load()
            if record.get(key) is not None:
                continue
            try:
                with compiling.target(chip, None):
                    pending[key] = compiling.build(*jobs[key], lambda _: False)
            except Exception as error:
                failed += 1
                kernel, _, _, options = jobs[key]
                print(f"{chip} {kernel.fn.__name__} {options}: {str(error)[:300]}", flush=True)
            if len(pending) == BATCH:
                read_pending()
    finally:
        read_pending()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", choices=[[], *compiling.TARGETS], metavar="TARGET")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # after reading what is compiled
    failed = 0
    for chip in options.chips or compiling.TARGETS:
        if not options.count:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                failed += compile_missing(chip, options.reverse)
        keys, record = distinct_launches(chip), compiling.record_of(chip)
        if not options.count:
            record.keep(keys)
        known = sum(key in record.readings for key in keys)
        stale = len(record.readings) - known
        print(
            f"Triton {triton.__version__}, {chip}: {known} of {len(keys)} on record, {stale} stale"
        )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
