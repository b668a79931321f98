"""Pairs, blocks and losses of SetFit training, against setfit and sentence-transformers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastenc.train import _setfit_blocks as blocks
from fastenc.train import _setfit_losses as losses
from fastenc.train import _setfit_pairs as pairing

LABELS = {
    "even": [0, 1, 2] * 4,
    "skewed": [0] * 9 + [1] * 2 + [2],
    "several": [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1]],
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("strategy", ["oversampling", "undersampling", "unique"])
@pytest.mark.parametrize("iterations, most", [(None, -1), (3, -1), (None, 10)])
def test_pairs_are_setfits(kind, strategy, iterations, most):
    from setfit.sampler import ContrastiveDataset

    labels = LABELS[kind]
    texts = [str(i) for i in range(len(labels))]
    given = (labels, kind == "several", iterations, strategy)
    theirs = list(ContrastiveDataset(texts, *given, max_pairs=most))
    found = pairing.pairs(np.asarray(labels), strategy, iterations, most)
    assert found.first.tolist() == [int(row["sentence_1"]) for row in theirs]
    assert found.second.tolist() == [int(row["sentence_2"]) for row in theirs]
    assert found.target.tolist() == [row["label"] for row in theirs]
    if most == -1:
        assert pairing.counts(np.asarray(labels), strategy, iterations).drawn == len(theirs)


def test_distillation_targets_are_the_teachers():
    cosines = np.random.default_rng(0).random((5, 5)).astype(np.float32)
    found = pairing.distillation_pairs(cosines)
    assert len(found) == 15
    assert np.array_equal(found.target, cosines[found.first, found.second])
    assert len(set(found.target.tolist())) == 15


def test_blocks_use_every_text_as_often():
    labels = np.repeat([0, 1, 2], 8)
    taken = list(itertools.islice(blocks.blocks(24, labels, 16, seed=1), 30))
    assert all(len(set(block.tolist())) == 16 for block in taken)
    uses = np.bincount(np.concatenate(taken), minlength=24)
    assert uses.max() - uses.min() <= 2
    again = itertools.islice(blocks.blocks(24, labels, 16, seed=1), 30)
    assert all(np.array_equal(a, b) for a, b in zip(taken, again, strict=True))
    other = next(blocks.blocks(24, labels, 16, seed=2))
    assert not np.array_equal(taken[0], other)


def test_blocks_of_many_classes_have_positive_pairs():
    labels = np.repeat(np.arange(40), 8)
    for block in itertools.islice(blocks.blocks(320, labels, 16, seed=0), 50):
        given = labels[block]
        assert len(given) == 16
        assert (given[:, None] == given).sum() >= 16 + 2 * 6


@pytest.mark.parametrize(
    "labels", [np.repeat([0, 1], 12), np.repeat(np.arange(6), [2, 4, 4, 4, 5, 5])]
)
def test_the_loss_of_blocks_is_setfits_in_expectation(labels):
    """Uniform blocks: the mean of block losses approaches the mean over all drawn pairs."""
    n = len(labels)
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(n, 6)))
    cosines = losses.similarities(points)
    same = torch.from_numpy(labels[:, None] == labels[None, :])
    size = pairing.counts(labels, "oversampling")
    off = torch.ones(n, n).triu(1).bool()
    drawn = pairing.pairs(labels, "oversampling")
    i, j = torch.from_numpy(drawn.first).long(), torch.from_numpy(drawn.second).long()
    exact = (cosines[i, j] - torch.from_numpy(drawn.target)).square()
    positive, negative = same & off, ~same & off
    expected = (
        0.5 * (1 - cosines[positive]).square().mean() + 0.5 * cosines[negative].square().mean()
    )
    assert 0 < exact.mean() < expected * 1.5
    total = 0.0
    for rows in itertools.islice(blocks.blocks(n, labels, n, 0), 1):
        weight = blocks.pair_weights(same[rows][:, rows], size.positive_share, None)
        assert float(weight.sum()) == pytest.approx(1.0)
        total += float(losses.pair_loss("CosineSimilarityLoss", cosines, same.float(), weight))
    assert total == pytest.approx(float(expected), rel=1e-5)


def test_plan_never_takes_more_steps_than_exact_pairing():
    for exact in (1, 9, 40, 120, 7680):
        made = blocks.plan(48, exact, 16)
        assert 1 <= made.steps <= exact
        assert made.rate_factor == pytest.approx(math.sqrt(exact / made.steps))
    assert blocks.plan(6, 10, 16).block_size == 6
    assert blocks.plan(48, 120, 16, block_size=8, steps=7) == blocks.Plan(8, 7, math.sqrt(120 / 7))


# ---- losses against sentence-transformers and setfit ---------------------------------------------


def theirs(name, **given):
    from sentence_transformers.sentence_transformer import losses as st
    from setfit.losses import SupConLoss

    return (SupConLoss if name == "SupConLoss" else getattr(st, name))(None, **given)


def gradient_of(loss, x):
    (grad,) = torch.autograd.grad(loss, x)
    return grad


@pytest.mark.parametrize("metric", ["cosine_distance", "euclidean_distance"])
@pytest.mark.parametrize("name", [n for n in losses.GROUP_LOSSES if n != "SupConLoss"])
def test_triplet_losses(name, metric):
    from sentence_transformers.sentence_transformer.losses import (
        BatchHardTripletLossDistanceFunction as Distance,
    )

    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    given = {"distance_metric": getattr(Distance, metric)}
    if name != "BatchHardSoftMarginTripletLoss":
        given["margin"] = 0.25
    expected = theirs(name, **given).compute_loss_from_embeddings([x], labels)
    found = losses.group_loss(name, x, labels, metric, 0.25)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, x), gradient_of(expected, x))


def test_supcon():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = theirs("SupConLoss")
    loss.model = lambda features: {"sentence_embedding": features}
    expected, found = loss([x], labels), losses.group_loss("SupConLoss", x, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, x), gradient_of(expected, x))
    alone = losses.group_loss("SupConLoss", x, torch.arange(8))
    assert torch.isfinite(alone)


@pytest.mark.parametrize("name", losses.PAIR_LOSSES)
def test_pair_losses(name):
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    target = torch.tensor([1.0, 0, 1, 0, 0, 1])
    expected = theirs(name).compute_loss_from_embeddings([x[:6], x[6:]], target)
    found = losses.pair_loss(name, torch.cosine_similarity(x[:6], x[6:]), target, None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found, x), gradient_of(expected, x))


def test_losses_are_found_by_name_and_by_class():
    from sentence_transformers.sentence_transformer import losses as st

    assert losses.loss_name(st.BatchAllTripletLoss) == "BatchAllTripletLoss"
    assert losses.loss_name("supcon") == "SupConLoss"
    with pytest.raises(ValueError, match="expected one of"):
        losses.loss_name("MarginMSELoss")
