"""ModernBERT base and large end to end on a GPU, beside transformers' sdpa and torch.compile."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastenc
from bench import gpu_packed_peer
from bench.gpu_record import OURS, PEERS, Found, Record, of_kinds, shown
from bench.gpu_timing import CUDA, DEVICE, free_memory, timed
from fastenc.testing import useful_pairs

LARGE = {
    "hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28,
    "num_attention_heads": 16,
}  # fmt: skip
TOY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "local_attention": 8,
}  # fmt: skip
SETTINGS = {"base": {}, "large": LARGE, "toy": TOY}
SIZES = ("base", "large") if CUDA else ("toy",)


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


def config_of(size: str):
    from transformers import ModernBertConfig

    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    return ModernBertConfig(
        **SETTINGS[size], vocab_size=50368 if CUDA else 64, attn_implementation="sdpa", **special
    )


@functools.cache
def build(size: str) -> torch.nn.Module:
    """transformers' ModernBERT with random weights, bf16 on a GPU; shared, so unchanged."""
    from transformers import ModernBertModel

    torch.manual_seed(0)
    config = config_of(size)
    with torch.device(DEVICE):  # weights drawn on a CPU take seconds
        model = ModernBertModel(config).eval()
    return model.to(torch.bfloat16) if CUDA else model


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


def runners(size: str, row: Row) -> dict[str, Callable[[], Callable]]:
    def ours():
        accelerated = fastenc.accelerate(copy.deepcopy(build(size)))

        def run(inputs):
            with fastenc.use_backend(None if CUDA else "triton"):
                return accelerated(**inputs).last_hidden_state

        return run

    def theirs():
        return lambda inputs: build(size)(**inputs).last_hidden_state

    def theirs_compiled():
        torch.compiler.reset()
        compiled = torch.compile(build(size), dynamic=False)
        return lambda inputs: compiled(**inputs).last_hidden_state

    def ours_graphed():
        accelerated = fastenc.accelerate(copy.deepcopy(build(size)), cuda_graphs=True)
        return lambda inputs: accelerated(**inputs).last_hidden_state

    def packed_by_hand():
        return lambda inputs: gpu_packed_peer.forward(build(size), **inputs)

    peers = {"fastenc": ours, "transformers sdpa": theirs, "torch varlen (FA2)": packed_by_hand}
    if row.graph and CUDA:
        peers["fastenc, CUDA graphs"] = ours_graphed
    if row.compile:
        peers["transformers torch.compile"] = theirs_compiled
    return peers


def _time(
    factory: Callable[[], Callable], inputs: dict, expected: Callable, rates: Callable, found: Found
) -> None:
    """Time of a call as a user makes it (no graph), what fell back, and the largest difference on
    real tokens; that last, since it needs transformers' forward too."""
    run = factory()
    real = inputs["attention_mask"].bool()
    with torch.inference_mode(), fastenc.record() as ran:
        out = run(inputs)
        found |= vars(timed([lambda: run(inputs)], rounds=9, graph=False))
    rates(found)
    found["fallbacks"] = ran.fallbacks
    found["difference"] = (out.float() - expected().float())[real].abs().max().item()


def rates(tokens: int, floor: float, found: Found) -> None:
    found["tokens_per_second"] = tokens / found["seconds"]
    found["floor_over_measured"] = floor / found["seconds"]


def measure_row(record: Record, size: str, row: Row, kinds: tuple[str, ...]) -> None:
    config = config_of(size)
    floor = flops(config, row) / record.result["ceilings"]["matrix_bf16"]
    done = record.row(
        "models", model=f"ModernBERT-{size}", shape=row.name, tokens=row.tokens, floor_seconds=floor
    )
    inputs = functools.cache(lambda: batch(row, config.vocab_size))

    @functools.cache
    def expected() -> torch.Tensor:
        with torch.inference_mode():
            return build(size)(**inputs()).last_hidden_state

    for name, factory in (runs := of_kinds(runners(size, row), kinds)).items():

        def call(found: Found, factory=factory) -> None:
            _time(factory, inputs(), expected, functools.partial(rates, row.tokens, floor), found)

        record.run(done, name, call)
    if runs:
        print(line(done, runs), flush=True)


def measure(record: Record, phases: tuple[tuple[str, ...], ...] = ((OURS,), (PEERS,))) -> None:
    for kinds in phases:
        for size in SIZES:
            for row in ROWS if CUDA else TOY_ROWS:
                measure_row(record, size, row, kinds)
                free_memory()


def line(row: dict, names: dict) -> str:
    def figure(run: Found) -> str:
        rate, share = run["tokens_per_second"] / 1e6, run["floor_over_measured"]
        return f"{rate:.3f}M tokens/s ({share:.0%})"

    return f"{row['model']} {row['shape']}: {shown(row, names, figure)}"
