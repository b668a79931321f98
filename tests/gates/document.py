"""The generated parts of docs/kernels.md: what was compiled, and which kernel has run on what.

``python tests/gates/document.py`` writes both, the first from the record of the default launches.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "bench" / "results"
CHIPS = ("sm_80", "sm_90")


def sources() -> str:
    """A hash of the kernels that the tables judge."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "triton_kernels").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def between(text: str, marker: str, body: str | None = None) -> str:
    """What lies between ``<!-- marker -->`` and ``<!-- /marker -->``; the whole, if replaced."""
    pattern = rf"(?s)(<!-- {marker} -->\n)(.*?)(<!-- /{marker} -->)"
    if body is None:
        return re.search(pattern, text)[2]
    return re.sub(pattern, lambda m: m[1] + body + m[3], text)


def shown_options(kernel) -> str:
    return ", ".join(
        name if value is True else f"{name} {value}"
        for name, value in kernel.options.items()
        if not isinstance(value, (tuple, str)) and value and name not in ("RAW", "num_stages")
    )


def kernel_table(kernels: list) -> str:
    """A line a default launch: registers a thread, bytes of shared memory and of spills."""
    from triton import __version__

    lines = [
        f"Triton {__version__}, kernels {sources()}.\n",
        "| kernel | chip | dtype | registers | shared | spills | launch |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    rows = {
        f"| {k.name} | {k.chip} | {k.dtype} | {k.registers} | {k.shared} | {k.spills} | "
        f"{shown_options(k)} |"
        for k in kernels
    }
    return "\n".join([*lines, *sorted(rows)]) + "\n"


def runs(results: Path = RESULTS) -> dict[str, set[str]]:
    """{op: GPUs on which ``python -m bench.gpu`` timed its Triton kernel}, as committed."""
    found: dict[str, set[str]] = {}
    for path in sorted(results.glob("*/*.json")):
        record = json.loads(path.read_text())
        machine = record.get("machine") if isinstance(record, dict) else None
        gpu = machine.get("gpu") if isinstance(machine, dict) else None
        for row in record.get("ops", []) if gpu else []:
            if "seconds" in row.get("runs", {}).get("fastenc triton", {}):
                found.setdefault(row["op"], set()).add(f"{gpu} ({record['date']})")
    return found


def status_table(ops: list[str], results: Path = RESULTS) -> str:
    ran = runs(results)
    lines = ["| op | run on a GPU |", "| --- | --- |"]
    lines += [f"| {op} | {', '.join(sorted(ran.get(op, ()))) or 'never'} |" for op in ops]
    return "\n".join(lines) + "\n"


def ops() -> list[str]:
    """The ops that have a Triton kernel."""
    import fastenc

    return [
        name for name in fastenc.backends() if (ROOT / "triton_kernels" / f"{name}.py").exists()
    ]


def main() -> None:
    import launches
    from compiling import compile_calls

    calls = [call for calls in launches.default_calls().values() for call in calls]
    kernels = [k for chip in CHIPS for k in compile_calls(chip, calls, on_record=True)]
    text = between(PAGE.read_text(), "compiled", kernel_table(kernels))
    PAGE.write_text(between(text, "status", status_table(ops())))


if __name__ == "__main__":
    main()
