"""GLiNER's losses, elementwise, and the sampling of negatives among their elements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("focal", "bce")
MASKING = ("none", "global", "label", "span")
REDUCTIONS = ("sum", "mean")
_EPS = 1e-6


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = -1.0,
    gamma: float = 0.0,
    prob_margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Focal loss of every element (Lin et al. 2017, arXiv:1708.02002), by gliner's formula.

    Args:
        logits, targets: one shape; targets are 0 or 1.
        alpha: weight of positives, 1 - alpha of negatives; below 0: none.
        gamma: exponent of 1 - p_t; 0: none.
        prob_margin: taken off the probability of negatives.
        label_smoothing: targets become ``target * (1 - s) + s / 2``.

    Probabilities are kept above 1e-6 in logarithms; past that an element has no gradient.
    """
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + 0.5 * label_smoothing
    p = torch.sigmoid(logits)
    shifted = (p - prob_margin).clamp(0.0, 1.0)
    loss = -targets * p.clamp(min=_EPS).log()
    loss = loss - (1 - targets) * (1 - shifted).clamp(min=_EPS).log()
    if gamma > 0:
        loss = loss * (1 - (p * targets + (1 - shifted) * (1 - targets))) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def bce_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of every element, with a gradient however wrong the logit is."""
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + 0.5 * label_smoothing
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def negative_mask(
    targets: Tensor, class_dim: int, seq_of_word: Tensor, num_seqs: int, masking: str, share: float
) -> Tensor | None:
    """Which elements keep their loss: every positive, and of the negatives each with ``share``.

    Args:
        targets: (words, max_width, C) or (words, C, 3), 0 or 1.
        class_dim: of the classes in ``targets``.
        seq_of_word: (words,) int64.
        masking: what is a negative: "none": nothing is masked; "global": an element that is 0;
            "label": all elements of a label that its text does not have; "span": all elements of a
            span (of a token model: of a word) that is no entity of any label.

    Returns:
        bool, the shape of ``targets``; None where nothing is masked.
    """
    if masking == "none" or share >= 1:
        return None
    if masking == "global":
        negative = targets == 0
    elif masking == "label":
        of_word = targets.amax(3 - class_dim)
        found = targets.new_zeros(num_seqs, of_word.shape[1])
        index = seq_of_word.unsqueeze(1).expand_as(of_word)
        found = found.scatter_reduce(0, index, of_word, "amax")
        negative = (found[seq_of_word] == 0).unsqueeze(3 - class_dim).expand_as(targets)
    else:
        dims = (2,) if class_dim == 2 else (1, 2)
        negative = (targets.amax(dims, keepdim=True) == 0).expand_as(targets)
    return ~negative | (torch.rand(targets.shape, device=targets.device) < share)
