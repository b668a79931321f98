"""Hyperparameter search: a new model for each trial, judged by ``evaluate``."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.trainer_utils import default_compute_objective


class BestRun(NamedTuple):
    """setfit's: of the best trial its number, what was sought, its hyperparameters; the study."""

    run_id: str
    objective: float
    hyperparameters: dict[str, Any]
    backend: Any = None


def new_model(model_init: Callable[..., Any], params: dict[str, Any] | None = None) -> Any:
    """``model_init()``, or ``model_init(params)`` where it takes an argument.

    Raises:
        TypeError: it takes more, or returns None.
    """
    count = len(inspect.signature(model_init).parameters)
    if count > 1:
        raise TypeError(f"model_init: expected a function of no or one argument, it has {count}")
    model = model_init(params) if count else model_init()
    if model is None:
        raise TypeError("model_init: expected a model, it returned None")
    return model


def search(
    trainer: Any,
    hp_space: Callable[[Any], dict[str, Any]],
    compute_objective: Callable[[dict[str, float]], float] | None,
    n_trials: int,
    direction: str,
    **study: Any,
) -> BestRun:
    """See :meth:`fastenc.SetFitTrainer.hyperparameter_search`."""
    if trainer.model_init is None:
        raise ValueError("hyperparameter_search: needs a model_init: each trial starts anew")
    if trainer.eval_dataset is None:
        raise ValueError("hyperparameter_search: needs an eval_dataset to judge by")
    if importlib.util.find_spec("optuna") is None:
        raise ImportError("hyperparameter_search: needs optuna: pip install optuna")
    import optuna

    judge = compute_objective or default_compute_objective
    timeout = study.pop("timeout", None)

    def objective(trial: Any) -> float:
        trainer.apply_hyperparameters(hp_space(trial))
        trainer.train()
        return judge(trainer.evaluate())

    found = optuna.create_study(direction=direction, **study)
    found.optimize(objective, n_trials=n_trials, timeout=timeout)
    best = found.best_trial
    return BestRun(str(best.number), best.value, best.params, found)
