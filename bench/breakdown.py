"""``python -m bench.breakdown``: where ModernBERT-base's time goes on the CPU, and its floor.

For each row of the end-to-end suite: the floor (the linear layers alone as fastenc runs them, plus
the attention's useful FLOPs at the matrix rate), what fastenc takes, plain and prepacked, all run
in turn in one process; then the parts of one profiled call: linear, attention, elementwise
(fastenc's other kernels), other (torch's other ops), python (between the ops). ``--cpu-time``
counts the process's CPU time, which other work on the machine disturbs less than the wall's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench import measure, models, peers
from bench.report import markdown_table

PARTS = (*models.PARTS, "python")
OURS = ("fastenc", "fastenc prepacked")


def parts_of(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call by part: self CPU time of ops, and what lies between them."""
    spent: list[float] = []
    parts = models.breakdown(lambda: spent.append(measure.seconds(run)))
    return parts | {"python": max(0.0, spent[0] - sum(parts.values()))}


def row_figures(model, runners, row: models.Row, rounds: int, clock) -> dict[str, object]:
    """Floor, times and parts of one row."""
    ids, mask = models.padded_batch(row.lengths, model.config.vocab_size)
    tokens = sum(row.lengths)
    calls = {name: lambda run=run: run(ids, mask) for name, run in runners.items()}
    calls["linear layers"] = models.linear_layers(model, tokens)
    calls["matrix rate"] = measure.matrix_product()
    times = measure.interleaved(calls, rounds, clock=clock)
    spent = {name: measure.median(samples) for name, samples in times.items()}
    rate = measure.MATRIX_FLOPS / spent.pop("matrix rate")
    linear = spent.pop("linear layers")
    floor = linear + models.attention_flops(model.config, row.lengths) / rate
    return {
        "name": row.name,
        "tokens": tokens,
        "floor_seconds": floor,
        "linear_seconds": linear,
        "sgemm_gflops": rate / 1e9,
        "seconds": spent,
        "fraction_of_floor": {name: floor / t for name, t in spent.items()},
        "parts": {name: parts_of(calls[name]) for name in runners},
    }


def table(figures: list[dict]) -> str:
    head = [
        "row",
        "how",
        "floor ms",
        "ms",
        "floor / measured",
        *PARTS,
        "elementwise / linear layers",
    ]
    rows = []
    for f in figures:
        for name, parts in f["parts"].items():
            rows.append(
                [
                    f["name"], name, f"{f['floor_seconds'] * 1e3:.0f}",
                    f"{f['seconds'][name] * 1e3:.0f}", f"{f['fraction_of_floor'][name]:.2f}",
                    *(f"{parts[part] * 1e3:.1f}" for part in PARTS),
                    f"{parts['elementwise'] / f['linear_seconds']:.1%}",
                ]
            )  # fmt: skip
    return markdown_table(head, rows)


def run(rows, rounds: int, clock, layers: int = 22, vocab_size: int = 50368) -> list[dict]:
    model = models.modernbert_base(layers, vocab_size)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        runners = {name: peers.PEERS[name](model, Path(folder)) for name in OURS}
        return [row_figures(model, runners, row, rounds, clock) for row in rows]


def main(
    row: Annotated[str, typer.Option(help="part of a row's name; all rows by default")] = "",
    rounds: int = 3,
    cpu_time: Annotated[bool, typer.Option(help="CPU time, not the wall's")] = False,
) -> None:
    rows = [r for r in models.ROWS if row in r.name]
    clock = time.process_time if cpu_time else time.perf_counter
    print(table(run(rows, rounds, clock)))
    m = measure.machine()
    print(f"\n{m['cpu']}, {m['threads']} threads, fastenc on {m['fastenc_isa']}")


if __name__ == "__main__":
    typer.run(main)
