"""The two comparisons of the demo: what runs, what it must equal, how it is timed.

Every run embeds the same texts, tokenisation included, after a warm-up on the shortest. Rounds are
interleaved, because machines change speed, and medians are reported; the vectors of the first round
are compared. On a slow or busy machine there are fewer rounds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import fastenc
from bench import measure

Embed = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Plan:
    """At most ``rounds`` timed rounds, and none begun that would end past ``seconds``, but one.

    ``step`` is called before each run, with what comes.
    """

    rounds: int
    seconds: float
    step: Callable[[str], None]


@dataclass
class Comparison:
    """Seconds of each run in each round, its largest difference from ``reference``, what ran."""

    title: str
    reference: str
    texts: int
    tokens: int
    batches: dict[str, str]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def scope(self) -> str:
        """How much was embedded, how often."""
        rounds = len(self.seconds["fastenc"])
        often = "one round" if rounds == 1 else f"medians of {rounds} rounds"
        return f"{self.texts} texts, {self.tokens:,} tokens, {often}"

    def rate(self, name: str) -> float:
        """Real tokens a second, padding not counted: the median of the rounds."""
        return self.tokens / measure.median(self.seconds[name])

    def ratio(self, name: str) -> float:
        """fastenc's rate over this one's: the median of the rounds' own ratios."""
        pairs = zip(self.seconds[name], self.seconds["fastenc"], strict=True)
        return measure.median([theirs / ours for theirs, ours in pairs])

    def as_json(self) -> dict[str, Any]:
        rates = {name: round(self.rate(name), 1) for name in self.seconds}
        ratios = {name: round(self.ratio(name), 3) for name in self.seconds}
        return asdict(self) | {"tokens_per_second": rates, "fastenc_over": ratios}


def compare(
    comparison: Comparison, runs: dict[str, Embed], texts: list[str], plan: Plan
) -> dict[str, np.ndarray]:
    """Fill ``comparison``; returns each run's vectors."""
    begun = time.perf_counter()
    warm_up = sorted(texts, key=len)[:4]
    for embed in runs.values():
        embed(warm_up)
    vectors: dict[str, np.ndarray] = {}
    comparison.seconds = {name: [] for name in runs}
    names = list(runs)
    for i in range(plan.rounds):
        round_took = sum(took[-1] for took in comparison.seconds.values() if took)
        if i > 0 and time.perf_counter() - begun + round_took > plan.seconds:
            break
        for name in names:
            plan.step(f"{name}, round {i + 1} of {plan.rounds}")
            with fastenc.record() as ran:
                start = time.perf_counter()
                found = runs[name](texts)
                comparison.seconds[name].append(time.perf_counter() - start)
            vectors.setdefault(name, found)
            if name == "fastenc":
                comparison.calls, comparison.fallbacks = ran.calls, ran.fallbacks
        names.reverse()
    exact = vectors[comparison.reference]
    comparison.difference = {n: float(np.abs(vectors[n] - exact).max()) for n in runs}
    return vectors


def minilm(
    folder: str, texts: list[str], plan: Plan
) -> tuple[Comparison, np.ndarray, fastenc.Encoder]:
    """Real MiniLM weights, beside sentence-transformers with its default batches."""
    from sentence_transformers import SentenceTransformer

    encoder = fastenc.Encoder(folder)
    theirs = SentenceTransformer(folder, device="cpu")
    comparison = Comparison(
        "all-MiniLM-L6-v2, real weights",
        "sentence-transformers",
        len(texts),
        count_tokens(encoder.tokenizer, texts, encoder.max_length),
        {
            "fastenc": "tokens packed, no padding",
            "sentence-transformers": "32 texts, sorted by characters, padded",
        },
    )
    runs = {
        "fastenc": lambda given: encoder.encode(given, show_progress=False),
        "sentence-transformers": lambda given: theirs.encode(given, show_progress_bar=False),
    }
    vectors = compare(comparison, runs, texts, plan)["fastenc"]
    return comparison, vectors, encoder


PADDED = 8
"""Texts in a padded batch of transformers."""


def modernbert(
    folder: str | None, tokenizer: Any, texts: list[str], layers: int, plan: Plan
) -> Comparison:
    """ModernBERT-base beside transformers on the same weights, mean-pooled.

    Without a folder: random weights, and token ids of the given ``tokenizer``, which must stay
    below ModernBERT's vocabulary of 50368.
    """
    if folder is None:
        from bench.models import modernbert_base

        model, title = modernbert_base(layers), "ModernBERT-base shape, random weights"
    else:
        from transformers import AutoTokenizer, ModernBertModel

        model = ModernBertModel.from_pretrained(folder).eval()
        tokenizer, title = AutoTokenizer.from_pretrained(folder), "ModernBERT, real weights"
    ours = fastenc.nn.prepack(copy.deepcopy(model))
    encoder = fastenc.Encoder(ours, tokenizer, max_length=512)
    comparison = Comparison(
        f"{title}, {model.config.num_hidden_layers} layers",
        "transformers sdpa, sorted",
        len(texts),
        count_tokens(tokenizer, texts, encoder.max_length),
        {
            "fastenc": "tokens packed, no padding",
            "transformers sdpa, sorted": f"{PADDED} texts, sorted by length, padded",
            "transformers sdpa": f"{PADDED} texts, as they come, padded",
            "transformers eager": f"{PADDED} texts, as they come, padded",
        },
    )

    def padded(attention: str, by_length: bool) -> Embed:
        def embed(given: list[str]) -> np.ndarray:
            model.set_attn_implementation(attention)
            return embed_padded(model, tokenizer, given, encoder.max_length, by_length)

        return embed

    runs = {
        "fastenc": lambda given: encoder.encode(given, show_progress=False),
        "transformers sdpa, sorted": padded("sdpa", True),
        "transformers sdpa": padded("sdpa", False),
        "transformers eager": padded("eager", False),
    }
    compare(comparison, runs, texts, plan)
    return comparison


@torch.inference_mode()
def embed_padded(
    model: torch.nn.Module, tokenizer: Any, texts: list[str], limit: int, by_length: bool
) -> np.ndarray:
    """Mean-pooled vectors from padded batches of 8, as transformers' users write it."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if by_length else None
    rows: list[np.ndarray] = [np.empty(0)] * len(texts)
    for places in _chunks(order or list(range(len(texts)))):
        given = tokenizer(
            [texts[i] for i in places],
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        ids, mask = given["input_ids"], given["attention_mask"]
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        for i, row in zip(places, pooled.float().numpy(), strict=True):
            rows[i] = row
    return np.stack(rows)


def _chunks(places: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(places), PADDED):
        yield places[start : start + PADDED]


def count_tokens(tokenizer: Any, texts: list[str], limit: int) -> int:
    given = tokenizer(texts, truncation=True, max_length=limit)
    return sum(map(len, given["input_ids"]))
