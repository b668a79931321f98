"""GLiNER on a GPU: 32 mixed texts from token ids to span logits, fp16, beside the same weights as
gliner runs them (padded to the longest text, every span built), eager and compiled.

The peer is gliner 0.2.29's markerV0 forward in plain transformers and torch, so that the row needs
no gliner on the GPU machine; tests hold it to fastenc's model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import fastenc
from bench.gpu_timing import CUDA, DEVICE, Deadline, attempt, timed
from fastenc.models._gliner_batch import GLiNERBatch
from fastenc.models._gliner_config import GLiNERConfig

SHAPES = {
    "DeBERTa-v3-small": {"num_hidden_layers": 6},
    "DeBERTa-v3-base": {"num_hidden_layers": 12},
}
DEBERTA = {
    "model_type": "deberta-v2", "hidden_size": 768, "intermediate_size": 3072,
    "num_attention_heads": 12, "vocab_size": 128100, "position_buckets": 256,
    "max_position_embeddings": 512, "max_relative_positions": -1, "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
    "position_biased_input": False, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
}  # fmt: skip
TOY = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 100,
    "num_attention_heads": 2, "position_buckets": 16, "max_position_embeddings": 64,
}  # fmt: skip
LABELS = 5


@dataclass(frozen=True)
class Padded:
    """The peer's inputs: (texts, longest) tokens, and rows of words and labels in them."""

    input_ids: Tensor
    attention_mask: Tensor
    words: Tensor
    labels: Tensor
    lengths: Tensor


def build(settings: dict) -> fastenc.GLiNER:
    """Random weights of a real shape: hidden 512, spans up to 12 words, one BiLSTM layer."""
    torch.manual_seed(0)
    hidden = 512 if CUDA else 16
    config = GLiNERConfig(
        hidden_size=hidden, max_width=12 if CUDA else 4, encoder_config={**DEBERTA, **settings}
    )
    return fastenc.GLiNER(config).eval()


def inputs(model: fastenc.GLiNER, texts: int) -> tuple[GLiNERBatch, Padded]:
    """Texts of 5 to 380 words (5 to 12 at toy size), most of them short, one subtoken a word."""
    random = np.random.default_rng(0)
    longest, middle = (380, 3.6) if CUDA else (12, 2.0)
    lengths = np.clip(random.lognormal(middle, 1.0, texts).astype(int), 5, longest)
    lengths[0] = longest
    vocabulary = model.config.encoder_config.vocab_size
    model.words._around = ([1], [2])
    prompt = [x for i in range(LABELS) for x in (3, 10 + i)]
    places = [2 * i for i in range(LABELS)]
    words = [(int(i),) for i in random.integers(5, vocabulary, lengths.sum())]
    packed = model.words.pack(words, list(map(int, lengths)), [([*prompt, 4], places)] * texts)
    tokens = packed.tokens
    ids = tokens.pad(tokens.input_ids)
    mask = tokens.pad(torch.ones_like(tokens.input_ids))
    starts = tokens.cu_seqlens[:-1].long()
    counts = torch.from_numpy(lengths)
    column = torch.arange(longest).expand(texts, longest)
    padded = Padded(
        ids, mask, column.clamp(max=counts[:, None] - 1) + 2 + len(prompt),
        packed.label_rows - starts[:, None], counts,
    )  # fmt: skip
    moved = {name: x.to(DEVICE) for name, x in vars(padded).items() if name != "lengths"}
    return packed.to(DEVICE), Padded(**moved, lengths=counts)


