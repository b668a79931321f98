"""SetFitTrainer: going on from a checkpoint, model_init, hyperparameters and reporters."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from sentence_transformers.sentence_transformer import losses as st
from test_setfit_trainer import DATA, LABELS, QUIET, TEXTS, folder, losses, model_of  # noqa: F401
from transformers import TrainerCallback

import fastenc
from bench import setfit_peer as peer
from fastenc.train import _setfit_checkpoint

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


def test_a_checkpoint_cut_short_is_passed_over(folder, tmp_path, monkeypatch):  # noqa: F811
    """The run stops while it writes, and goes on from the checkpoint before."""
    save, made = _setfit_checkpoint.save_file, []

    def full_disk(tensors, path):
        made.append(path)
        if len(made) == 2:
            path.write_bytes(b"half")
            raise OSError("no space left")
        save(tensors, path)

    given = {"save_steps": 1, "block_steps": 4}
    whole = trainer_of(folder, tmp_path / "whole", **given)
    whole.train_embeddings()
    monkeypatch.setattr(_setfit_checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        trainer_of(folder, tmp_path / "cut", **given).train_embeddings()
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoint-2" / "model.safetensors").is_file()
    again = trainer_of(folder, tmp_path / "cut", **given)
    again.train_embeddings(resume_from_checkpoint=True)
    expected = peer.weights(whole.model.body)
    assert all(torch.equal(v, expected[k]) for k, v in peer.weights(again.model.body).items())
    assert not list((tmp_path / "cut").rglob(".*"))


def test_only_checkpoints_are_pruned(folder, tmp_path):  # noqa: F811
    """What merely begins with the same word is somebody's own, however old."""
    own = tmp_path / "checkpoint-best", tmp_path / "checkpoint-notes.txt"
    own[0].mkdir()
    own[1].write_text("mine")
    for path in own:
        os.utime(path, (1, 1))
    trainer_of(folder, tmp_path, save_steps=1, block_steps=3, save_total_limit=1).train_embeddings()
    names = ["checkpoint-3", "checkpoint-best", "checkpoint-notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_generator_is_that_of_the_gpu_that_trains(folder, tmp_path, monkeypatch):  # noqa: F811
    gpu, put_back = torch.device("cuda", 1), []

    def state_of(device="current"):
        return torch.tensor([getattr(device, "index", 0)], dtype=torch.uint8)

    def put(state, device="current"):
        put_back.append((state.tolist(), device))

    monkeypatch.setattr(_setfit_checkpoint, "_device", lambda optimizer: gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", state_of)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    trainer_of(folder, tmp_path, block_steps=3).train_embeddings()
    trainer_of(folder, tmp_path, block_steps=3).train_embeddings(resume_from_checkpoint=True)
    assert put_back == [([1], gpu)]


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


@pytest.mark.parametrize("loss, size, most", [
    (st.CosineSimilarityLoss, 16, -1),
    (st.CosineSimilarityLoss, 5, 2),
    (st.OnlineContrastiveLoss, 10, -1),
    (st.BatchHardTripletLoss, 4, -1),
])  # fmt: skip
def test_evaluation_is_setfits(folder, tmp_path, loss, size, most):  # noqa: F811
    """The loss of stage 1 on other texts, step by step, of exact pairing without dropout. The last
    batch is a shorter one, and all but the first loss depend on what is in a batch together."""
    peer.quiet()
    held = {"text": TEXTS[::2], "label": LABELS[::2]}
    given = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "logging_steps": 1,
             "body_learning_rate": 1e-3, "loss": loss, "batch_size": size,
             "eval_max_steps": most}  # fmt: skip
    theirs = {}
    for name in ("float", "double"):
        model = peer.load(folder)
        peer.without_dropout(model.model_body if name == "float" else model.model_body.double())
        trainer, _ = peer.trained(model, TEXTS, LABELS, evaluated=held, **given)
        theirs[name] = [row["eval_embedding_loss"] for row in trainer.st_trainer.state.log_history
                        if "eval_embedding_loss" in row]  # fmt: skip
    ours = trainer_of(folder, tmp_path, evaluated=held, dropout=False, pairing="exact",
                      **given | {"save_strategy": "no", "l2_weight": 0.01})  # fmt: skip
    ours.train()
    found = [row["eval_embedding_loss"] for row in ours.state.log_history
             if "eval_embedding_loss" in row]  # fmt: skip
    assert len(found) == len(theirs["double"]) == 3
    most = 2 * np.abs(np.subtract(theirs["float"], theirs["double"])).max() + 1e-6
    assert np.abs(np.subtract(found, theirs["double"])).max() <= most
    assert np.ptp(found) > 1000 * most, "the comparison says nothing"


# ---- hyperparameters -----------------------------------------------------------------------------


def test_hyperparameter_search(folder, monkeypatch):  # noqa: F811
    made, seen = [], []

    def model_init(params):
        made.append(params)
        return model_of(folder)

    def objective(metrics):
        seen.append(trainer.args.body_embedding_learning_rate)
        return metrics["accuracy"] + seen[-1]

    def space(trial):
        return {"body_learning_rate": trial.suggest_float("body_learning_rate", 0.0, 1e-3),
                "own": trial.suggest_categorical("own", ["a", "b"])}  # fmt: skip

    args = fastenc.SetFitTrainingArguments(**QUIET)
    trainer = fastenc.SetFitTrainer(
        args=args, train_dataset=DATA, eval_dataset=DATA, model_init=model_init
    )
    grid = {"body_learning_rate": [0.0, 1e-3], "own": ["b"]}
    study = {"sampler": optuna.samplers.GridSampler(grid, seed=1), "study_name": "grid"}
    best = trainer.hyperparameter_search(space, objective, 2, **study)
    trials = best.backend.trials
    assert made == [None, *(trial.params for trial in trials)]
    assert seen == [trial.params["body_learning_rate"] for trial in trials]
    assert sorted(seen) == [0.0, 1e-3] and best.backend.study_name == "grid"
    assert best.hyperparameters == {"body_learning_rate": 1e-3, "own": "b"}
    assert best.objective == max(trial.value for trial in trials) == 1.0 + 1e-3
    assert trials[int(best.run_id)].params == best.hyperparameters
    trainer.apply_hyperparameters(best.hyperparameters, final_model=True)
    trainer.train()
    assert trainer.args.body_embedding_learning_rate == 1e-3
    assert trainer.evaluate()["accuracy"] == 1.0
    with pytest.raises(ValueError, match="model_init"):
        trainer.hyperparameter_search(space)
    trainer = fastenc.SetFitTrainer(None, args, DATA, DATA, model_init)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="optuna"):
        trainer.hyperparameter_search(space)


