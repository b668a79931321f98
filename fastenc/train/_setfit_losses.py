"""Losses of stage 1, on embeddings: each text of a batch is embedded once, whatever the loss.

    pair losses    of the cosines of pairs, their targets and, in blocks, their weights
    group losses   of embeddings and labels: positives and negatives are found inside the batch

The formulas are sentence-transformers' of the same names (CosineSimilarityLoss, ContrastiveLoss,
OnlineContrastiveLoss, BatchAllTripletLoss, BatchHardTripletLoss, BatchSemiHardTripletLoss,
BatchHardSoftMarginTripletLoss) and setfit's (SupConLoss, Khosla et al. 2020, arXiv:2004.11362).
All pairs of a block are one matrix product: no pair is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PAIR_LOSSES = ("CosineSimilarityLoss", "ContrastiveLoss", "OnlineContrastiveLoss")
GROUP_LOSSES = (
    "SupConLoss",
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "BatchHardSoftMarginTripletLoss",
)
LOSSES = (*PAIR_LOSSES, *GROUP_LOSSES)
CONTRASTIVE_MARGIN = 0.5
"""sentence-transformers' default: in setfit ``margin`` is of triplet losses only."""

_SHORT = {"cosine": "CosineSimilarityLoss", "contrastive": "ContrastiveLoss"}
_SHORT |= {"supcon": "SupConLoss", "triplet": "BatchHardTripletLoss"}


def loss_name(loss: Any) -> str:
    """The name of a loss given by name, short name, or as a class of setfit's world.

    Raises:
        ValueError: no loss of this name.
    """
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", str(loss))
    name = _SHORT.get(name, name)
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    return name


# ---- pairs ---------------------------------------------------------------------------------------


def pair_loss(name: str, similarity: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """A scalar from cosine similarities.

    Args:
        name: one of ``PAIR_LOSSES``.
        similarity: (pairs,), of any shape.
        target: same shape; 1 for a positive pair, 0 for a negative one, or a teacher's cosine.
        weight: same shape, of sum 1: the mean is weighted. None: the plain mean.
    """
    if name == "CosineSimilarityLoss":
        return _mean((similarity - target).square(), weight)
    distance = 1 - similarity
    if name == "ContrastiveLoss":
        near = target * distance.square()
        far = (1 - target) * F.relu(CONTRASTIVE_MARGIN - distance).square()
        return _mean(0.5 * (near + far), weight)
    return _online_contrastive(distance, target, weight)


def _online_contrastive(distance: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Only the positives farther than the nearest negative, and the reverse; a sum, not a mean."""
    kept = torch.ones_like(target, dtype=torch.bool) if weight is None else weight > 0
    positive, negative = kept & (target == 1), kept & (target == 0)
    far, near = distance[positive], distance[negative]
    if weight is None:
        near_weight = far_weight = 1.0
    else:
        scale = weight * kept.sum()
        near_weight, far_weight = scale[negative], scale[positive]
    edge = far.max() if far.numel() else (near.mean() if near.numel() else 0.0)
    other = near.min() if near.numel() else (far.mean() if far.numel() else 0.0)
    hard_near = (near < edge) * F.relu(CONTRASTIVE_MARGIN - near).square() * near_weight
    hard_far = (far > other) * far.square() * far_weight
    return hard_far.sum() + hard_near.sum()


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).sum()


def similarities(embeddings: Tensor) -> Tensor:
    """(n, dim) -> (n, n) cosine similarities, in float32."""
    unit = F.normalize(embeddings.float(), dim=1, eps=1e-8)
    return unit @ unit.T


# ---- groups --------------------------------------------------------------------------------------


def group_loss(
    name: str,
    embeddings: Tensor,
    labels: Tensor,
    distance_metric: str | Callable[[Tensor], Tensor] = "cosine",
    margin: float = 0.25,
) -> Tensor:
    """A scalar from embeddings (n, dim) and their labels (n,).

    Args:
        name: one of ``GROUP_LOSSES``.
        distance_metric: "cosine", "euclidean", or a callable (n, dim) -> (n, n).
        margin: of the triplet losses but the soft one.
    """
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    if name == "SupConLoss":
        return _supcon(embeddings, same)
    distance = _distances(embeddings.float(), distance_metric)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if name == "BatchAllTripletLoss":
        return _all_triplets(distance, positive, same, margin)
    if name == "BatchSemiHardTripletLoss":
        return _semi_hard(distance, positive, same, margin)
    farthest = (distance * positive).amax(1)
    nearest = (distance + distance.amax(1, keepdim=True) * same).amin(1)
    if name == "BatchHardTripletLoss":
        return F.relu(farthest - nearest + margin).mean()
    return F.softplus(farthest - nearest).mean()


def _distances(embeddings: Tensor, metric: str | Callable[[Tensor], Tensor]) -> Tensor:
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "")
    if name in ("cosine", "cosine_distance"):
        return 1 - similarities(embeddings)
    if name in ("euclidean", "euclidean_distance", "eucledian_distance"):
        dot = embeddings @ embeddings.T
        square = dot.diagonal()
        squared = (square.unsqueeze(0) - 2 * dot + square.unsqueeze(1)).clamp(min=0)
        zero = squared == 0
        return (squared + zero * 1e-16).sqrt() * ~zero
    if isinstance(metric, str):
        raise ValueError(f"distance_metric: expected 'cosine' or 'euclidean', got {metric!r}")
    return metric(embeddings)


def _supcon(embeddings: Tensor, same: Tensor, temperature: float = 0.07) -> Tensor:
    """Anchors without a positive in the batch are left out (setfit's loss is NaN there)."""
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = similarities(embeddings) / temperature
    log_p = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = same & ~itself
    count = positive.sum(1)
    mean = (log_p * positive).sum(1) / count.clamp(min=1)
    anchors = count > 0
    return -(mean * anchors).sum() / anchors.sum().clamp(min=1)


def _all_triplets(distance: Tensor, positive: Tensor, same: Tensor, margin: float) -> Tensor:
    anchor, other = positive.nonzero(as_tuple=True)
    loss = distance[anchor, other].unsqueeze(1) - distance[anchor] + margin
    loss = F.relu(loss * ~same[anchor])
    return loss.sum() / ((loss > 1e-16).sum() + 1e-16)


def _semi_hard(distance: Tensor, positive: Tensor, same: Tensor, margin: float) -> Tensor:
    """For each positive the nearest negative that is farther, else the farthest negative."""
    ranked = distance.masked_fill(same, torch.inf).sort(dim=1, stable=True).values
    place = torch.searchsorted(
        ranked.detach().contiguous(), distance.detach().contiguous(), right=True
    )
    outside = ranked.gather(1, place.clamp(max=len(distance) - 1))
    lowest = distance.amin(1, keepdim=True)
    inside = ((distance - lowest) * ~same).amax(1, keepdim=True) + lowest
    negative = torch.where(outside.isfinite(), outside, inside)
    loss = F.relu((distance - negative + margin) * positive)
    return loss.sum() / positive.sum().clamp(min=1e-16)
