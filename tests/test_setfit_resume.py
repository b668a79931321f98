"""SetFitTrainer: going on from a checkpoint, model_init, hyperparameters and reporters."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_setfit_trainer import DATA, LABELS, QUIET, TEXTS, folder, losses, model_of  # noqa: F401
from transformers import TrainerCallback

import fastenc
from bench import setfit_peer as peer

SAVING = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "logging_steps": 1,
          "body_learning_rate": 1e-3, "l2_weight": 0.3, **QUIET}  # fmt: skip


def trainer_of(source, out, data=DATA, evaluated=None, dropout=True, **given):
    args = fastenc.SetFitTrainingArguments(**{**SAVING, "output_dir": str(out), **given})
    return fastenc.SetFitTrainer(model_of(source, dropout=dropout), args, data, evaluated)


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [
    {"block_steps": 8},
    {"pairing": "exact", "num_epochs": (2, 1), "gradient_accumulation_steps": 2},
    {"pairing": "exact", "max_steps": 7, "embedding_rows": "all"},
])  # fmt: skip
def test_going_on_is_never_having_stopped(folder, tmp_path, given):  # noqa: F811
    whole = trainer_of(folder, tmp_path, **given)
    whole.train()
    expected = peer.weights(whole.model.body)
    steps = sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*"))
    assert steps[:2] == [3, 6]
    for resume in (tmp_path / "checkpoint-3", True):
        torch.manual_seed(99)
        again = trainer_of(folder, tmp_path, **given)
        again.train(resume_from_checkpoint=resume)
        for name, value in peer.weights(again.model.body).items():
            assert torch.equal(value, expected[name]), name
        assert losses(again) == losses(whole)
        assert again.state.global_step == whole.state.global_step
        assert np.array_equal(again.model.predict_proba(TEXTS), whole.model.predict_proba(TEXTS))


def test_checkpoints_hold_no_pickle(folder, tmp_path):  # noqa: F811
    trainer_of(folder, tmp_path, block_steps=3).train_embeddings()
    files = [p for p in (tmp_path / "checkpoint-3").rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".pt", ".pth", ".pkl", ".bin")]
    model = sum(p.stat().st_size for p in files if p.name == "model.safetensors")
    moments = sum(p.stat().st_size for p in files if p.name == "training.safetensors")
    assert moments < 0.5 * model, "rows that no text uses have no moments"


def test_a_stopped_run_counts_its_patience_on(folder, tmp_path):  # noqa: F811
    """Two evaluations without improvement in one run, or one in each of two runs."""

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    given = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "block_steps": 30,
             "early_stopping_patience": 2, "body_learning_rate": 10.0, "warmup_proportion": 0.0,
             "load_best_model_at_end": True}  # fmt: skip
    whole = trainer_of(folder, tmp_path / "whole", evaluated=DATA, **given)
    whole.train_embeddings()
    first = trainer_of(folder, tmp_path / "parts", evaluated=DATA, **given)
    first.add_callback(StopAt)
    first.train_embeddings()
    assert first.state.global_step == 2 < whole.state.global_step < 30
    second = trainer_of(folder, tmp_path / "parts", evaluated=DATA, **given)
    second.train_embeddings(resume_from_checkpoint=True)
    assert second.state.global_step == whole.state.global_step


def test_checkpoints_that_do_not_fit(folder, tmp_path):  # noqa: F811
    trainer_of(folder, tmp_path, block_steps=4).train_embeddings()
    with pytest.raises(ValueError, match="of a run of 4 steps, this one has 5"):
        trainer_of(folder, tmp_path, block_steps=5).train(resume_from_checkpoint=True)
    others = {"text": [*TEXTS[1:], "entirely different words"], "label": LABELS}
    with pytest.raises(ValueError, match="other training texts"):
        trainer = trainer_of(folder, tmp_path, data=others, block_steps=4)
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint in"):
        trainer_of(folder, tmp_path / "none").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"has no training\.safetensors"):
        (tmp_path / "checkpoint-3" / "training.safetensors").unlink()
        trainer = trainer_of(folder, tmp_path, block_steps=4)
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")


# ---- evaluation is setfit's ----------------------------------------------------------------------


# ---- hyperparameters -----------------------------------------------------------------------------


def fake_optuna(space: list[dict]) -> types.ModuleType:
    """create_study and the study's optimize and best_trial, going through ``space``."""
    module = types.ModuleType("optuna")
    module.__spec__ = types.SimpleNamespace(name="optuna")

    class Study:
        def __init__(self, direction, **given):
            self.better = {"maximize": max, "minimize": min}[direction]
            self.given = given

        def optimize(self, objective, n_trials, timeout):
            trials = []
            for number, params in enumerate(space[:n_trials]):
                trial = types.SimpleNamespace(number=number, params=params)
                trial.value = objective(trial)
                trials.append(trial)
            self.best_trial = self.better(trials, key=lambda trial: trial.value)

    module.create_study = Study
    return module


