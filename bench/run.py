"""``make bench``: every figure of docs/benchmarks.md, from one command.

Runs the ops' pytest-benchmarks and the end-to-end suite, writes
``bench/results/<machine>/<date>.json`` and regenerates docs/benchmarks.md with its plots.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from bench import measure, models, report

OPS = (
    "geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention", "rope_varlen_attention",
    "linear",
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


def main(quick: bool = typer.Option(False, help="toy sizes, nothing is written")) -> None:
    results = {**measure.stamp()}
    if quick:
        results["modernbert"] = models.run(models.TOY_ROWS, layers=2, vocab_size=1000)
        results["ops"] = op_figures(True)
        print(report.tables(results))
        return
    results["modernbert"] = models.run()
    results["ops"] = op_figures(False)
    path = measure.RESULTS / results["machine"]["name"] / f"{results['date']}.json"
    measure.write_json(path, results)
    report.write_docs()
    print(path)


if __name__ == "__main__":
    typer.run(main)
