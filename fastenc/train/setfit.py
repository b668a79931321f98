"""``SetFitTrainer``: a text classifier from a few examples a class.

    stage 1   the body learns to put texts of a class together (contrastive loss on pairs)
    stage 2   a head is fitted on the body's embeddings

Tunstall et al. 2022, arXiv:2209.11055; setfit's names of arguments and methods. Texts are tokenised
once; a text is encoded once a batch however many pairs it is in; nothing is padded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastenc.models._setfit_checks import check_examples
from fastenc.models.sentence import check_texts
from fastenc.train import _metrics, _processes, _setfit_checkpoint, _setfit_search
from fastenc.train._setfit_arguments import SetFitTrainingArguments
from fastenc.train._setfit_body import BodyTraining, TokenLists, embed_all
from fastenc.train._setfit_data import column, distinct, mapped
from fastenc.train._setfit_head import fit_differentiable, fit_linear
from fastenc.train._setfit_losses import PAIR_LOSSES
from fastenc.train._setfit_objectives import Examples, objective


class SetFitTrainer:
    """Trains a :class:`fastenc.SetFitModel`.

    Args:
        model: to train, in place; None where there is a ``model_init``.
        args: training arguments.
        train_dataset: columns "text" and "label": a ``datasets.Dataset``, a dictionary of lists
            or a list of dictionaries. Labels are all strings or all integers, or, under a
            multi-target strategy, lists of 0 and 1.
        eval_dataset: of the same form; for :meth:`evaluate` and, under ``eval_strategy``, for the
            loss of stage 1.
        model_init: () or (hyperparameters) -> a model, for :meth:`hyperparameter_search`.
        metric: "accuracy", "f1", "precision", "recall", "matthews_correlation", "mse", "mae"
            (computed here, no network), or a callable (predicted, true, **metric_kwargs).
        metric_kwargs: of the metric, such as ``{"average": "macro"}``.
        callbacks: transformers' TrainerCallback objects or classes.
        column_mapping: {column of the data: "text" or "label"}.

    Attributes:
        state: of stage 1, transformers' TrainerState: ``log_history`` holds losses and rates.

    Raises:
        TypeError, ValueError: a column is missing, or an argument does not fit.
    """

    def __init__(
        self,
        model: Any = None,
        args: SetFitTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        model_init: Callable[..., Any] | None = None,
        metric: str | Callable = "accuracy",
        metric_kwargs: dict[str, Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        column_mapping: dict[str, str] | None = None,
    ):
        if args is not None and not isinstance(args, SetFitTrainingArguments):
            raise TypeError(
                f"args: expected fastenc.SetFitTrainingArguments, got {type(args).__name__}"
            )
        if not callable(metric) and metric not in _metrics.METRICS:
            raise ValueError(
                f"metric: expected a callable or one of {', '.join(_metrics.METRICS)}, "
                f"got {metric!r}"
            )
        if (model is None) == (model_init is None):
            raise ValueError("expected either a model or a model_init")
        self.args, self.model_init = args or SetFitTrainingArguments(), model_init
        if model is None:
            torch.manual_seed(self.args.seed)
            model = _setfit_search.new_model(model_init)
        self.model = model
        self.column_mapping = column_mapping
        self.train_dataset = self._mapped("train_dataset", train_dataset)
        self.eval_dataset = self._mapped("eval_dataset", eval_dataset)
        self.metric, self.metric_kwargs = metric, metric_kwargs or {}
        self.callbacks = list(callbacks or ())
        self.state: Any = None

    _REQUIRED = ("text", "label")

    def _mapped(self, name: str, dataset: Any) -> Any:
        if dataset is None:
            return None
        return mapped(name, dataset, self.column_mapping, self._REQUIRED)

    # ---- callbacks -----------------------------------------------------------------------------

    def add_callback(self, callback: Any) -> None:
        """Add a transformers TrainerCallback, or a class of it."""
        self.callbacks.append(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or all of a class."""
        self.callbacks = [
            c
            for c in self.callbacks
            if c is not callback and not (isinstance(callback, type) and isinstance(c, callback))
        ]

    def pop_callback(self, callback: Any) -> Any:
        """Take out a callback, or the first of a class, and return it; None: there is none."""
        for i, c in enumerate(self.callbacks):
            if c is callback or (isinstance(callback, type) and isinstance(c, callback)):
                return self.callbacks.pop(i)
        return None

    # ---- training ------------------------------------------------------------------------------

    def train(
        self,
        args: SetFitTrainingArguments | None = None,
        trial: dict[str, Any] | None = None,
        resume_from_checkpoint: bool | str | os.PathLike | None = None,
    ) -> None:
        """Both stages.

        Args:
            args: in place of the trainer's, for this call.
            trial: hyperparameters, see :meth:`apply_hyperparameters`.
            resume_from_checkpoint: of stage 1: a folder, or True: the last in ``output_dir``. The
                run goes on with the same batches, rates, moments and dropout.

        Raises:
            TypeError, ValueError: see :func:`fastenc.models._setfit_checks.check_examples`; also a
                checkpoint that is not there or of another run.
        """
        if trial:
            self.apply_hyperparameters(trial)
        args = args or self.args
        texts, labels = self._examples()
        tokens, rows = self._tokens(texts, args)
        rank, _ = _processes.world()
        torch.manual_seed(args.seed + rank)
        self._train_body(tokens, rows, labels, args, resume_from_checkpoint)
        self._train_head(texts, tokens, rows, labels, args)

    def train_embeddings(
        self,
        args: SetFitTrainingArguments | None = None,
        resume_from_checkpoint: bool | str | os.PathLike | None = None,
    ) -> None:
        """Stage 1 alone; arguments as :meth:`train`."""
        args = args or self.args
        texts, labels = self._examples()
        tokens, rows = self._tokens(texts, args)
        torch.manual_seed(args.seed + _processes.world()[0])
        self._train_body(tokens, rows, labels, args, resume_from_checkpoint)

    def train_classifier(self, args: SetFitTrainingArguments | None = None) -> None:
        """Stage 2 alone."""
        args = args or self.args
        texts, labels = self._examples()
        tokens, rows = self._tokens(texts, args)
        torch.manual_seed(args.seed + _processes.world()[0])
        self._train_head(texts, tokens, rows, labels, args)

    def _examples(self) -> tuple[list[str], np.ndarray]:
        if self.train_dataset is None:
            raise ValueError("train: expected a train_dataset")
        model = self.model
        return check_examples(
            column(self.train_dataset, "text"),
            column(self.train_dataset, "label"),
            model.multi_target_strategy,
            model.labels,
        )

    def _tokens(
        self, texts: Sequence[str], args: SetFitTrainingArguments
    ) -> tuple[TokenLists, np.ndarray]:
        """(token ids of every distinct text, each text's place among them)."""
        once, rows = distinct(texts)
        return self.model.body.token_ids(once, args.max_length), rows

    def _train_body(
        self, tokens: TokenLists, rows: np.ndarray, labels: np.ndarray, args: Any, resume: Any
    ) -> None:
        resume = _setfit_checkpoint.find(resume, args.output_dir)
        if args.embedding_num_epochs == 0:
            return
        examples = self._stage_1(tokens, rows, labels, args)
        training = BodyTraining(
            self.model,
            args,
            tokens,
            objective(examples, args),
            [*self.callbacks, *_reporters(args.report_to)],
            self._evaluator(args),
            resume,
        )
        self.state = training.run()

    def _stage_1(
        self, tokens: TokenLists, rows: np.ndarray, labels: np.ndarray | None, args: Any
    ) -> Examples:
        return Examples.of(rows, codes(labels), repeats=args.pairing == "exact")

    def _evaluator(self, args: Any) -> Callable[[], float] | None:
        """() -> stage 1's loss on the evaluation texts."""
        if self.eval_dataset is None or args.eval_strategy == "no":
            return None
        texts = check_texts(column(self.eval_dataset, "text"))
        labels = None
        if "label" in self._REQUIRED:
            labels = np.asarray(column(self.eval_dataset, "label"))
        tokens, rows = self._tokens(texts, args)
        examples = self._stage_1(tokens, rows, labels, args)
        update = {"max_steps": args.eval_max_steps, "gradient_accumulation_steps": 1}
        goal = objective(examples, args.update(update))

        def loss() -> float:
            with torch.no_grad():
                return float(goal.whole(embed_all(self.model.body, tokens)))

        return loss

    def _train_head(
        self,
        texts: Sequence[str],
        tokens: TokenLists,
        rows: np.ndarray,
        labels: np.ndarray,
        args: Any,
    ) -> None:
        model = self.model
        if model.body.default_prompt is not None:
            tokens, rows = self._prompted(texts, args)
        each = [tokens[i] for i in rows]
        if model.has_differentiable_head:
            fit_differentiable(model, each, self._class_numbers(labels), args)
        else:
            fit_linear(model, each, labels)

    def _prompted(self, texts: Sequence[str], args: Any) -> tuple[TokenLists, np.ndarray]:
        """Tokens as prediction sees them, with the body's default prompt."""
        prompt = self.model.body.prompts[self.model.body.default_prompt]
        return self._tokens([prompt + text for text in texts], args)

    def _class_numbers(self, labels: np.ndarray) -> np.ndarray:
        """Labels as a differentiable head's outputs; names that are new become the model's."""
        if labels.ndim == 2 or labels.dtype.kind != "U":
            return labels
        if self.model.labels is None:
            self.model.labels = np.unique(labels).tolist()
        place = {name: i for i, name in enumerate(self.model.labels)}
        unknown = sorted(set(labels.tolist()) - set(place))
        if unknown:
            raise ValueError(
                f"labels: expected the model's {self.model.labels}, got {unknown[0]!r}"
            )
        return np.asarray([place[label] for label in labels.tolist()])

    # ---- hyperparameters -----------------------------------------------------------------------

    def apply_hyperparameters(self, params: dict[str, Any], final_model: bool = False) -> None:
        """Take over the training arguments among ``params`` and make a new model with all of them.

        Args:
            final_model: drop ``model_init``: this model stays.

        Raises:
            ValueError: there is no ``model_init``.
        """
        if self.model_init is None:
            raise ValueError("hyperparameters: need a model_init to make a model with")
        self.args = self.args.update(params, ignore_extra=True)
        torch.manual_seed(self.args.seed)
        self.model = _setfit_search.new_model(self.model_init, params)
        if final_model:
            self.model_init = None

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]],
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 10,
        direction: str = "maximize",
        **study: Any,
    ) -> _setfit_search.BestRun:
        """Train and evaluate a new model in each trial, with optuna.

        Args:
            hp_space: (optuna's trial) -> hyperparameters: training arguments, and whatever
                ``model_init`` takes.
            compute_objective: metrics -> what is sought; by default their sum.
            direction: "maximize" or "minimize".
            study: arguments of ``optuna.create_study``; ``timeout`` of its optimize.

        Returns:
            setfit's BestRun, whose ``hyperparameters`` :meth:`apply_hyperparameters` takes.

        Raises:
            ImportError: optuna is missing. ValueError: no ``model_init`` or ``eval_dataset``.
        """
        return _setfit_search.search(
            self, hp_space, compute_objective, n_trials, direction, **study
        )

    # ---- evaluation ----------------------------------------------------------------------------

    def evaluate(self, dataset: Any = None, metric_key_prefix: str = "test") -> dict[str, Any]:
        """The metric on a dataset, by default the evaluation dataset: {name: value}.

        ``metric_key_prefix`` is setfit's, of the names in its model card: those of the result have
        none there either.

        Raises:
            ValueError: there is no dataset, or its labels are not of the model's kind.
        """
        data = self.eval_dataset
        if dataset is not None:
            data = mapped("dataset", dataset, self.column_mapping, ("text", "label"))
        if data is None:
            raise ValueError("evaluate: expected a dataset, here or as eval_dataset")
        true = np.asarray(column(data, "label"))
        found = self.model.predict(column(data, "text"), as_numpy=True, use_labels=False)
        found = np.asarray(found)
        if true.dtype.kind == "U" and found.dtype.kind != "U" and self.model.labels is not None:
            found = np.asarray(self.model.labels)[found]
        if len(true) and (true.dtype.kind == "U") != (found.dtype.kind == "U"):
            raise ValueError(
                f"evaluate: expected labels as the model predicts them, like "
                f"{found[0].tolist()!r}, got {true[0].tolist()!r}"
            )
        if true.dtype.kind == "U":
            names = np.unique(np.concatenate([true, found]))
            true, found = np.searchsorted(names, true), np.searchsorted(names, found)
        return _metrics.compute(self.metric, found, true, self.metric_kwargs)