def test_hyperparameter_search(folder, monkeypatch):  # noqa: F811
    made = []

    def model_init(params):
        made.append(params)
        return model_of(folder)

    args = fastenc.SetFitTrainingArguments(**QUIET)
    trainer = fastenc.SetFitTrainer(
        args=args, train_dataset=DATA, eval_dataset=DATA, model_init=model_init
    )
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="optuna"):
        trainer.hyperparameter_search(lambda trial: trial.params)
    space = [{"body_learning_rate": 0.0, "num_epochs": 0}, {"body_learning_rate": 1e-3, "own": 1}]
    monkeypatch.setitem(sys.modules, "optuna", fake_optuna(space))
    seen = []

    def objective(metrics):
        seen.append(trainer.args.body_embedding_learning_rate)
        return metrics["accuracy"] + seen[-1]

    best = trainer.hyperparameter_search(lambda trial: trial.params, objective, 2, seed=3)
    assert made == [None, *space] and seen == [0.0, 1e-3]
    assert best.hyperparameters == space[1] and best.run_id == "1"
    assert best.run_summary.given == {"seed": 3}
    trainer.apply_hyperparameters(best.hyperparameters, final_model=True)
    trainer.train()
    assert trainer.evaluate()["accuracy"] == 1.0
    with pytest.raises(ValueError, match="model_init"):
        trainer.hyperparameter_search(lambda trial: trial.params)


def test_model_init(folder):  # noqa: F811
    args = fastenc.SetFitTrainingArguments(**QUIET)
    with pytest.raises(ValueError, match="either a model or a model_init"):
        fastenc.SetFitTrainer(args=args)
    with pytest.raises(ValueError, match="either a model or a model_init"):
        fastenc.SetFitTrainer(model_of(folder), args, model_init=lambda: model_of(folder))
    for init in (lambda: None, lambda a, b: a):
        with pytest.raises(TypeError, match="model_init"):
            fastenc.SetFitTrainer(args=args, model_init=init)
    trainer = fastenc.SetFitTrainer(args=args, train_dataset=DATA, model_init=lambda: "model")
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        trainer.hyperparameter_search(lambda trial: {})


# ---- reporters -----------------------------------------------------------------------------------


def test_report_to(folder, monkeypatch):  # noqa: F811
    """Names of transformers' integrations get every log, with the arguments."""
    from transformers.integrations import integration_utils

    class Reporter(TrainerCallback):
        logs, begun = [], []

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun.append((args.to_sanitized_dict(), args.run_name, args.logging_dir))

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    args = {"report_to": ["tensorboard"], "block_steps": 2, "save_strategy": "no"}
    trainer_of(folder, Path("nowhere"), run_name="a", **args).train()
    assert Reporter.begun[0][0]["block_steps"] == 2 and Reporter.begun[0][1] == "a"
    assert [log for log in Reporter.logs if "embedding_loss" in log]


def test_callbacks_come_and_go(folder):  # noqa: F811
    class A(TrainerCallback): ...

    class B(A): ...

    trainer = fastenc.SetFitTrainer(model_of(folder), callbacks=[A(), B()])
    assert type(trainer.pop_callback(B)) is B and trainer.pop_callback(B) is None
    trainer.add_callback(B)
    trainer.remove_callback(A)
    assert trainer.callbacks == [B]
