"""GLiNER's heads, folded so that no (words, max_width, hidden) tensor exists.

Every function takes the layer's module: gliner's own, or one of the classes below, which have
gliner's parameter names. ops/span_score.py and ops/token_score.py state the folds.

Zaratiana et al. 2023, arXiv:2311.08526; gliner 0.2.29, modeling/span_rep.py and scorers.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastenc.nn._modules import is_unhooked
from fastenc.nn.dropout import dropout
from fastenc.nn.linear import PrepackedLinear, linear, product
from fastenc.ops import span_candidates, span_score

Hits = tuple[Tensor, Tensor, Tensor, Tensor]
"""word, width, label (int64) and score (float32) of the spans above a threshold, 1-D each."""


@dataclass(frozen=True)
class Words:
    """Packed word representations: x (words, D), cu_words (num_seqs + 1,) int32, host lengths."""

    x: Tensor
    cu_words: Tensor
    lengths: list[int]

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    def spread(self, per_seq: Tensor) -> Tensor:
        """(num_seqs, ...) -> (words, ...): each sequence's row at all of its words."""
        lengths = self.cu_words.diff().long()
        return per_seq.repeat_interleave(lengths, 0, output_size=self.x.shape[0])


_FOLDED = (nn.Sequential, nn.Linear, PrepackedLinear, nn.ReLU, nn.Dropout)


def head_obstacle(model: nn.Module) -> str | None:
    """Why the folds, which read weights and call no module, would not do what the head does."""
    if hasattr(model, "scorer"):
        outer, name = (model.scorer,), "out_mlp"
    else:
        outer, name = (model.span_rep_layer, model.span_rep_layer.span_rep_layer), "out_project"
    folded = [*getattr(outer[-1], name).modules()]
    for module in folded:
        if type(module) not in _FOLDED:
            return f"{name} holds a {type(module).__name__}"
    if not all(map(is_unhooked, (*outer, *folded))):
        return f"hooks on {name} or what holds it"
    return None


def projected(layers: nn.Module, x: Tensor) -> Tensor:
    """``layers(x)``, where a plain ``nn.Sequential`` takes fastenc's products and dropout."""
    if type(layers) is not nn.Sequential or not is_unhooked(layers):
        return layers(x)
    for layer in layers:
        x = dropout(layer, x) if type(layer) is nn.Dropout else linear(layer, x)
    return x


# ---- span heads ----------------------------------------------------------------------------------


