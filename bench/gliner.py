"""GLiNER beside the gliner package: ``python -m bench.gliner`` (``--toy``: small, not written;
``--row training``: only rows whose name has that).

Every row runs all peers interleaved, round by round, in one process; figures are medians. Entities
are compared before anything is timed. Writes bench/results/<machine>/gliner-<date>.json, a few
minutes on two quiet cores.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import gliner_models as models
from bench import measure


@dataclass(frozen=True)
class Row:
    """One comparison: ``words`` of each text, read with the first ``labels`` labels."""

    name: str
    words: tuple[int, ...]
    labels: int = 5
    hidden: int = 512
    encoder: str = "deberta"
    layers: int = 6
    mode: str = "markerV0"
    rounds: int = 5
    others: bool = False


SKEWED = (384, 384, 200, 120, 80, 60, *(range(50, 24, -1)))
ROWS = (
    Row("1 text of 384 words, D 512", (384,), others=True),
    Row("1 text of 384 words, D 768", (384,), hidden=768),
    Row("1 text of 40 words, D 512", (40,), rounds=9, others=True),
    Row("32 texts of skewed lengths, D 512", SKEWED, rounds=1),
    Row("1 text of 384 words, Ettin-32m", (384,), encoder="ettin", layers=10),
    Row("token level, 1 text of 384 words, 25 labels", (384,), 25, mode="token_level"),
)
TOY = (
    Row("toy spans", (30, 7), layers=1, rounds=1, others=True),
    Row("toy tokens", (20,), 3, layers=1, mode="token_level", rounds=1),
)


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds; what is compared has run once already."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            samples[name].append(measure.seconds(runs[name]))
        order.reverse()
    return {name: measure.median(x) for name, x in samples.items()}


def difference(found: list, expected: list) -> dict[str, float]:
    """How far two results are apart: entities not in both, and the largest score difference."""
    a, b = ({(i, e["start"], e["end"], e["label"]): e["score"] for i, one in enumerate(x)
             for e in one} for x in (found, expected))  # fmt: skip
    both = a.keys() & b.keys()
    return {
        "entities": len(b),
        "not_in_both": len(a.keys() ^ b.keys()),
        "score": max((abs(a[k] - b[k]) for k in both), default=0.0),
    }


def as_result(row: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    base = seconds["gliner"]
    return {**row, "seconds": seconds, "ahead": {n: base / s for n, s in seconds.items()}}


# ---- whole calls ---------------------------------------------------------------------------------


def peers_of(model: Any, folder: Path, row: Row, failures: dict[str, str]) -> dict[str, Any]:
    """{peer: model}; those that do not run are named in ``failures``."""
    import fastenc

    def onnx() -> Any:
        from gliner import GLiNER

        model.export_to_onnx(folder)
        return GLiNER.from_pretrained(str(folder), runtime="onnxruntime")

    def int8() -> Any:
        quantised = copy.deepcopy(model)
        quantised.quantize("int8")
        return quantised

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, safe_serialization=True)
    found = {
        "gliner": model,
        "fastenc": fastenc.GLiNER.from_pretrained(folder),
        "accelerate(gliner)": fastenc.accelerate(copy.deepcopy(model), prepack=True),
    }
    for name, make in (("gliner int8", int8), ("gliner ONNX", onnx)) if row.others else ():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = make()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def run_row(row: Row) -> dict[str, Any]:
    import fastenc

    encoder = models.DEBERTA_V3 if row.encoder == "deberta" else models.ETTIN_32M
    model = models.their_model(encoder, row.layers, row.hidden, span_mode=row.mode)
    texts = [models.text(n, i) for i, n in enumerate(row.words)]
    labels = list(models.LABELS[: row.labels])
    threshold = models.threshold_of(model, texts, labels)
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        peers = peers_of(model, Path(folder), row, failures)
        runs, outputs, errors = {}, {}, {}
        for name, peer in peers.items():
            options = {"threshold": threshold}
            if name.startswith(("gliner", "accelerate")):
                options["batch_size"] = len(texts)
            runs[name] = lambda peer=peer, options=options: peer.inference(texts, labels, **options)
            try:
                with fastenc.record() as ran:
                    outputs[name] = runs[name]()
                if name in ("fastenc", "accelerate(gliner)") and ran.fallbacks:
                    raise RuntimeError(f"fell back: {ran.fallbacks}")
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"[:300]
                runs.pop(name)
        errors = {n: difference(x, outputs["gliner"]) for n, x in outputs.items()}
        for name in ("fastenc", "accelerate(gliner)"):
            if errors[name]["not_in_both"] or errors[name]["score"] > 1e-3:
                raise RuntimeError(f"{row.name}: {name} is not gliner's: {errors[name]}")
        seconds = timed(runs, row.rounds)
    return as_result(
        {"name": row.name, "threshold": threshold, "differences": errors, "failures": failures},
        seconds,
    )


# ---- the head alone, and a training step ---------------------------------------------------------


def folded_in_torch(layer: torch.nn.Module, words: Tensor, prompts: Tensor, width: int) -> Tensor:
    """The folded head without a kernel (as gliner2 does): one (words, max_width, 4D) tensor."""
    first, last = layer.out_project[0], layer.out_project[3]
    d, n = words.shape[-1], words.shape[0]
    start = F.linear(layer.project_start(words).relu(), first.weight[:, :d])
    end = F.linear(layer.project_end(words).relu(), first.weight[:, d:], first.bias)
    ends = (torch.arange(n)[:, None] + torch.arange(width)).clamp(max=n - 1)
    spans = (start[:, None] + end[ends]).relu_()
    return spans @ (prompts @ last.weight).T + prompts @ last.bias


def head_alone(words: int, hidden: int, labels: int, rounds: int) -> dict[str, Any]:
    """Span representations and scores of one text, word vectors and prompts given."""
    from gliner.modeling.span_rep import SpanMarkerV0

    from fastenc.models._gliner_heads import Words, span_logits

    torch.manual_seed(0)
    width = 12
    layer = SpanMarkerV0(hidden, width, dropout=0.4).eval()
    x, prompts = torch.randn(words, hidden), torch.randn(labels, hidden)
    spans = torch.tensor(
        [[(i, i + w if i + w < words else i) for i in range(words) for w in range(width)]]
    )
    packed = Words(x, torch.tensor([0, words], dtype=torch.int32), [words])
    runs = {
        "gliner": lambda: torch.einsum("blkd,cd->blkc", layer(x[None], spans), prompts)[0],
        "folded, plain PyTorch": lambda: folded_in_torch(layer, x, prompts, width),
        "fastenc": lambda: span_logits(layer, packed, prompts[None], width),
    }
    with torch.inference_mode():
        outputs = {name: run() for name, run in runs.items()}
        valid = outputs["fastenc"] > float("-inf")
        errors = {
            name: (out - outputs["gliner"])[valid].abs().max().item()
            for name, out in outputs.items()
        }
        seconds = timed(runs, rounds)
    layer.train()
    memory = {}
    for name, run in runs.items():
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            run()
        memory[name] = sum(n for place, n in kept.items() if place not in own) / 2**20
    return as_result(
        {"name": f"head alone, {words} words, {labels} labels, D {hidden}",
         "differences": errors, "kept_for_backward_mib": memory}, seconds
    )  # fmt: skip


def training_step(words: int, layers: int, rounds: int) -> dict[str, Any]:
    """Forward, gliner's focal loss and backward of one text with 5 labels, dropout on.

    The floor is the products of the linear layers as fastenc runs them and those of the attention,
    at the rate of a linear layer: no LSTM, no elementwise kernel.
    """
    import fastenc

    model = models.their_model(models.DEBERTA_V3, layers, 512)
    fast = fastenc.accelerate(copy.deepcopy(model))
    tokens = models.text(words).split()
    ner = [[i, i + i % 3, models.LABELS[i % 5]] for i in range(0, words - 3, 9)]
    collator = model.data_collator_class(model.config, data_processor=model.data_processor)
    labels = [list(models.LABELS[:5])]
    batch = collator([{"tokenized_text": tokens, "ner": ner}], entity_types=labels)

    def step(m: Any) -> float:
        m.zero_grad(set_to_none=True)
        loss = m.model(**batch, alpha=0.75, gamma=2.0, reduction="mean").loss
        loss.backward()
        return loss.item()

    losses = {"gliner": step(model), "fastenc": step(fast)}
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.fastenc.linear_fwd: _flops})
    with counter:
        step(fast)
    flops = counter.get_total_flops() + _attention_flops(model.config.encoder_config, batch)
    if abs(losses["gliner"] - losses["fastenc"]) > 1e-3 * abs(losses["gliner"]):
        raise RuntimeError(f"training step: losses differ in evaluation mode: {losses}")
    model.train()
    fast.train()
    seconds = timed({"gliner": lambda: step(model), "fastenc": lambda: step(fast)}, rounds)
    row = {"name": f"training step, {words} words", "losses": losses,
           "floor_seconds": flops / measure.sgemm_rate()}  # fmt: skip
    return as_result(row, seconds)


def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def _attention_flops(config: Any, batch: dict[str, Tensor]) -> int:
    """Two products and two position terms a pair of tokens, and 2.5 times that backward."""
    pairs = batch["attention_mask"].sum(1).square().sum().item()
    return int(3.5 * 8 * pairs * config.hidden_size * config.num_hidden_layers)


def show(row: dict[str, Any]) -> None:
    parts = [f"{name} {s * 1e3:.1f} ms ({row['ahead'][name]:.2f}x)"
             for name, s in row["seconds"].items()]  # fmt: skip
    if "floor_seconds" in row:
        parts.append(f"floor {row['floor_seconds'] * 1e3:.1f} ms")
    print(f"{row['name']}: {', '.join(parts)}", flush=True)
    for name, why in row.get("failures", {}).items():
        print(f"  {name} did not run: {why}", flush=True)


def steps(
    rows: tuple[Row, ...], words: int, hidden: int, layers: int, rounds: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """{name: what measures it}, in the order of the tables."""
    return {
        "head": lambda: head_alone(words, hidden, 10, rounds),
        **{row.name: lambda row=row: run_row(row) for row in rows},
        "training": lambda: training_step(words, layers, max(1, rounds // 2)),
    }


def main(
    toy: Annotated[bool, typer.Option(help="toy sizes, nothing is written")] = False,
    row: Annotated[list[str] | None, typer.Option(help="only these, by part of the name")] = None,
) -> None:
    """Rows that are not asked for stay as an earlier run left them, with its commit and date."""
    if toy:
        small = tuple(replace(row, hidden=64) for row in TOY)
        for measured in steps(small, 24, 64, 1, 1).values():
            show(measured())
        return
    stamp = measure.stamp()
    folder = measure.RESULTS / stamp["machine"]["name"]
    path = folder / f"gliner-{stamp['date']}.json"
    known = steps(ROWS, 384, 512, 6, 5)
    new = []
    for name, measured in known.items():
        if not row or any(part in name for part in row):
            new.append(measured() | {"commit": stamp["commit"], "date": stamp["date"]})
            show(new[-1])
            measure.write_json(path, {**stamp, "gliner": merged(earlier_rows(folder), new, known)})
    print(path)


def earlier_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the newest file of ``folder``, each with the date of its measurement."""
    kept = measure.newest(folder, "gliner-*.json")
    return [{"date": kept["date"], **each} for each in kept.get("gliner", ())]


def merged(
    old: list[dict[str, Any]], new: list[dict[str, Any]], order: Iterable[str]
) -> list[dict[str, Any]]:
    """``new`` over ``old``: rows of one name are replaced, others stay; as ``order`` has them.

    Rows whose names begin with nothing in ``order`` are of benchmarks that are no more: dropped.
    """
    rows = {each["name"]: each for each in (*old, *new)}
    found = [[row for name, row in rows.items() if name.startswith(prefix)] for prefix in order]
    return [row for one in found for row in one]


if __name__ == "__main__":
    typer.run(main)
