"""Texts to vectors on a GPU: ``fastenc.Encoder``, with CUDA graphs and without, beside
sentence-transformers, or where it is not installed its loop in plain transformers (sorted by
characters, 32 texts a batch, padded)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

import fastenc
from bench.gpu_record import Found, Record
from bench.gpu_timing import CUDA, DEVICE, median_of, wall_seconds

TEXTS, LONGEST, ROUNDS = (4096, 250, 3) if CUDA else (6, 12, 1)
MINILM = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 12,
}  # fmt: skip
TOY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
WORDS = 2000


def texts() -> list[str]:
    """Of mixed length, 1 to LONGEST words, most of them short."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.0, 1.0, TEXTS).astype(int), 1, LONGEST)
    return [" ".join(f"w{i}" for i in random.integers(0, WORDS, n)) for n in lengths]


def build() -> tuple[torch.nn.Module, object]:
    """A BERT of MiniLM's shape with random weights, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )
    torch.manual_seed(0)
    config = BertConfig(vocab_size=WORDS + 2, **(MINILM if CUDA else TOY))
    model = BertModel(config, add_pooling_layer=False).eval()
    return model.to(DEVICE, torch.bfloat16 if CUDA else torch.float32), fast


def sorted_and_padded(model, tokenizer) -> Callable[[list[str]], np.ndarray]:
    """sentence-transformers' loop in plain transformers."""

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        out: list[np.ndarray] = [np.empty(0)] * len(texts)
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            given = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt"
            ).to(DEVICE)
            mask = given["attention_mask"]
            hidden = model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(-1).float()
            pooled = (hidden.float() * weight).sum(1) / weight.sum(1)
            for i, row in zip(rows, pooled.cpu().numpy(), strict=True):
                out[i] = row
        return np.stack(out)

    return encode


def measure(record: Record) -> None:
    given = texts()
    tokens = sum(len(text.split()) for text in given)
    built = functools.cache(build)
    encoders: dict[str, Callable[[], Callable[[list[str]], np.ndarray]]] = {
        "fastenc": lambda: fastenc.Encoder(*built()).encode,
        "fastenc, CUDA graphs": lambda: fastenc.Encoder(*built(), cuda_graphs=True).encode,
        "transformers sdpa, sorted and padded": lambda: sorted_and_padded(*built()),
    }
    expected = functools.cache(lambda: sorted_and_padded(*built())(given))
    row = record.row(
        "embedding", model="MiniLM shape, embedding", shape=f"{len(given)} mixed texts",
        tokens=tokens,
    )  # fmt: skip

    def time(factory: Callable[[], Callable], found: Found) -> None:
        encode = factory()
        sample = functools.partial(wall_seconds, lambda: encode(given))
        found["seconds"] = median_of(sample, ROUNDS, record.deadline)
        found["tokens_per_second"] = tokens / found["seconds"]
        found["difference"] = float(np.abs(encode(given) - expected()).max())

    for name, factory in encoders.items():
        record.run(row, name, functools.partial(time, factory))
    runs = row["runs"].items()
    rates = (f"{n} {r.get('tokens_per_second', 0) / 1e6:.3f}M tokens/s" for n, r in runs)
    print(f"{row['model']} {row['shape']}: {' | '.join(rates)}", flush=True)
