"""Evaluation during training: scores against gliner's evaluator, early stopping, best model."""

from __future__ import annotations

import random

import gliner_tests
import pytest
import torch
from test_train_gliner import HEADS, arguments, examples, steady_model
from transformers import EarlyStoppingCallback

import fastenc
from fastenc.train import GLiNERTrainer
from fastenc.train import _gliner_metrics as metrics


def test_scores_are_gliners():
    from gliner.evaluation import BaseNEREvaluator

    draw = random.Random(0)
    texts = []
    for _ in range(30):
        pair = [
            {(draw.randint(0, 4), draw.randint(5, 6), draw.choice("abc")) for _ in range(4)}
            for _ in range(2)
        ]
        texts.append([sorted(x) for x in pair])
    counts: dict = {}
    for true, found in texts:
        for kind, one in metrics.count(true, found).items():
            counts[kind] = counts.get(kind, metrics.Counts()) + one
    ours = metrics.summary(counts)
    judge = BaseNEREvaluator([], [])
    flat = [[[kind, (a, b)] for a, b, kind in x] for pair in texts for x in pair]
    true, found = flat[::2], flat[1::2]
    expected = judge.compute_prf(true, found)
    assert ours["f1"] == pytest.approx(float(expected["f_score"]))
    assert ours["precision"] == pytest.approx(float(expected["precision"]))
    assert ours["recall"] == pytest.approx(float(expected["recall"]))
    each = [metrics.summary({k: c})["f1"] for k, c in counts.items()]
    assert ours["macro_f1"] == pytest.approx(sum(each) / 3)
    assert ours["f1/a"] == metrics.summary({"a": counts["a"]})["f1"]


@pytest.mark.parametrize("token_level", [False, True])
def test_entities_are_gliners(token_level):
    """On random scores with ties, against gliner's own decoder."""
    from types import SimpleNamespace

    from gliner.decoding import SpanDecoder, TokenDecoder

    from fastenc.models._gliner_decode import entities_in_words

    lengths, labels = [9, 1, 14], 3
    names = {i + 1: f"t{i}" for i in range(labels)}
    logits = (
        torch.randn(sum(lengths), *((labels, 3) if token_level else (4, labels))).mul(2).round()
    )
    rows = logits.split(lengths)
    for row in rows:
        if token_level:
            row[..., 2] += 2
        else:
            row[torch.arange(len(row))[:, None] + torch.arange(4) >= len(row)] = float("-inf")
    kind = TokenDecoder if token_level else SpanDecoder
    decoder = kind(SimpleNamespace(represent_spans=False))
    found = entities_in_words(logits, lengths, [labels] * 3, token_level)
    for row, ours in zip(rows, found, strict=True):
        spans = decoder.decode(
            [["w"] * len(row)], [names], row[None], flat_ner=True, threshold=0.5, multi_label=False
        )[0]
        theirs = sorted((s.start, s.end, s.entity_type) for s in spans)
        assert theirs == sorted((a, b, names[c + 1]) for a, b, c, _ in ours)


def test_nothing_annotated_and_nothing_found():
    assert metrics.summary({})["f1"] == 0.0
    assert metrics.summary(metrics.count([(0, 1, "a")], []))["recall/a"] == 0.0


@pytest.mark.parametrize("head", HEADS)
def test_entities_are_those_of_the_logits(head, tmp_path):
    """Logits that say what is annotated score 1; one entity that they lack costs its recall."""
    model = gliner_tests.ours(steady_model(**HEADS[head]), tmp_path / "model")
    rows = examples(11, seed=9)
    trainer = GLiNERTrainer(model, arguments(tmp_path), None, rows)
    hidden: list[int] = []

    def oracle(batch, embeds=None):
        data = packed.pop(0)
        found = torch.full(shape_of(batch, data), -9.0)
        found[data.positives.unbind(1)] = 9.0
        if hidden:
            found[: batch.word_lengths[0]] = -9.0
        return found

    def shape_of(batch, data):
        labels = len(data.examples[0].types)
        kind = model.config.token_level
        return (batch.words, labels, 3) if kind else (batch.words, model.config.max_width, labels)

    def scores():
        packed[:] = [inputs["batch"] for inputs in trainer.get_eval_dataloader()]
        return trainer.evaluate()

    packed: list = []
    model.forward = oracle
    found = scores()
    assert {found[f"eval_{k}"] for k in ("f1", "macro_f1", "f1/city", "recall/person")} == {1.0}
    assert found["eval_loss"] < 0.1
    hidden.append(1)
    found = scores()
    annotated = sum(len(row["ner"]) for row in rows)
    lost = sum(len(rows[i]["ner"]) for i in range(0, len(rows), 8))
    assert found["eval_precision"] == 1.0
    assert found["eval_recall"] == pytest.approx(1 - lost / annotated)


def test_it_learns(tmp_path):
    theirs = steady_model(**HEADS["bi-encoder"])
    for module in theirs.model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LSTM, torch.nn.LayerNorm)):
            module.reset_parameters()
    model = gliner_tests.ours(theirs, tmp_path / "model")
    args = arguments(tmp_path, max_steps=80, learning_rate=3e-3, per_device_train_batch_size=8,
                     loss_type="bce", weight_decay=0.0, logging_steps=20)  # fmt: skip
    trainer = GLiNERTrainer(model, args, examples(60), examples(20, seed=9))
    trainer.train()
    assert trainer.evaluate()["eval_f1"] > 0.8


def test_early_stopping_keeps_the_best_model(tmp_path):
    model = gliner_tests.ours(steady_model(), tmp_path / "model")
    args = arguments(
        tmp_path / "run", max_steps=12, learning_rate=5.0, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer = GLiNERTrainer(
        model, args, examples(16), {"dev": examples(8, seed=3)}["dev"],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    seen = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r]
    assert trainer.state.global_step < 12 and trainer.state.best_metric == min(seen)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), rel=1e-4)
    best = fastenc.GLiNER.from_pretrained(trainer.state.best_model_checkpoint)
    for (name, a), b in zip(best.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