def test_every_trial_starts_anew(folder):  # noqa: F811
    """Also where there is nothing to choose."""
    made = []

    def model_init():
        made.append(model_of(folder))
        return made[-1]

    args = fastenc.SetFitTrainingArguments(max_steps=1, **QUIET)
    trainer = fastenc.SetFitTrainer(None, args, DATA, DATA, model_init)
    trainer.hyperparameter_search(lambda trial: {}, n_trials=2)
    assert len(made) == 3 and trainer.model is made[-1]


def test_a_search_is_setfits(folder):  # noqa: F811
    """The same sampler asks for the same trials and gets the same values of them. Under
    transformers 5, setfit 1.2 trains its first model's body in every trial: mended here."""
    peer.quiet()

    def space(trial):
        return {"body_learning_rate": trial.suggest_float("body_learning_rate", 1e-4, 1e-2),
                "seed": trial.suggest_int("seed", 1, 40)}  # fmt: skip

    def their_model(params=None):
        model = peer.load(folder)
        peer.without_dropout(model.model_body)
        return model

    def our_model():
        return model_of(folder)

    def accuracy(predicted, true):
        return float(np.mean(np.asarray(predicted) == np.asarray(true)))

    def mended(trainer):
        apply = trainer.apply_hyperparameters

        def applied(*given, **named):
            apply(*given, **named)
            trainer.st_trainer.model_wrapped = trainer.model.model_body
            trainer.st_trainer.optimizer = trainer.st_trainer.lr_scheduler = None

        trainer.apply_hyperparameters, trainer.metric = applied, accuracy
        return trainer

    def found(trainer):
        sampler = optuna.samplers.RandomSampler(seed=5)
        study = trainer.hyperparameter_search(space, n_trials=4, sampler=sampler).backend
        assert study.direction == optuna.study.StudyDirection.MAXIMIZE
        return [(trial.params, trial.value) for trial in study.trials]

    data = {"text": TEXTS[::2], "label": LABELS[::2]}
    held = {"text": [f"{a} {b}" for a in TEXTS for b in TEXTS], "label": LABELS * len(TEXTS)}
    with peer.trainer_of(**data, evaluated=held, model_init=their_model, max_steps=2) as theirs:
        expected = found(mended(theirs))
    args = fastenc.SetFitTrainingArguments(pairing="exact", max_steps=2, **QUIET)
    ours = found(fastenc.SetFitTrainer(None, args, data, held, our_model, metric=accuracy))
    assert ours == expected
    assert len({value for _, value in expected}) > 1, "the comparison says nothing"


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
