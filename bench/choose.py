"""``python -m bench.choose RESULTS.json…``: which backend serves an op by default on a GPU.

Reads results of ``bench.gpu`` and writes fastenc/ops/_measured.py: an op goes to Triton on a chip
where the CUDA library took more than 3% longer, geometric mean over the op's shapes and directions.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

TABLE = Path(__file__).parent.parent / "fastenc/ops/_measured.py"
MARGIN = 1.03


def ratios(result: dict) -> dict[tuple[str, str], float]:
    """{(op, chip): time of the CUDA library / time of Triton} of one result of ``bench.gpu``."""
    logs: dict[tuple[str, str], list[float]] = {}
    chip = "sm_" + result["machine"]["capability"].replace(".", "")
    for row in result.get("ops", []):
        times = [row["runs"].get(f"fastenc {b}", {}).get("seconds") for b in ("cuda", "triton")]
        if all(times):
            logs.setdefault((row["op"], chip), []).append(math.log(times[0] / times[1]))
    return {key: math.exp(sum(found) / len(found)) for key, found in logs.items()}


def table_source(table: dict[tuple[str, str], float], current: str) -> str:
    """The text of fastenc/ops/_measured.py with ``table`` in it."""
    head = current[: current.index("FASTER_IN_TRITON")]
    if not table:
        return f"{head}FASTER_IN_TRITON: dict[tuple[str, str], float] = {{}}\n"
    lines = [f'    ("{op}", "{chip}"): {ratio:.2f},' for (op, chip), ratio in sorted(table.items())]
    body = "\n".join(lines)
    return f"{head}FASTER_IN_TRITON: dict[tuple[str, str], float] = {{\n{body}\n}}\n"


def main(paths: list[str]) -> None:
    found: dict[tuple[str, str], float] = {}
    for path in paths:
        found.update(ratios(json.loads(Path(path).read_text())))
    for (op, chip), ratio in sorted(found.items()):
        print(f"{chip} {op}: CUDA / Triton {ratio:.2f}")
    slower = {key: ratio for key, ratio in found.items() if ratio > MARGIN}
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(table_source(slower, TABLE.read_text()))
    temporary.replace(TABLE)


if __name__ == "__main__":
    main(sys.argv[1:])
