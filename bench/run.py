"""``make bench``: every figure of docs/benchmarks.md, from one command.

Runs the ops' pytest-benchmarks and the end-to-end suite, writes
``bench/results/<machine>/<date>.json`` and regenerates docs/benchmarks.md with its plots.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench import measure, models, report

OPS = (
    "geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention", "rope_varlen_attention",
    "linear", "disentangled_attention", "span_pool", "span_score", "token_score",
)  # fmt: skip


def op_figures(quick: bool) -> list[dict[str, object]]:
    """One entry a benchmark: op, case, direction, implementation, seconds, floor / measured."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ops.json"
        command = [
            sys.executable, "-m", "pytest", *(f"bench/bench_{op}.py" for op in OPS),
            f"--benchmark-json={out}", "--benchmark-min-rounds=3",
            f"--benchmark-max-time={0.02 if quick else 0.5}", "--benchmark-warmup=on",
            "--benchmark-warmup-iterations=1",
        ]  # fmt: skip
        if quick:
            command += ["-k", "fp32 and fastenc and (512x or 4 or mean)"]
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        benchmarks = json.loads(out.read_text())["benchmarks"]
    figures = []
    for entry in benchmarks:
        parameters = entry["params"]
        figures.append(
            {
                "op": entry["name"].split("[")[0].removeprefix("test_"),
                "case": entry["name"],
                "backward": parameters["backward"],
                "implementation": parameters["name"],
                "seconds": entry["stats"]["median"],
                **entry["extra_info"],
            }
        )
    return figures


def merged(old: dict, new: dict) -> dict:
    """``new`` over ``old``; rows of the same name are replaced, others stay, in ``models.ROWS``'
    order."""
    rows = {row["name"]: row for source in (old, new) for row in source.get("rows", ())}
    order = [row.name for row in models.ROWS]
    found = {**old, **new}
    if rows:
        found["rows"] = sorted(rows.values(), key=lambda row: order.index(row["name"]))
    return found


PARTS = ("rows", "training", "memory", "ops")


def main(
    quick: Annotated[bool, typer.Option(help="toy sizes, nothing is written")] = False,
    row: Annotated[list[str] | None, typer.Option(help="only these, such as 8x128")] = None,
    part: Annotated[list[str] | None, typer.Option(help="rows, training, memory, ops")] = None,
    rounds: Annotated[int, typer.Option(help="of each row, in place of its own number")] = 0,
) -> None:
    """Rows and parts that are not asked for stay as an earlier run left them, with its commit."""
    results = {**measure.stamp()}
    if quick:
        results["modernbert"] = models.run(models.TOY_ROWS, layers=2, vocab_size=1000)
        results["ops"] = op_figures(True)
        print(report.tables(results))
        return
    parts = part or (["rows"] if row else list(PARTS))
    for name, given, known in (
        ("row", row or (), [r.name for r in models.ROWS]),
        ("part", parts, PARTS),
    ):
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"{name}: expected {', '.join(known)}, got {unknown.pop()!r}")
    rows = [r for r in models.ROWS if not row or r.name in row]
    rows = [dataclasses.replace(r, rounds=rounds or r.rounds) for r in rows]
    path = measure.RESULTS / results["machine"]["name"] / f"{results['date']}.json"
    before = measure.newest(path.parent, "20*.json")

    def keep(model: dict) -> None:
        both = {**before, **results}
        both["modernbert"] = merged(before.get("modernbert", {}), model)
        measure.write_json(path, both)

    if "ops" in parts:  # first: plain attention's backward needs the memory that models would hold
        before["ops"] = op_figures(False)
        measure.write_json(path, {**before, **results})
    if set(parts) & {"rows", "training", "memory"}:
        models.run(rows, parts=parts, keep=keep)
    report.write_docs()
    print(path)


if __name__ == "__main__":
    typer.run(main)