def span_logits(
    layer: nn.Module,
    words: Words,
    prompts: Tensor,
    max_width: int,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Logits of every span.

    Args:
        layer: SpanMarkerV0, V1, V2 or SpanMarker, of gliner or below.
        words: of the texts.
        prompts: (num_seqs, C, D), or (1, C, D) for one set of labels, after ``prompt_rep_layer``.
        max_width: words in the longest span.
        seed: of the dropout inside the folded product, in training.

    Returns:
        (words, max_width, C), -inf past the end of a text.
    """
    if type(layer).__name__ == "SpanMarker":
        return _separable(layer, words, prompts, max_width)
    start, end, labels, bias = _fold(layer, words, prompts)
    return span_score(
        start, end, labels, words.cu_words, max_width, bias, _dropout_p(layer.out_project), seed
    )


def span_hits(
    layer: nn.Module,
    words: Words,
    prompts: Tensor,
    max_width: int,
    threshold: float,
    label_mask: Tensor | None = None,
) -> Hits:
    """The spans whose probability exceeds ``threshold``, ordered by word, width and label.

    ``label_mask`` (num_seqs, C) bool: labels that do not exist are never hit.
    """
    if type(layer).__name__ == "SpanMarker":
        scores = torch.sigmoid(_separable(layer, words, prompts, max_width).float())
        if label_mask is not None:
            scores = scores.masked_fill(~words.spread(label_mask).unsqueeze(1), 0.0)
        word, width, label = (scores > threshold).nonzero(as_tuple=True)
        return word, width, label, scores[word, width, label]
    start, end, labels, bias = _fold(layer, words, prompts)
    if label_mask is not None:
        bias = bias.masked_fill(~label_mask, float("-inf"))
    return span_candidates(start, end, labels, words.cu_words, max_width, threshold, bias)


def _fold(layer: nn.Module, words: Words, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """start, end (words, R), labels (num_seqs, C, R) and label_bias (num_seqs, C) of span_score."""
    first, last = layer.out_project[0], layer.out_project[3]
    d = words.x.shape[-1]
    start = product(projected(layer.project_start, words.x).relu(), first.weight[:, :d])
    end = product(
        projected(layer.project_end, words.x).relu(), first.weight[:, d : 2 * d], first.bias
    )
    context = _context(layer, words)
    if context is not None:
        end = end + words.spread(product(context.relu(), first.weight[:, 2 * d :]))
    labels = product(prompts, last.weight.T)
    bias = product(prompts, last.bias.unsqueeze(0)).squeeze(-1)
    return (
        start,
        end,
        labels.expand(words.num_seqs, -1, -1),
        bias.expand(words.num_seqs, -1),
    )


def _context(layer: nn.Module, words: Words) -> Tensor | None:
    """(num_seqs, D): what V1 and V2 put beside start and end.

    Of the text alone: gliner takes V1's mean and V2's last word over the padding of the batch too.
    """
    kind = type(layer).__name__
    if kind == "SpanMarkerV1":
        total = words.x.new_zeros(words.num_seqs, words.x.shape[1])
        seq = words.spread(torch.arange(words.num_seqs, device=words.x.device))
        counts = words.cu_words.diff().clamp(min=1).unsqueeze(1).to(words.x.dtype)
        return total.index_add(0, seq, words.x) / counts
    if kind == "SpanMarkerV2":
        exists = (words.cu_words.diff() > 0).unsqueeze(1)
        last = (words.cu_words[1:].long() - 1).clamp(min=0)
        if words.x.shape[0] == 0:
            return words.x.new_zeros(words.num_seqs, words.x.shape[1])
        return projected(layer.project_context, words.x.index_select(0, last)) * exists
    return None


def _separable(layer: nn.Module, words: Words, prompts: Tensor, max_width: int) -> Tensor:
    """SpanMarker has no hidden layer: its logits are a start's plus an end's."""
    d = words.x.shape[-1]
    weight, bias = layer.out_project.weight, layer.out_project.bias
    start = product(projected(layer.project_start, words.x).relu(), weight[:, :d])
    end = product(projected(layer.project_end, words.x).relu(), weight[:, d:], bias)
    edges = [0, *itertools.accumulate(words.lengths)]
    out = [words.x.new_zeros(0, max_width, prompts.shape[1])]
    for seq, (first, stop) in enumerate(itertools.pairwise(edges)):
        labels = prompts[seq if prompts.shape[0] > 1 else 0]
        s, e = start[first:stop] @ labels.T, end[first:stop] @ labels.T
        e = F.pad(e, (0, 0, 0, max_width - 1), value=float("-inf"))
        out.append(s.unsqueeze(1) + e.unfold(0, max_width, 1).transpose(1, 2))
    return torch.cat(out)


# ---- token head ----------------------------------------------------------------------------------


def token_logits(
    scorer: nn.Module, words: Words, prompts: Tensor, seed: int | Tensor | None = None
) -> Tensor:
    """Start, end and inside logits of every word and label: (words, C, 3).

    Args:
        scorer: gliner's Scorer, or the one below.
        prompts: (num_seqs, C, D), or (1, C, D) for one set of labels.
        seed: of the dropout, in training.
    """
    from fastenc.ops import token_score

    first, last = scorer.out_mlp[0], scorer.out_mlp[3]
    d = words.x.shape[-1]
    token, token_factor = linear(scorer.proj_token, words.x).split(d, -1)
    label, label_factor = linear(scorer.proj_label, prompts).split(d, -1)
    token = product(token, first.weight[:, :d], first.bias)
    label = product(label, first.weight[:, d : 2 * d])
    weight, out_weight, out_bias = (  # under autocast products have another dtype
        x.to(token.dtype) for x in (first.weight[:, 2 * d :], last.weight, last.bias)
    )
    return token_score(
        token,
        label.expand(words.num_seqs, -1, -1),
        token_factor.contiguous(),
        label_factor.expand(words.num_seqs, -1, -1),
        weight,
        out_weight,
        words.cu_words,
        out_bias,
        scorer.out_mlp[1].p if scorer.training else 0.0,
        seed,
    )


# ---- the modules ---------------------------------------------------------------------------------


def projection(hidden: int, dropout: float, out: int | None = None) -> nn.Sequential:
    """gliner's two-layer projection; the hidden layer is four times ``out`` (default: hidden)."""
    out = hidden if out is None else out
    return nn.Sequential(
        nn.Linear(hidden, out * 4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(out * 4, out)
    )


class SpanMarkerV0(nn.Module):
    """relu([project_start(word i) ; project_end(word j)]), projected."""

    parts = 2

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.project_start = projection(hidden, dropout)
        self.project_end = projection(hidden, dropout)
        self.out_project = projection(hidden * self.parts, dropout, hidden)


class SpanMarkerV1(SpanMarkerV0):
    """V0 beside the mean of the text's words. gliner's ``project_first`` is there, and unused."""

    parts = 3

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__(hidden, dropout)
        self.project_first = projection(hidden, dropout)


class SpanMarkerV2(SpanMarkerV0):
    """V0 beside a projection of the text's last word."""

    parts = 3

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__(hidden, dropout)
        self.project_context = projection(hidden, dropout)


class SpanMarker(nn.Module):
    """The first version: a single linear layer over start and end."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()

        def project() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(hidden, hidden * 2),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(hidden * 2, hidden),
            )

        self.project_start, self.project_end = project(), project()
        self.out_project = nn.Linear(hidden * 2, hidden)


class SpanRepLayer(nn.Module):
    """Holds the span head under gliner's name."""

    def __init__(self, mode: str, hidden: int, dropout: float) -> None:
        super().__init__()
        kinds = {
            "marker": SpanMarker,
            "markerV0": SpanMarkerV0,
            "markerV1": SpanMarkerV1,
            "markerV2": SpanMarkerV2,
        }
        self.span_rep_layer = kinds[mode](hidden, dropout)


class Scorer(nn.Module):
    """The token-level head: an MLP over word, label and their product."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.proj_token = nn.Linear(hidden, hidden * 2)
        self.proj_label = nn.Linear(hidden, hidden * 2)
        self.out_mlp = nn.Sequential(
            nn.Linear(hidden * 3, hidden * 4),
            nn.Dropout(dropout),
            nn.ReLU(),
            nn.Linear(hidden * 4, 3),
        )


def _dropout_p(project: nn.Sequential) -> float:
    return project[2].p if project.training else 0.0
