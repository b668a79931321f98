"""ModernBERT base and large end to end on a GPU, beside transformers' sdpa and torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastenc
from bench import gpu_packed_peer
from bench.gpu_timing import CUDA, DEVICE, Deadline, Timing, attempt, timed
from fastenc.testing import useful_pairs

LARGE = {
    "hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28,
    "num_attention_heads": 16,
}  # fmt: skip
TOY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "local_attention": 8,
}  # fmt: skip
SIZES = {"base": {}, "large": LARGE} if CUDA else {"toy": TOY}


@dataclass(frozen=True)
class Row:
    name: str
    lengths: tuple[int, ...]
    compile: bool = False  # the compiled peer costs a minute of compilation a shape
    graph: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


RAGGED = tuple(16 + (37 * i) % 497 for i in range(128))
ROWS = (
    Row("64x512", (512,) * 64, compile=True),
    Row("4x8192", (8192,) * 4),
    Row("128 ragged to 512", RAGGED),
    Row("1x128", (128,), compile=True, graph=True),
)
TOY_ROWS = (Row("2x5", (5, 5), compile=True), Row("ragged", (3, 6)))


def build(settings: dict):
    """transformers' ModernBERT with random weights, bf16 on a GPU."""
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(
        **settings, vocab_size=50368 if CUDA else 64, attn_implementation="sdpa", **special
    )
    model = ModernBertModel(config).eval()
    return model.to(DEVICE, torch.bfloat16) if CUDA else model


def batch(row: Row, vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = len(row.lengths), max(row.lengths)
    ids = torch.randint(5, vocab_size, shape, generator=generator)
    lengths = torch.tensor(row.lengths).view(-1, 1)
    mask = (torch.arange(shape[1]).view(1, -1) < lengths).long()
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def flops(config, row: Row) -> int:
    """Linear layers and attention inside the windows, of the real tokens."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    linear = 2 * row.tokens * (4 * hidden**2 + 3 * hidden * intermediate)
    half = config.local_attention // 2
    total = 0
    for kind in config.layer_types:
        window = (half, half) if kind == "sliding_attention" else (-1, -1)
        total += linear + 4 * useful_pairs(row.lengths, window) * hidden
    return total


def runners(model, row: Row) -> dict[str, Callable[[], Callable]]:
    def ours():
        accelerated = fastenc.accelerate(copy.deepcopy(model))

        def run(inputs):
            with fastenc.use_backend(None if CUDA else "triton"):
                return accelerated(**inputs).last_hidden_state

        return run

    def theirs():
        return lambda inputs: model(**inputs).last_hidden_state

    def theirs_compiled():
        compiled = torch.compile(model, dynamic=False)
        return lambda inputs: compiled(**inputs).last_hidden_state

    def ours_graphed():
        accelerated = fastenc.accelerate(copy.deepcopy(model), cuda_graphs=True)
        return lambda inputs: accelerated(**inputs).last_hidden_state

    def packed_by_hand():
        return lambda inputs: gpu_packed_peer.forward(model, **inputs)

    peers = {"fastenc": ours, "transformers sdpa": theirs, "torch varlen (FA2)": packed_by_hand}
    if row.graph and CUDA:
        peers["fastenc, CUDA graphs"] = ours_graphed
    if row.compile:
        peers["transformers torch.compile"] = theirs_compiled
    return peers


def _time(factory, inputs: dict, exact: torch.Tensor) -> tuple[Timing, float, list[str]]:
    """Time of a call as a user makes it (no graph), the largest difference on real tokens, and
    what fell back."""
    run = factory()
    real = inputs["attention_mask"].bool()
    with torch.inference_mode(), fastenc.record() as ran:
        difference = (run(inputs).float() - exact.float())[real].abs().max().item()
        timing = timed([lambda: run(inputs)], rounds=9, graph=False)
    return timing, difference, ran.fallbacks


def measure_row(size: str, model, row: Row, ceilings: dict, deadline: Deadline) -> dict:
    inputs = batch(row, model.config.vocab_size)
    with torch.inference_mode():
        exact = model(**inputs).last_hidden_state
    floor = flops(model.config, row) / ceilings["matrix_bf16"]
    runs: dict[str, dict] = {}
    for name, factory in runners(model, row).items():
        if deadline.left <= 0:
            runs[name] = {"error": "out of time"}
            continue
        extra: dict[str, object] = {}

        def call(factory=factory, extra=extra) -> Timing:
            timing, extra["difference"], extra["fallbacks"] = _time(factory, inputs, exact)
            return timing

        runs[name] = {**attempt(call), **extra}
        if "seconds" in runs[name]:
            seconds = runs[name]["seconds"]
            runs[name]["tokens_per_second"] = row.tokens / seconds
            runs[name]["floor_over_measured"] = floor / seconds
    return {
        "model": f"ModernBERT-{size}", "shape": row.name, "tokens": row.tokens,
        "floor_seconds": floor, "runs": runs,
    }  # fmt: skip


def measure(ceilings: dict[str, float], deadline: Deadline) -> list[dict]:
    results = []
    for size, settings in SIZES.items():
        model = build(settings)
        for row in ROWS if CUDA else TOY_ROWS:
            try:
                results.append(measure_row(size, model, row, ceilings, deadline))
            except Exception as error:
                text = f"{type(error).__name__}: {str(error)[:300]}"
                results.append({"model": f"ModernBERT-{size}", "shape": row.name, "error": text})
            print(line(results[-1]), flush=True)
        del model
        if CUDA:
            torch.cuda.empty_cache()
    return results


def line(record: dict) -> str:
    head = f"{record['model']} {record['shape']}"
    if "error" in record:
        return f"{head}: {record['error']}"
    shown = [
        f"{name} {run['tokens_per_second'] / 1e6:.3f}M tokens/s ({run['floor_over_measured']:.0%})"
        if "seconds" in run
        else f"{name}: {run['error'].splitlines()[0][:60]}"
        for name, run in record["runs"].items()
    ]
    return f"{head}: " + " | ".join(shown)
