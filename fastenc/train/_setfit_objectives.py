"""What stage 1 minimises: batches of texts, and the loss of a batch from its embeddings.

An objective embeds nothing: it says which distinct texts a batch needs and turns their embeddings
into a scalar, so that encoding, processes and precision are one loop's business.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastenc.train import _setfit_blocks as blocks
from fastenc.train import _setfit_pairs as pairing
from fastenc.train._setfit_losses import PAIR_LOSSES, group_loss, pair_loss, similarities

Batch = tuple[np.ndarray, Callable[[Tensor], Tensor]]
"""(rows (m,) of texts to embed; (m, dim) embeddings -> scalar)."""


@dataclass(frozen=True)
class Objective:
    """Batches of an epoch.

    Attributes:
        batches_per_epoch, epochs: their product is the number of batches.
        batches: epoch -> the batches of it.
        rate_factor: of the learning rate.
        whole: (n, dim) embeddings of all texts -> the loss of evaluation: over the batches of
            epoch 0, each weighted by its length, as transformers' Trainer does.
    """

    batches_per_epoch: int
    epochs: float
    batches: Callable[[int], Iterator[Batch]]
    whole: Callable[[Tensor], Tensor]
    rate_factor: float = 1.0


@dataclass(frozen=True)
class Examples:
    """Examples of stage 1 and what is known of them.

    Attributes:
        rows: (n,) each example's text, among the distinct ones.
        labels: (n,) class numbers or (n, outputs) of 0 and 1, or None.
        teacher: (n, n) cosines of a teacher, or None.
    """

    rows: np.ndarray
    labels: np.ndarray | None = None
    teacher: np.ndarray | None = None

    @classmethod
    def of(cls, rows: np.ndarray, labels: np.ndarray, repeats: bool) -> Examples:
        """``repeats``: keep a text that occurs twice with the same label."""
        if repeats:
            return cls(rows, labels)
        both = np.concatenate([rows[:, None], labels.reshape(len(rows), -1)], axis=1)
        first = np.sort(np.unique(both, axis=0, return_index=True)[1])
        return cls(rows[first], labels[first])

    @property
    def count(self) -> int:
        return len(self.rows)


def objective(examples: Examples, args: Any) -> Objective:
    """The objective of training arguments.

    Raises:
        ValueError: a loss that needs one label a text, for texts with several.
    """
    if args.loss not in PAIR_LOSSES:
        return _groups(examples, args)
    return _exact(examples, args) if args.pairing == "exact" else _blocks(examples, args)


def _most_batches(args: Any) -> int:
    return -1 if args.max_steps <= 0 else args.max_steps * args.gradient_accumulation_steps


def _mean_over(losses: list[Tensor], count: int, size: int) -> Tensor:
    """The mean over ``count`` examples of losses of batches of ``size``, the last shorter."""
    sizes = [min(size, count - start) for start in range(0, count, size)]
    stacked = torch.stack(losses)
    return (stacked * stacked.new_tensor(sizes)).sum() / count


# ---- setfit's pairs ------------------------------------------------------------------------------


def _pairs(examples: Examples, args: Any, most: int) -> pairing.Pairs:
    most = -1 if most == -1 else most * args.embedding_batch_size
    if examples.teacher is not None:
        return pairing.distillation_pairs(examples.teacher, args.num_iterations, most)
    found = pairing.pairs(examples.labels, args.sampling_strategy, args.num_iterations, most)
    rows = examples.rows
    return pairing.Pairs(rows[found.first], rows[found.second], found.target)


def _exact(examples: Examples, args: Any) -> Objective:
    most = _most_batches(args)
    pairs = _pairs(examples, args, most)
    size = args.embedding_batch_size
    per_epoch = max(1, math.ceil(len(pairs) / size))
    epochs = args.embedding_num_epochs if most == -1 else most / per_epoch

    def batches(epoch: int) -> Iterator[Batch]:
        order = pairing.epoch_order(len(pairs), args.seed, epoch)
        for start in range(0, len(order), size):
            yield _pair_batch(pairs, order[start : start + size], args.loss)

    def whole(embeddings: Tensor) -> Tensor:
        losses = [loss(embeddings[torch.from_numpy(rows)]) for rows, loss in batches(0)]
        return _mean_over(losses, len(pairs), size)

    return Objective(per_epoch, epochs, batches, whole)


def _pair_batch(pairs: pairing.Pairs, at: np.ndarray, name: str) -> Batch:
    both = np.concatenate([pairs.first[at], pairs.second[at]])
    rows, places = np.unique(both, return_inverse=True)
    first, second = torch.from_numpy(places.astype(np.int64)).view(2, -1)
    target = torch.from_numpy(pairs.target[at])

    def loss(embeddings: Tensor) -> Tensor:
        device = embeddings.device
        a = embeddings.index_select(0, first.to(device))
        b = embeddings.index_select(0, second.to(device))
        return pair_loss(name, F.cosine_similarity(a, b), target.to(device), None)

    return rows.astype(np.int64), loss


# ---- blocks --------------------------------------------------------------------------------------


def _share(examples: Examples, args: Any) -> tuple[int, float]:
    """(pairs that exact pairing would draw in an epoch, the share of positive ones)."""
    n = examples.count
    if examples.teacher is not None:
        drawn = (args.num_iterations or 0) * n or n * (n + 1) // 2
        return drawn, 0.5
    size = pairing.counts(examples.labels, args.sampling_strategy, args.num_iterations)
    return size.drawn, size.positive_share


def _blocks(examples: Examples, args: Any) -> Objective:
    drawn, share = _share(examples, args)
    exact = max(1, math.ceil(drawn / args.embedding_batch_size))
    most = _most_batches(args)
    exact = exact * args.embedding_num_epochs if most == -1 else min(most, exact)
    plan = blocks.plan(
        examples.count, max(1, int(exact)), args.embedding_batch_size, args.block_size,
        args.block_steps,
    )  # fmt: skip
    loss_of = _block_loss(examples, args.loss, share, plan.block_size)

    def batches(epoch: int) -> Iterator[Batch]:
        source = blocks.blocks(examples.count, examples.labels, plan.block_size, args.seed + epoch)
        for rows in itertools.islice(source, plan.steps):
            yield examples.rows[rows], loss_of(rows)

    def whole(embeddings: Tensor) -> Tensor:
        return loss_of(np.arange(examples.count))(embeddings[torch.from_numpy(examples.rows)])

    return Objective(plan.steps, 1, batches, whole, plan.rate_factor)


def _block_loss(examples: Examples, name: str, share: float, size: int):
    """rows -> the loss of the block of these rows."""
    labels, teacher = examples.labels, examples.teacher
    class_weight = None if labels is None else blocks.class_weights(labels, size)

    def loss_of(rows: np.ndarray) -> Callable[[Tensor], Tensor]:
        if teacher is not None:
            target = torch.from_numpy(teacher[np.ix_(rows, rows)]).float()
            weight = torch.ones(len(rows), len(rows)).triu(1)
            weight = weight / weight.sum().clamp(min=1)
        else:
            same = torch.from_numpy(_same(labels[rows]))
            of_class = None if class_weight is None else torch.from_numpy(class_weight[rows])
            target = same.float()
            weight = blocks.pair_weights(same, share, of_class)

        def loss(embeddings: Tensor) -> Tensor:
            device = embeddings.device
            cosines = similarities(embeddings)
            return pair_loss(name, cosines, target.to(device), weight.to(device))

        return loss

    return loss_of


def _same(labels: np.ndarray) -> np.ndarray:
    """(m, m) bool."""
    if labels.ndim == 1:
        return labels[:, None] == labels[None, :]
    return (labels.astype(np.int32) @ labels.astype(np.int32).T) > 0


# ---- losses over groups --------------------------------------------------------------------------


def _groups(examples: Examples, args: Any) -> Objective:
    labels = examples.labels
    if labels is None or labels.ndim != 1:
        raise ValueError(f"loss: {args.loss} needs one label a text; expected a loss over pairs")
    size = min(args.embedding_batch_size, examples.count)
    per_epoch = math.ceil(examples.count / size)
    most = _most_batches(args)
    epochs = args.embedding_num_epochs if most == -1 else most / per_epoch

    def loss_of(rows: np.ndarray) -> Callable[[Tensor], Tensor]:
        given = torch.from_numpy(labels[rows])

        def loss(embeddings: Tensor) -> Tensor:
            at = given.to(embeddings.device)
            return group_loss(args.loss, embeddings, at, args.distance_metric, args.margin)

        return loss

    def batches(epoch: int) -> Iterator[Batch]:
        if args.pairing == "exact":
            order = pairing.epoch_order(examples.count, args.seed, epoch)
            source = (order[i : i + size] for i in range(0, len(order), size))
        else:
            endless = blocks.blocks(examples.count, labels, size, args.seed + epoch)
            source = itertools.islice(endless, per_epoch)
        for rows in source:
            yield examples.rows[rows], loss_of(rows)

    def whole(embeddings: Tensor) -> Tensor:
        embeddings = embeddings[torch.from_numpy(examples.rows)]
        chunks = torch.from_numpy(pairing.epoch_order(examples.count, args.seed, 0)).split(size)
        losses = [loss_of(chunk.numpy())(embeddings[chunk]) for chunk in chunks]
        return _mean_over(losses, examples.count, size)

    return Objective(per_epoch, epochs, batches, whole)
