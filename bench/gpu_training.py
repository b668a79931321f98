"""A training step of ModernBERT on a GPU (forward, backward, fused AdamW) and its peak memory, and
the peak memory of inference, beside transformers' sdpa."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastenc
from bench.gpu_models import RAGGED, SIZES, batch, build, flops
from bench.gpu_timing import CUDA, DEVICE, Deadline, attempt, timed


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


def measure_row(size: str, model: torch.nn.Module, row: Row, ceilings: dict, training: bool):
    inputs = batch(row, model.config.vocab_size)
    floor = flops(model.config, row) * (3 if training else 1) / ceilings["matrix_bf16"]
    runs: dict[str, dict] = {}
    for name in ("fastenc", "transformers sdpa"):
        twin = copy.deepcopy(model)
        if name == "fastenc":
            fastenc.accelerate(twin)
        if training:
            step = trainer(twin.float(), inputs)
        else:
            twin = twin.eval().to(torch.bfloat16 if CUDA else torch.float32)

            def step(twin=twin) -> object:
                with torch.inference_mode():
                    return twin(**inputs).last_hidden_state

        extra: dict[str, object] = {}

        def call(step=step, extra=extra):
            with fastenc.record() as ran:
                first = step()
                if training:
                    extra["loss"] = first.item()
            del first
            extra |= {"peak_bytes": peak(step), "fallbacks": ran.fallbacks}
            return timed([step], rounds=7, graph=False)

        runs[name] = {**attempt(call), **extra}
        if "seconds" in runs[name]:
            seconds = runs[name]["seconds"]
            runs[name]["tokens_per_second"] = row.tokens / seconds
            runs[name]["floor_over_measured"] = floor / seconds
        del twin, step, call
        if CUDA:
            torch.cuda.empty_cache()
    kind = "training step" if training else "inference, peak memory"
    return {
        "model": f"ModernBERT-{size}, {kind}", "shape": row.name, "tokens": row.tokens,
        "floor_seconds": floor, "runs": runs,
    }  # fmt: skip


def measure(ceilings: dict[str, float], deadline: Deadline) -> list[dict]:
    from bench.gpu_models import line

    results = []
    for size, settings in SIZES.items():
        model = build(settings)
        for training, rows in ((False, INFERENCE), (True, TRAINING)):
            for row in rows:
                if deadline.left <= 0:
                    results.append({"model": size, "shape": row.name, "error": "out of time"})
                    continue
                results.append(measure_row(size, model, row, ceilings, training))
                print(line(results[-1]), flush=True)
        del model
    return results
