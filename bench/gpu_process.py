"""Commands with a time limit, and the processes that they leave ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT_OF_TIME = "out of time"
TERM_SECONDS = 3.0


def end_group(process: subprocess.Popen) -> None:
    """End what is left of the process's group: SIGTERM first, since ninja runs compilers in groups
    of their own and hands that on to them, then SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        until = time.monotonic() + TERM_SECONDS
        while time.monotonic() < until:
            process.poll()  # a dead leader counts until it is waited for
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def run(
    command: list[str], seconds: float, show: bool = False, tail: int = 4000, **environment: str
) -> dict[str, object]:
    """Exit status, wall time and the end of the output of a command; a time-out is recorded.

    ``show``: standard output goes to ours, and standard error alone is recorded. ``tail``: how many
    characters of it.
    """
    start = time.monotonic()
    # A file: a pipe would not end before the last orphan that holds it.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=None if show else output, stderr=output, text=True,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | str = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME
        finally:
            end_group(process)
        output.seek(0)
        text = output.read()
    python = command[0] == sys.executable
    return {
        "command": " ".join(["python", *command[1:]] if python else command),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": text[-tail:],
    }
