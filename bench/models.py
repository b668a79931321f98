"""ModernBERT end to end on the CPU: all peers interleaved in one run, beside each row's floor.

The floor, measured in the same run: the linear layers alone at the number of real tokens, plus the
attention's FLOPs (query-key pairs inside the windows, edges counted exactly) at the rate of a
linear layer; both by the product that fastenc takes on this machine. Outputs
are compared before anything is timed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import measure, peers
from fastenc.nn.linear import product
from fastenc.testing import max_error, useful_pairs

RAGGED = (16, 48, 80, 112, 144, 176, 208, 240, 272, 304, 336, 368, 400, 432, 464, 500)


@dataclass(frozen=True)
class Row:
    name: str
    lengths: tuple[int, ...]
    rounds: int = 5


ROWS = (
    Row("8x128", (128,) * 8),
    Row("4x512", (512,) * 4),
    Row("16 ragged 16-500", RAGGED, 3),
    Row("1x2048", (2048,), 3),
    Row("1x8192", (8192,), 1),
)
TOY_ROWS = (Row("2x16", (16, 16), 2), Row("3 ragged", (3, 40, 17), 2))
# Attention scores of (batch, heads, L, L) in fp32, several copies: skipped past this many bytes.
EAGER_LIMIT = 6e9
# Seconds: a peer whose first call, which is compared, takes longer is not called again.
ONCE_PAST = 45.0
KEPT = ("fastenc", "fastenc prepacked")


def modernbert_base(layers: int = 22, vocab_size: int = 50368):
    """A transformers ModernBERT-base with random weights."""
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(num_hidden_layers=layers, vocab_size=vocab_size, **special)
    return ModernBertModel(config).eval()


def padded_batch(lengths: tuple[int, ...], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
    return ids, mask


def linear_layers(model: torch.nn.Module, tokens: int):
    """A call, to be made without gradients, that runs every linear layer of the backbone once on
    ``tokens`` rows.

    They write to memory that is kept, as a model's do: fresh memory alone would cost 5%.
    """
    layers = [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(tokens, m.in_features) for m in layers}
    outputs = {m.out_features: torch.empty(tokens, m.out_features) for m in layers}

    def run():
        for layer in layers:
            product(
                inputs[layer.in_features], layer.weight, layer.bias, outputs[layer.out_features]
            )

    return run


def attention_flops(config, lengths: tuple[int, ...]) -> int:
    head_dim = config.hidden_size // config.num_attention_heads
    half = config.local_attention // 2
    total = 0
    for kind in config.layer_types:
        window = (half, half) if kind == "sliding_attention" else (-1, -1)
        total += 4 * useful_pairs(lengths, window) * config.num_attention_heads * head_dim
    return total


PARTS = ("linear", "attention", "elementwise", "other")
_LINEAR = (
    "aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise", "fastenc::linear_fwd",
    "fastenc::linear_geglu_fwd",
)  # fmt: skip


def part_of(op: str) -> str:
    """The part that an op of torch's profiler belongs to."""
    if op in _LINEAR:
        return "linear"
    if "attention" in op:
        return "attention"
    return "elementwise" if op.startswith("fastenc") else "other"