class PlainGLiNER(nn.Module):
    """gliner's markerV0 forward: padded everywhere, every span's vector built."""

    def __init__(self, model: fastenc.GLiNER) -> None:
        super().__init__()
        from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model

        encoder = model.token_rep_layer.bert_layer.model
        self.encoder = DebertaV2Model(encoder.config)
        self.encoder.load_state_dict(encoder.state_dict())
        self.projection = getattr(model.token_rep_layer, "projection", nn.Identity())
        self.lstm, self.prompts = model.rnn.lstm, model.prompt_rep_layer
        self.spans, self.max_width = model.span_rep_layer.span_rep_layer, model.config.max_width

    def forward(self, given: Padded) -> Tensor:
        """(texts, words, max_width, labels)."""
        hidden = self.encoder(given.input_ids, given.attention_mask).last_hidden_state
        hidden = self.projection(hidden)
        words = _rows(hidden, given.words)
        prompts = self.prompts(_rows(hidden, given.labels))
        packed = nn.utils.rnn.pack_padded_sequence(
            words, given.lengths, batch_first=True, enforce_sorted=False
        )
        words = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
        start, end = self.spans.project_start(words), self.spans.project_end(words)
        count = words.shape[1]
        first = torch.arange(count, device=words.device).repeat_interleave(self.max_width)
        width = torch.arange(self.max_width, device=words.device).repeat(count)
        last = (first + width).clamp(max=count - 1)
        spans = torch.cat([start[:, first], end[:, last]], -1).relu()
        spans = self.spans.out_project(spans).unflatten(1, (count, self.max_width))
        return torch.einsum("blkd,bcd->blkc", spans, prompts)


def _rows(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def valid(logits: Tensor, lengths: Tensor) -> Tensor:
    """The peer's logits of spans that end within their text, in fastenc's order."""
    longest, widths = logits.shape[1:3]
    end = torch.arange(longest)[:, None] + torch.arange(widths)
    return logits[(end < lengths[:, None, None]).to(logits.device)]


def runners(model: fastenc.GLiNER, packed: GLiNERBatch, padded: Padded) -> dict[str, Callable]:
    plain = PlainGLiNER(model).eval().to(DEVICE, next(model.parameters()).dtype)
    mask = packed.span_mask(model.config.max_width)

    def compiled() -> Callable:
        encoder, plain.encoder = plain.encoder, torch.compile(plain.encoder)

        def run() -> Tensor:
            return valid(plain(padded), padded.lengths)

        run()
        plain.encoder = encoder
        return run

    return {
        "fastenc": lambda: lambda: model.logits(packed)[mask],
        "gliner's forward": lambda: lambda: valid(plain(padded), padded.lengths),
        **({"gliner's forward, torch.compile": compiled} if CUDA else {}),
    }


def measure_row(name: str, settings: dict, deadline: Deadline) -> dict:
    dtype = torch.float16 if CUDA else torch.float32
    model = build(settings).to(DEVICE, dtype)
    packed, padded = inputs(model, 32 if CUDA else 4)
    runs: dict[str, dict] = {}
    expected: Tensor | None = None
    with torch.inference_mode():
        for runner, factory in runners(model, packed, padded).items():
            if deadline.left <= 0:
                runs[runner] = {"error": "out of time"}
                continue
            extra: dict[str, object] = {}

            def call(factory=factory, extra=extra):
                nonlocal expected
                run = factory()
                with fastenc.record() as ran:
                    logits = run().float()
                expected = logits if expected is None else expected
                extra["difference"] = (logits - expected).abs().max().item()
                extra["fallbacks"] = ran.fallbacks
                return timed([run], rounds=9, graph=False)

            runs[runner] = {**attempt(call), **extra}
            if "seconds" in runs[runner]:
                runs[runner]["texts_per_second"] = packed.num_seqs / runs[runner]["seconds"]
    return {
        "model": f"GLiNER, {name} shape", "shape": f"{packed.num_seqs} mixed texts",
        "words": packed.words, "tokens": packed.tokens.total_tokens, "runs": runs,
    }  # fmt: skip


def measure(ceilings: dict[str, float], deadline: Deadline) -> list[dict]:
    results = []
    for name, settings in (SHAPES if CUDA else {"toy": TOY}).items():
        results.append(measure_row(name, settings, deadline))
        rates = (
            f"{n} {r['texts_per_second']:.1f} texts/s" if "seconds" in r else f"{n}: {r['error']}"
            for n, r in results[-1]["runs"].items()
        )
        print(f"{results[-1]['model']}: {' | '.join(rates)}", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    return results
