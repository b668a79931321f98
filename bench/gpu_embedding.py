"""Texts to vectors on a GPU: ``fastenc.Encoder``, with CUDA graphs and without, beside
sentence-transformers, or where it is not installed its loop in plain transformers (sorted by
characters, 32 texts a batch, padded)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

import fastenc
from bench.gpu_timing import CUDA, DEVICE, Deadline

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


def measure(ceilings: dict[str, float], deadline: Deadline) -> list[dict]:
    given = texts()
    model, tokenizer = build()
    plain = sorted_and_padded(model, tokenizer)
    encoders: dict[str, Callable[[list[str]], np.ndarray]] = {
        "fastenc": fastenc.Encoder(model, tokenizer).encode,
        "fastenc, CUDA graphs": fastenc.Encoder(model, tokenizer, cuda_graphs=True).encode,
        "transformers sdpa, sorted and padded": plain,
    }
    expected = plain(given)
    tokens = sum(len(text.split()) for text in given)
    runs: dict[str, dict] = {name: {"seconds": []} for name in encoders}
    for turn in range(ROUNDS + 1):
        for name, encode in encoders.items():
            if deadline.left <= 0 and turn > 1:
                continue
            start = time.perf_counter()
            vectors = encode(given)
            seconds = time.perf_counter() - start
            runs[name]["difference"] = float(np.abs(vectors - expected).max())
            if turn:  # the first one warms
                runs[name]["seconds"].append(seconds)
    for run in runs.values():
        run["seconds"] = float(np.median(run["seconds"]))
        run["tokens_per_second"] = tokens / run["seconds"]
    record = {
        "model": "MiniLM shape, embedding", "shape": f"{len(given)} mixed texts",
        "tokens": tokens, "runs": runs,
    }  # fmt: skip
    rates = (f"{n} {r.get('tokens_per_second', 0) / 1e6:.3f}M tokens/s" for n, r in runs.items())
    print(f"{record['model']} {record['shape']}: {' | '.join(rates)}", flush=True)
    return [record]
