"""A training step of ModernBERT on a GPU (forward, backward, fused AdamW) and its peak memory, and
the peak memory of inference, beside transformers' sdpa."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastenc
from bench.gpu_models import RAGGED, SIZES, batch, build, config_of, flops, line, rates
from bench.gpu_record import OURS, PEERS, Found, Record, of_kinds
from bench.gpu_timing import CUDA, DEVICE, free_memory, timed


@dataclass(frozen=True)
class Row:
    name: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


TRAINING = (
    (Row("32x512", (512,) * 32), Row("64 ragged to 512", RAGGED[:64]), Row("2x8192", (8192,) * 2))
    if CUDA
    else (Row("ragged", (3, 6)),)
)
INFERENCE = (Row("4x8192", (8192,) * 4),) if CUDA else (Row("2x5", (5, 5)),)


def peak(run: Callable[[], object]) -> int | None:
    """Bytes allocated above what was there before, at most, while ``run`` runs."""
    if not CUDA:
        run()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def trainer(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], float]:
    """One step: bf16 autocast over fp32 parameters, a loss over real tokens, fused AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
    weight = inputs["attention_mask"].unsqueeze(-1).float()

    def step() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            hidden = model(**inputs).last_hidden_state
        loss = (hidden.float().square() * weight).sum() / weight.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def step_of(size: str, name: str, inputs: dict, training: bool) -> Callable[[], object]:
    """A training step or a forward of a copy of the model, accelerated for the run "fastenc"."""
    twin = copy.deepcopy(build(size))
    if name == "fastenc":
        fastenc.accelerate(twin)
    if training:
        return trainer(twin.float(), inputs)
    twin = twin.eval()

    @torch.inference_mode()
    def run() -> object:
        return twin(**inputs).last_hidden_state

    return run


def measure_row(record: Record, size: str, row: Row, training: bool, kinds: tuple[str, ...]):
    config = config_of(size)
    floor = flops(config, row) * (3 if training else 1) / record.result["ceilings"]["matrix_bf16"]
    kind = "training step" if training else "inference, peak memory"
    done = record.row(
        "training", model=f"ModernBERT-{size}, {kind}", shape=row.name, tokens=row.tokens,
        floor_seconds=floor,
    )  # fmt: skip
    inputs = functools.cache(lambda: batch(row, config.vocab_size))
    runs = of_kinds(dict.fromkeys(("fastenc", "transformers sdpa"), step_of), kinds)
    for name in runs:

        def call(found: Found, name=name) -> None:
            step = step_of(size, name, inputs(), training)
            with fastenc.record() as ran:
                first = step()
                if training:
                    found["loss"] = first.item()
            del first
            found |= {"peak_bytes": peak(step), "fallbacks": ran.fallbacks}
            found |= vars(timed([step], rounds=7, graph=False))
            rates(row.tokens, floor, found)

        record.run(done, name, call)
        free_memory()
    print(line(done, runs), flush=True)


def measure(record: Record) -> None:
    for kinds in ((OURS,), (PEERS,)):
        for size in SIZES:
            for training, rows in ((False, INFERENCE), (True, TRAINING)):
                for row in rows:
                    measure_row(record, size, row, training, kinds)
