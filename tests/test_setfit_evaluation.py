"""SetFitTrainer: evaluation, what is kept as the best, callbacks, data sets; bad input is told."""

# ruff: noqa: F811  (folder is a fixture of test_setfit_trainer.py)

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_setfit_trainer import DATA, LABELS, QUIET, TEXTS, folder, model_of, train  # noqa: F401
from transformers import TrainerCallback

import fastenc
from bench import setfit_peer as peer
from fastenc.train._metrics import compute


def test_evaluation_checkpoints_and_the_best(folder, tmp_path):
    given = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
             "load_best_model_at_end": True, "output_dir": str(tmp_path / "out"),
             "save_total_limit": 2, "body_learning_rate": 1e-3, "block_steps": 8}  # fmt: skip
    model = model_of(folder)
    args = fastenc.SetFitTrainingArguments(**QUIET, **given)
    trainer = fastenc.SetFitTrainer(model, args, DATA, {"text": TEXTS[::2], "label": LABELS[::2]})
    trainer.train()
    values = [r["eval_embedding_loss"] for r in trainer.state.log_history
              if "eval_embedding_loss" in r]  # fmt: skip
    assert len(values) == 4 and trainer.state.best_metric == min(values)
    assert 1 <= len(list((tmp_path / "out").glob("checkpoint-*"))) <= 3
    best = trainer.state.best_model_checkpoint
    SentenceTransformer(best, device="cpu").encode(TEXTS[:2])
    saved = fastenc.SentenceBody.from_folder(best).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in model.body.state_dict().items())


@pytest.mark.parametrize("delay, best", [(0, None), (2, "checkpoint-2")])
def test_the_best_step_need_not_be_saved(folder, tmp_path, delay, best):
    """All steps are as good, so that the first to be evaluated is the best."""
    args = fastenc.SetFitTrainingArguments(
        eval_strategy="steps", eval_steps=1, eval_delay=delay, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, body_learning_rate=0.0, block_steps=4,
        output_dir=str(tmp_path), **QUIET,
    )  # fmt: skip
    trainer = fastenc.SetFitTrainer(model_of(folder), args, DATA, DATA)
    trainer.train_embeddings()
    found = trainer.state.best_model_checkpoint
    assert found == (None if best is None else str(tmp_path / best))


def test_evaluation_sees_the_weights_of_its_step(folder, tmp_path):
    """Also after the model has predicted before training, with copies of its weights."""
    model = model_of(folder)
    model.encode(TEXTS)
    args = fastenc.SetFitTrainingArguments(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, block_steps=4,
        save_total_limit=None, output_dir=str(tmp_path), body_learning_rate=1e-2, **QUIET,
    )  # fmt: skip
    trainer = fastenc.SetFitTrainer(model, args, DATA, DATA)
    trainer.train()
    seen = [r["eval_embedding_loss"] for r in trainer.state.log_history
            if "eval_embedding_loss" in r]  # fmt: skip
    for step, value in enumerate(seen, 1):
        fresh = fastenc.SetFitModel.from_pretrained(tmp_path / f"checkpoint-{step}")
        loss = fastenc.SetFitTrainer(fresh, args, DATA, DATA)._evaluator(args)()
        assert loss == value
    assert np.ptp(seen) > 1e-2
    assert np.array_equal(fresh.encode(TEXTS), model.encode(TEXTS))