class SetFitDistillationTrainer(SetFitTrainer):
    """Trains a small student on texts without labels, from a trained teacher.

    Stage 1: the cosine of two texts in the student approaches that in the teacher. Stage 2: the
    head is fitted on the teacher's predictions. (In setfit 1.2 every target of stage 1 is the
    teacher's cosine of the first text with itself, 1.)

    Args:
        teacher_model: a SetFitModel, or anything with its ``encode`` and ``predict``.
        student_model: as ``model`` of :class:`SetFitTrainer`.
        train_dataset: a column "text".
        others: as :class:`SetFitTrainer`.

    Raises:
        ValueError: a loss that is not over pairs.
    """

    _REQUIRED = ("text",)

    def __init__(
        self,
        teacher_model: Any,
        student_model: Any,
        args: SetFitTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **others: Any,
    ):
        super().__init__(student_model, args, train_dataset, eval_dataset, **others)
        self.teacher_model = teacher_model
        if self.args.loss not in PAIR_LOSSES[:1]:
            raise ValueError(f"loss: distillation needs {PAIR_LOSSES[0]}, got {self.args.loss}")
        self._texts: list[str] = []

    def _examples(self) -> tuple[list[str], np.ndarray]:
        if self.train_dataset is None:
            raise ValueError("train: expected a train_dataset")
        texts = column(self.train_dataset, "text")
        labels = self.teacher_model.predict(check_texts(texts), as_numpy=True, use_labels=False)
        if self.model.labels is None:
            self.model.labels = getattr(self.teacher_model, "labels", None)
        return check_examples(texts, labels, self.model.multi_target_strategy, None)

    def _tokens(self, texts: Sequence[str], args: Any) -> tuple[TokenLists, np.ndarray]:
        self._texts = distinct(texts)[0]
        return super()._tokens(texts, args)

    def _stage_1(
        self, tokens: TokenLists, rows: np.ndarray, labels: np.ndarray | None, args: Any
    ) -> Examples:
        embeddings = torch.as_tensor(self.teacher_model.encode(self._texts)).float().cpu()
        unit = torch.nn.functional.normalize(embeddings, dim=1)
        return Examples(np.arange(len(tokens)), teacher=(unit @ unit.T).numpy())


def codes(labels: np.ndarray) -> np.ndarray:
    """Class numbers (n,), or the rows of 0 and 1 (n, outputs) themselves."""
    return labels if labels.ndim == 2 else np.unique(labels, return_inverse=True)[1]


def _reporters(report_to: str | Sequence[str] | None) -> list[Any]:
    """transformers' callbacks of these integrations, on the first process."""
    if report_to in (None, "none", [], ["none"]) or _processes.world()[0] != 0:
        return []
    from transformers.integrations import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )

    if report_to in ("all", ["all"]):
        report_to = get_available_reporting_integrations()
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return get_reporting_integration_callbacks(names)