def breakdown(run) -> dict[str, float]:
    """Seconds of one call by part, from torch's profiler (self CPU time)."""
    parts = dict.fromkeys(PARTS, 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    for event in profile.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e6
    return parts


def build_peers(model, folder: Path, names) -> tuple[dict[str, peers.Runner], dict[str, str]]:
    runners, failures = {}, {}
    for name in names:
        try:
            runners[name] = peers.PEERS[name](model, folder)
        except ImportError:
            raise
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return runners, failures


def checked(
    runners, ids, mask, exact
) -> tuple[dict, dict[str, str], dict[str, float], dict[str, float]]:
    """The runners whose output agrees with ``exact`` on real tokens; failures; largest errors;
    seconds of that first call."""
    good, failures, errors, seconds = {}, {}, {}, {}
    for name, run in runners.items():
        try:
            start = time.perf_counter()
            out = run(ids, mask)
            seconds[name] = time.perf_counter() - start
            if "compile" in name and seconds[name] > ONCE_PAST:  # the first call compiled
                seconds[name] = measure.seconds(lambda run=run: run(ids, mask))
            error = max_error(out[mask.bool()], exact[mask.bool()])
        except Exception as failure:
            failures[name] = f"{type(failure).__name__}: {str(failure)[:200]}"
            continue
        errors[name] = error
        if error < 1e-3:
            good[name] = run
        else:
            failures[name] = f"output differs by {error:.2e}"
    return good, failures, errors, seconds


def run_row(model, runners, row: Row) -> dict[str, object]:
    """Times, ratios, fraction of the floor and the breakdown of one row."""
    ids, mask = padded_batch(row.lengths, model.config.vocab_size)
    tokens = sum(row.lengths)
    longest = max(row.lengths)
    scores = len(row.lengths) * model.config.num_attention_heads * longest**2 * 4
    candidates = {
        name: run
        for name, run in runners.items()
        if name != "transformers eager" or scores < EAGER_LIMIT
    }
    exact = candidates["transformers sdpa"](ids, mask)
    others = {name: run for name, run in candidates.items() if name != "transformers sdpa"}
    good, failures, errors, first = checked(others, ids, mask, exact)
    once = {
        name: t for name, t in first.items() if name in good and t > ONCE_PAST and name not in KEPT
    }
    good = {name: run for name, run in good.items() if name not in once}
    good["transformers sdpa"], errors["transformers sdpa"] = candidates["transformers sdpa"], 0.0
    for name in runners.keys() - candidates.keys():
        failures[name] = f"not run: its scores alone take {scores / 1e9:.0f} GB"
    calls = {name: lambda run=run: run(ids, mask) for name, run in good.items()}
    calls["linear layers"] = linear_layers(model, tokens)
    calls["linear layers"]()
    times = measure.interleaved(calls, row.rounds, warm=False)  # each ran once to be compared
    linear = measure.median(times.pop("linear layers"))
    rate = measure.sgemm_rate()
    floor = linear + attention_flops(model.config, row.lengths) / rate
    medians = {name: measure.median(samples) for name, samples in times.items()} | once
    rivals = {n: t for n, t in medians.items() if not n.startswith("fastenc")}
    best = min(rivals, key=rivals.get)
    return {
        "name": row.name,
        "commit": measure.commit(),
        "tokens": tokens,
        "rounds": row.rounds,
        "once": sorted(once),
        "seconds": medians,
        "tokens_per_second": {name: tokens / t for name, t in medians.items()},
        "failures": failures,
        "errors": errors,
        "linear_seconds": linear,
        "sgemm_gflops": rate / 1e9,
        "floor_seconds": floor,
        "fraction_of_floor": floor / medians["fastenc"],
        "best_peer": best,
        "ahead_of_best_peer": rivals[best] / medians["fastenc"],
        "ahead_of_sdpa": medians["transformers sdpa"] / medians["fastenc"],
        "breakdown": breakdown(calls["fastenc"]),
    }


def train_step(model, folder: Path, lengths, rounds: int = 3) -> dict[str, object]:
    """Forward and backward of a ragged batch, fastenc beside transformers sdpa."""
    import fastenc

    ids, mask = padded_batch(lengths, model.config.vocab_size)
    ours = fastenc.ModernBertModel.from_pretrained(folder).train()
    theirs = type(model).from_pretrained(folder, attn_implementation="sdpa").train()

    def step(m):
        m.zero_grad(set_to_none=True)
        out = m(input_ids=ids, attention_mask=mask).last_hidden_state
        (out[mask.bool()] ** 2).mean().backward()

    times = measure.interleaved(
        {"fastenc": lambda: step(ours), "transformers sdpa": lambda: step(theirs)}, rounds
    )
    medians = {name: measure.median(samples) for name, samples in times.items()}
    return {
        "lengths": list(lengths),
        "seconds": medians,
        "ahead_of_sdpa": medians["transformers sdpa"] / medians["fastenc"],
    }


_PEAK = """
import ctypes, re, sys, torch
sys.path.insert(0, {root!r})
from bench import models, peers
from transformers import ModernBertModel

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

folder = {folder!r}
model = ModernBertModel.from_pretrained(folder)
run = peers.PEERS[{peer!r}](model, folder)
del model
ids, mask = models.padded_batch({lengths!r}, {vocab})
with torch.inference_mode():
    run(ids[:, :8], mask[:, :8])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    before = resident("VmRSS")
    run(ids, mask)
print(resident("VmHWM") - before)
"""


def peak_memory(folder: Path, lengths, vocab_size: int) -> dict[str, float]:
    """MiB that one forward needs above the loaded model, each peer in a process of its own.

    Linux's VmHWM, reset before the forward: getrusage's ru_maxrss is taken over from the parent.
    """
    found = {}
    for peer in ("fastenc", "transformers sdpa"):
        code = _PEAK.format(
            root=str(Path(__file__).parent.parent), folder=str(folder), peer=peer,
            lengths=tuple(lengths), vocab=vocab_size,
        )  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"peak memory of {peer}: {done.stderr[-500:]}")
        found[peer] = int(done.stdout.split()[-1]) / 1024
    return found


def run(
    rows=ROWS,
    layers: int = 22,
    vocab_size: int = 50368,
    names=tuple(peers.PEERS),
    parts=("rows", "training", "memory"),
    keep: Callable[[dict[str, object]], None] = lambda results: None,
    progress=print,
) -> dict[str, object]:
    """The suite, or ``parts`` of it; a missing peer package raises, a peer that fails is reported.

    ``keep`` is called with what there is after every row and part.
    """
    model = modernbert_base(layers, vocab_size)
    whole = TOY_ROWS if rows == TOY_ROWS else ROWS
    results: dict[str, object] = {"layers": layers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        if "rows" in parts:
            with torch.inference_mode():
                runners, results["not_built"] = build_peers(model, folder, names)
                results["rows"] = []
                for row in rows:
                    progress(f"ModernBERT-base {row.name}: {', '.join(runners)}")
                    results["rows"].append(run_row(model, runners, row))
                    keep(results)
            del runners
        if "training" in parts:
            progress("training step")
            results["training"] = train_step(model, folder, whole[min(2, len(whole) - 1)].lengths)
            keep(results)
        if "memory" in parts:
            progress("peak memory")
            row = whole[-1]
            found = peak_memory(folder, row.lengths, vocab_size)
            results["peak_memory"] = {"row": row.name, "mib": found}
            keep(results)
    return results
