"""fastenc.GLiNER against the gliner package: files, logits, gradients."""

from __future__ import annotations

import copy

import gliner_tests
import pytest
import torch
from model_tests import check_gradients

import fastenc
from fastenc.testing import assert_parity

WORDS = [
    text.split()
    for text in (
        "Marie Curie arbeitet in Paris für Siemens AG .",
        "東京都",
        "one two three four five six seven eight nine ten eleven twelve thirteen São Paulo",
        "x y",
    )
]
LABELS = ["person", "city", "company name", "date"]


def packed(model, words=WORDS, labels=LABELS):
    rows = labels if isinstance(labels[0], list) else [labels] * len(words)
    return model.words.batch(words, rows)


def check(theirs, model, words=WORDS, labels=LABELS):
    """Logits on valid spans and every gradient, by the parity rule."""
    batch = packed(model, words, labels)
    valid = batch.span_mask(model.config.max_width)
    exact_model = copy.deepcopy(theirs)
    exact_model.model.double()

    def run(logits, parameters):
        seen = logits[valid]
        g = torch.Generator().manual_seed(3)
        weights = torch.randn(seen.shape, generator=g).to(seen)
        named = [(n, p) for n, p in parameters if p.requires_grad]
        grads = torch.autograd.grad((seen * weights).sum(), [p for _, p in named],
                                    allow_unused=True)  # fmt: skip
        return seen.detach(), {n: g for (n, _), g in zip(named, grads, strict=True)}

    plain, plain_grads = run(
        gliner_tests.their_logits(theirs, words, labels)[0], theirs.model.named_parameters()
    )
    exact, exact_grads = run(
        gliner_tests.their_logits(exact_model, words, labels)[0],
        exact_model.model.named_parameters(),
    )
    actual, grads = run(model.logits(batch), model.named_parameters())
    assert exact.std() > 0.1
    assert_parity("logits", actual, plain, exact)
    used = {n for n, g in exact_grads.items() if g is not None and g.abs().max() > 0}
    assert len(used) > 20 and all(grads[n] is not None for n in used)
    pick = [{n: found[n] for n in used} for found in (grads, plain_grads, exact_grads)]
    check_gradients(*pick)


@pytest.mark.parametrize("backbone", gliner_tests.BACKBONES)
def test_logits_and_gradients(backbone, tmp_path):
    theirs = gliner_tests.their_model(backbone)
    with fastenc.record() as ran:
        check(theirs, gliner_tests.ours(theirs, tmp_path))
    assert ran.fallbacks == []
    assert ran.calls["span_score"]["cpu"] == 1
