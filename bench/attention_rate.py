"""``python -m bench.attention_rate``: CPU attention as a share of torch's fp32 matrix rate.

Useful FLOPs only (query-key pairs inside the windows, edges counted exactly: at most 129 keys a
query for ModernBERT's +-64), 12 heads of 64, fp32, RoPE included where the op has it. Attention and
the matrix product (2048 x 768 x 2304 through ``F.linear``) run in turn in one process; the share is
the ratio of the medians. ``--cpu-time`` counts the process's CPU time in place of the wall's, which
other work on the machine disturbs less. Memory's share is that of ``torch.addcmul`` on the same q,
k and v: it reads and writes what the forward must, and computes next to nothing. MKL and fastenc
choose their instruction sets by ``MKL_ENABLE_INSTRUCTIONS`` and ``FASTENC_CPU_ISA``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer

import fastenc
from bench import measure
from bench.report import markdown_table
from fastenc import testing

HEADS, HEAD_DIM = 12, 64
GOALS = {"window 64": 0.60, "global": 0.65}
WINDOWS = {"window 64": (64, 64), "global": (-1, -1)}
BATCHES = {"8x128": (128,) * 8, "4x512": (512,) * 4, "1x2048": (2048,), "1x8192": (8192,)}
TOY = {"2x40": (40, 40)}


def calls_of(op: str, lengths: tuple[int, ...], window: tuple[int, int]) -> tuple[Callable, ...]:
    """The forward, the backward, and a pass over the forward's memory, of one row."""
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM)
    packed = testing.cu_seqlens_of(lengths), max(lengths), window
    if op == "rope_varlen_attention":
        tables = testing.rope_tables(max(lengths), HEAD_DIM)
        run = lambda x: fastenc.rope_varlen_attention(x, *tables, *packed)  # noqa: E731
    else:
        run = lambda x: fastenc.varlen_attention(*x.unbind(1), *packed)  # noqa: E731
    leaf = qkv.clone().requires_grad_()
    out = run(leaf)
    grad = torch.randn_like(out)

    def forward():
        with torch.inference_mode():
            run(qkv)

    q, k, v = qkv.unbind(1)
    written = torch.empty_like(grad)
    return (
        forward,
        lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True),
        lambda: torch.addcmul(v, q, k, out=written),
    )


def rates(
    ops: tuple[str, ...], batches: dict[str, tuple[int, ...]], rounds: int, clock: Callable
) -> Iterator[dict[str, object]]:
    """One row a case: op, case, window, shares of the matrix rate and of memory, backward over
    forward."""
    x, w = torch.randn(2048, 768), torch.randn(2304, 768)

    def product():
        with torch.inference_mode():
            torch.nn.functional.linear(x, w)

    for op in ops:
        for name, lengths in batches.items():
            for kind, window in WINDOWS.items():
                forward, backward, memory = calls_of(op, lengths, window)
                runs = {
                    "product": product, "forward": forward, "backward": backward, "memory": memory
                }  # fmt: skip
                samples = measure.interleaved(runs, rounds, 0.02, clock)
                spent = {key: measure.median(times) for key, times in samples.items()}
                rate = 2 * 2048 * 768 * 2304 / spent["product"]
                flops = 4 * testing.useful_pairs(lengths, window) * HEADS * HEAD_DIM
                yield {
                    "op": op,
                    "case": name,
                    "window": kind,
                    "sgemm_gflops": rate / 1e9,
                    "forward_seconds": spent["forward"],
                    "backward_seconds": spent["backward"],
                    "share_of_sgemm": flops / spent["forward"] / rate,
                    "memory_over_forward": spent["memory"] / spent["forward"],
                    "backward_share_of_sgemm": 2.5 * flops / spent["backward"] / rate,
                    "backward_over_forward": spent["backward"] / spent["forward"],
                    "goal": GOALS[kind],
                }


def table(rows: list[dict[str, object]]) -> str:
    head = ["op", "case", "window", "forward ms", "share of sgemm", "goal", "memory / forward",
            "backward / forward", "backward share"]  # fmt: skip
    return markdown_table(
        head,
        [
            [
                r["op"], r["case"], r["window"], f"{r['forward_seconds'] * 1e3:.2f}",
                f"{r['share_of_sgemm']:.2f}", f"{r['goal']:.2f}",
                f"{r['memory_over_forward']:.2f}", f"{r['backward_over_forward']:.2f}",
                f"{r['backward_share_of_sgemm']:.2f}",
            ]
            for r in rows
        ],
    )  # fmt: skip


def main(
    op: Annotated[str, typer.Option(help="varlen_attention too")] = "rope_varlen_attention",
    case: Annotated[str, typer.Option(help="separated by commas")] = ",".join(BATCHES),
    rounds: int = 7,
    cpu_time: Annotated[bool, typer.Option(help="CPU time, not the wall's")] = False,
) -> None:
    batches = {name: BATCHES[name] for name in case.split(",")}
    m = measure.machine()
    clock = time.process_time if cpu_time else time.perf_counter
    rows = list(rates(tuple(op.split(",")), batches, rounds, clock))
    print(table(rows))
    print(
        f"\n{m['cpu']}, {m['threads']} threads, torch on {m['torch_isa']}, fastenc on "
        f"{m['fastenc_isa']}; sgemm {max(r['sgemm_gflops'] for r in rows):.0f} GFLOP/s"
    )


if __name__ == "__main__":
    typer.run(main)
