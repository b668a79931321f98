"""GLiNER on a GPU: 32 mixed texts from token ids to span logits, fp16, beside the same weights as
gliner runs them (padded to the longest text, every span built), eager and compiled.

The peer is gliner 0.2.29's markerV0 forward in plain transformers and torch, so that the row needs
no gliner on the GPU machine; tests hold it to fastenc's model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import fastenc
from bench.gpu_record import OURS, PEERS, Found, Record, of_kinds
from bench.gpu_timing import CUDA, DEVICE, free_memory, timed
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
LABELS, TEXTS = 5, 32 if CUDA else 4


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


class Bench:
    """A model with its inputs, made at its first use."""

    def __init__(self, settings: dict):
        self.settings = settings

    @functools.cached_property
    def model(self) -> fastenc.GLiNER:
        return build(self.settings).to(DEVICE, torch.float16 if CUDA else torch.float32)

    @functools.cached_property
    def inputs(self) -> tuple[GLiNERBatch, Padded]:
        return inputs(self.model, TEXTS)

    @functools.cached_property
    def expected(self) -> Tensor:
        return self.theirs()().float()

    def plain(self) -> PlainGLiNER:
        return PlainGLiNER(self.model).eval().to(DEVICE, next(self.model.parameters()).dtype)

    def ours(self) -> Callable[[], Tensor]:
        packed = self.inputs[0]
        mask = packed.span_mask(self.model.config.max_width)
        return lambda: self.model.logits(packed)[mask]

    def theirs(self, compiled: bool = False) -> Callable[[], Tensor]:
        plain, padded = self.plain(), self.inputs[1]
        if compiled:
            plain.encoder = torch.compile(plain.encoder)
        return lambda: valid(plain(padded), padded.lengths)

    def runners(self) -> dict[str, Callable[[], Callable]]:
        found = {"fastenc": self.ours, "gliner's forward": self.theirs}
        if CUDA:
            found["gliner's forward, torch.compile"] = lambda: self.theirs(compiled=True)
        return found


def measure_row(record: Record, name: str, bench: Bench, kinds: tuple[str, ...]) -> None:
    done = record.row("gliner", model=f"GLiNER, {name} shape", shape=f"{TEXTS} mixed texts")

    @torch.inference_mode()
    def time(factory: Callable[[], Callable], found: Found) -> None:
        run = factory()
        packed = bench.inputs[0]
        done.update(words=packed.words, tokens=packed.tokens.total_tokens)
        with fastenc.record() as ran:
            logits = run().float()
        found["fallbacks"] = ran.fallbacks
        found |= vars(timed([run], rounds=9, graph=False))
        found["texts_per_second"] = TEXTS / found["seconds"]
        found["difference"] = (logits - bench.expected).abs().max().item()

    for runner, factory in (runs := of_kinds(bench.runners(), kinds)).items():
        record.run(done, runner, functools.partial(time, factory))
    shown = [
        f"{n} {done['runs'][n].get('texts_per_second', done['runs'][n].get('error'))}" for n in runs
    ]
    if shown:
        print(f"{done['model']}, texts/s: {' | '.join(shown)}", flush=True)


def measure(record: Record, phases: tuple[tuple[str, ...], ...] = ((OURS,), (PEERS,))) -> None:
    benches = {name: Bench(of) for name, of in (SHAPES if CUDA else {"toy": TOY}).items()}
    for kinds in phases:
        for name, bench in benches.items():
            measure_row(record, name, bench, kinds)
            free_memory()