def test_early_stopping_and_callbacks(folder):
    class Seen(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            Seen.steps += 1
            assert kwargs["model"] is model and kwargs["optimizer"] is not None

    model = model_of(folder)
    args = fastenc.SetFitTrainingArguments(
        eval_strategy="steps", eval_steps=1, early_stopping_patience=2, body_learning_rate=0.0,
        block_steps=30, **QUIET,
    )  # fmt: skip
    trainer = fastenc.SetFitTrainer(model, args, DATA, DATA, callbacks=[Seen])
    trainer.train_embeddings()
    assert trainer.state.global_step == Seen.steps == 3  # the first is the best, two are no better


def test_callbacks_find_the_model_whole(folder, tmp_path):
    """They predict texts that training never sees, and save what can be read."""
    unseen, seen = ["zebras, quite unseen"], []

    class Uses(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(model.encode(unseen))
            model.save_pretrained(tmp_path / str(state.global_step))

    given = {"block_steps": 3, "body_learning_rate": 1e-2, "l2_weight": 0.5}
    alone, used = model_of(folder), model_of(folder)
    train(alone, **given)
    args = fastenc.SetFitTrainingArguments(**QUIET, **given)
    fastenc.SetFitTrainer(used, args, DATA, callbacks=[Uses()]).train()
    for step, vectors in enumerate(seen, 1):
        saved = fastenc.SetFitModel.from_pretrained(tmp_path / str(step))
        assert np.abs(saved.encode(unseen) - vectors).max() < 1e-6
    assert np.abs(seen[2] - used.encode(unseen)).max() < 1e-6 < np.abs(seen[0] - seen[2]).max()
    expected = peer.weights(alone.body)
    for name, value in peer.weights(used.body).items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name


def test_datasets_and_columns(folder):
    import datasets

    with peer.counted_fingerprints():
        data = datasets.Dataset.from_dict({"sentence": TEXTS, "class": LABELS, "text": TEXTS})
    mapping = {"sentence": "text", "class": "label"}
    args = fastenc.SetFitTrainingArguments(max_steps=1, **QUIET)
    trainer = fastenc.SetFitTrainer(
        model_of(folder), args, data, data, column_mapping=mapping, metric="f1"
    )
    trainer.train()
    assert set(trainer.evaluate()) == {"f1"}
    rows = [{"text": t, "label": i} for t, i in zip(TEXTS, LABELS, strict=True)]
    assert "accuracy" in train(model_of(folder), rows, max_steps=1).evaluate(rows)
    with pytest.raises(ValueError, match=r"expected the columns \['text', 'label'\]"):
        fastenc.SetFitTrainer(model_of(folder), args, {"sentence": TEXTS})
    with pytest.raises(ValueError, match="one split"):
        fastenc.SetFitTrainer(model_of(folder), args, datasets.DatasetDict({"train": data}))


def test_evaluation_is_of_the_models_labels(folder):
    """Not of numbers where the model says names, which are never equal."""
    names = {"text": TEXTS, "label": ["good" if i else "bad" for i in LABELS]}
    named = train(model_of(folder), names, max_steps=1)
    assert named.evaluate(names, metric_key_prefix="held") == named.evaluate(names)
    with pytest.raises(ValueError, match=r"like '(good|bad)', got [01]"):
        named.evaluate(DATA)
    with pytest.raises(ValueError, match="got 'good'"):
        train(model_of(folder), max_steps=1).evaluate(names)


def test_metrics():
    true, found = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    assert compute("accuracy", found, true, {}) == {"accuracy": 0.75}
    assert compute("f1", found, true, {"average": "macro"})["f1"] == pytest.approx(7 / 9)
    assert compute(lambda p, t: {"wrong": int((p != t).sum())}, found, true, {}) == {"wrong": 1}
    rows = np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]])
    assert compute("accuracy", *rows, {}) == {"accuracy": 0.5}


@pytest.mark.parametrize("texts, labels, error", [
    (TEXTS, [1] * 12, "at least 2 classes"),
    (["", *TEXTS[1:]], LABELS, "empty text"),
    ([None, *TEXTS[1:]], LABELS, "expected strings"),
    (TEXTS, [*LABELS[1:], "x"], "one type"),
    (TEXTS, [*LABELS[1:], None], "None at index 11"),
    (TEXTS, LABELS[1:], "as many labels as texts"),
    (TEXTS[:1], [1], "at least 2 classes"),
])  # fmt: skip
def test_bad_examples_are_told(folder, texts, labels, error):
    with pytest.raises((ValueError, TypeError), match=error):
        train(model_of(folder), {"text": texts, "label": labels})


def test_fewer_examples_than_classes(folder):
    model = model_of(folder, labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="an example of every label"):
        train(model, {"text": TEXTS[5:7], "label": ["a", "b"]})


def test_a_text_with_two_labels_is_warned_of(folder, caplog):
    data = {"text": [*TEXTS, TEXTS[0]], "label": [*LABELS, 0]}
    with caplog.at_level(logging.WARNING, "fastenc"):
        train(model_of(folder), data, max_steps=1)
    assert "occur with different labels" in caplog.text


@pytest.mark.parametrize("given, error", [
    ({"pairing": "pairs"}, "pairing"),
    ({"sampling_strategy": "all"}, "sampling_strategy"),
    ({"warmup_proportion": 1.5}, "warmup_proportion"),
    ({"loss": "nothing"}, "loss"),
    ({"load_best_model_at_end": True}, "same save_strategy"),
    ({"early_stopping_patience": 2}, "eval_strategy"),
    ({"batch_size": (16, 2, 1)}, "batch_size"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
])  # fmt: skip
def test_bad_arguments_are_told(given, error):
    with pytest.raises(ValueError, match=error):
        fastenc.SetFitTrainingArguments(**given)
