"""``SetFitTrainingArguments``: setfit's arguments of the same names, and a few of fastenc's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from fastenc.train._setfit_losses import loss_name

PAIRINGS = ("block", "exact")
SAMPLING = ("oversampling", "undersampling", "unique")
EMBEDDINGS = ("touched", "all", "frozen")


@dataclass
class SetFitTrainingArguments:
    """How a SetFit model is trained; names and defaults are setfit 1.2's unless said otherwise.

    Stage 1 trains the body on pairs of texts, stage 2 the head on embeddings. Where a pair of
    values is given, the first is of stage 1, the second of stage 2 with a differentiable head.

    Attributes:
        output_dir: where checkpoints go.
        batch_size: pairs in a batch of stage 1 (texts, for losses without pairs), texts in stage 2.
            Over several processes this is the size of the whole batch.
        num_epochs: passes over the pairs, over the texts.
        max_steps: if positive, most steps of stage 1, in place of ``num_epochs``.
        sampling_strategy: "oversampling": as many positive as negative pairs, the fewer repeated;
            "undersampling": as many, the more cut; "unique": every pair once. Block pairing weighs
            pairs accordingly.
        num_iterations: if positive, this many positive and negative pairs a text, instead.
        body_learning_rate: peak rate of the body in stage 1, and end to end in stage 2.
        head_learning_rate: of a differentiable head.
        loss: name of a loss, see :data:`fastenc.train._setfit_losses.LOSSES`, or setfit's or
            sentence-transformers' class of that name.
        distance_metric: "cosine", "euclidean" or a callable (n, dim) -> (n, n): of triplet losses.
        margin: of triplet losses.
        end_to_end: train body and differentiable head together in stage 2.
        warmup_proportion: of the steps of stage 1, linear, before the linear decay to 0.
        l2_weight: AdamW's weight decay; None: 0 in stage 1, 0.01 in stage 2 (as setfit).
        max_length: most tokens of a training text (setfit ignores it in stage 1); None: the body's.
        samples_per_label: setfit's, without effect there and here.
        show_progress_bar: on stderr.
        seed: of the order of pairs and blocks, of dropout and of the head's shuffling.
        report_to: "none" (the default here), "all", or names of transformers' integrations.
        logging_*, eval_*, save_*, load_best_model_at_end, metric_for_best_model,
            greater_is_better: as in transformers, over the steps of stage 1. The metric is
            "embedding_loss". ``save_strategy`` is "no" by default here.
        early_stopping_patience: evaluations without improvement after which stage 1 stops; None:
            never. A transformers EarlyStoppingCallback does the same.
        bf16: autocast to bfloat16 in stage 1 and end to end; ``use_amp`` is setfit's name for it
            (setfit ignores it).
        gradient_accumulation_steps: batches an optimizer step of stage 1.
        max_grad_norm: gradients of stage 1 are scaled down to this norm; 0: never.
        pairing: "block": all pairs inside a block of distinct texts, each encoded once, on a
            shorter schedule; "exact": setfit's pairs in setfit's order.
        block_size: texts in a block; None: chosen from the classes.
        block_steps: steps of block pairing; None: chosen, see
            :func:`fastenc.train._setfit_blocks.plan`.
        embedding_rows: "touched": token embeddings that no training text uses are left out of
            gradients and optimizer state, and get the weight decay they would have got at the end:
            the same weights; "all": as setfit; "frozen": token embeddings are not trained.
    """

    output_dir: str = "checkpoints"
    batch_size: int | tuple[int, int] = (16, 2)
    num_epochs: int | tuple[int, int] = (1, 16)
    max_steps: int = -1
    sampling_strategy: str = "oversampling"
    num_iterations: int | None = None
    body_learning_rate: float | tuple[float, float] = (2e-5, 1e-5)
    head_learning_rate: float = 1e-2
    loss: str | type = "CosineSimilarityLoss"
    distance_metric: str | Callable = "cosine"
    margin: float = 0.25
    end_to_end: bool = False
    use_amp: bool = False
    warmup_proportion: float = 0.1
    l2_weight: float | None = 0.01
    max_length: int | None = None
    samples_per_label: int = 2
    show_progress_bar: bool = True
    seed: int = 42
    report_to: str | list[str] | None = "none"
    run_name: str | None = None
    logging_dir: str | None = None
    logging_strategy: str = "steps"
    logging_first_step: bool = True
    logging_steps: int = 50
    eval_strategy: str = "no"
    eval_steps: int | None = None
    eval_delay: int = 0
    eval_max_steps: int = -1
    save_strategy: str = "no"
    save_steps: int = 500
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = False
    metric_for_best_model: str = field(default="embedding_loss")
    greater_is_better: bool = False
    early_stopping_patience: int | None = None
    bf16: bool = False
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    pairing: str = "block"
    block_size: int | None = None
    block_steps: int | None = None
    embedding_rows: str = "touched"

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_epochs", "body_learning_rate"):
            setattr(self, name, _pair(name, getattr(self, name)))
        self.loss = loss_name(self.loss)
        _one_of("pairing", self.pairing, PAIRINGS)
        _one_of("sampling_strategy", self.sampling_strategy, SAMPLING)
        _one_of("embedding_rows", self.embedding_rows, EMBEDDINGS)
        for name in ("batch_size", "num_epochs", "body_learning_rate"):
            if min(getattr(self, name)) < (1 if name == "batch_size" else 0):
                raise ValueError(f"{name}: too small: {getattr(self, name)}")
        for name in ("gradient_accumulation_steps", "block_size", "block_steps", "max_length"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "block_size" else 1):
                raise ValueError(f"{name}: too small: {value}")
        if not 0.0 <= self.warmup_proportion <= 1.0:
            raise ValueError(f"warmup_proportion: expected 0 to 1, got {self.warmup_proportion}")
        self.bf16 = self.bf16 or self.use_amp
        self._set_strategies()

    def _set_strategies(self) -> None:
        for name in ("logging_strategy", "eval_strategy", "save_strategy"):
            setattr(self, name, IntervalStrategy(getattr(self, name)))
        if self.eval_steps is not None and self.eval_strategy == IntervalStrategy.NO:
            self.eval_strategy = IntervalStrategy.STEPS
        if self.eval_strategy == IntervalStrategy.STEPS and not self.eval_steps:
            self.eval_steps = self.logging_steps
        for name in ("logging", "eval", "save"):
            by_steps = getattr(self, f"{name}_strategy") == IntervalStrategy.STEPS
            if by_steps and getattr(self, f"{name}_steps") < 1:
                raise ValueError(f'{name}_steps: {name}_strategy "steps" expects at least 1')
        if self.load_best_model_at_end:
            if self.eval_strategy != self.save_strategy or self.eval_strategy == "no":
                raise ValueError(
                    "load_best_model_at_end: expected the same save_strategy and eval_strategy, "
                    f"not 'no', got {self.save_strategy.value!r} and {self.eval_strategy.value!r}"
                )
            if self.eval_strategy == IntervalStrategy.STEPS and self.save_steps % self.eval_steps:
                raise ValueError(
                    f"load_best_model_at_end: save_steps ({self.save_steps}) must be a multiple of "
                    f"eval_steps ({self.eval_steps})"
                )
        if self.early_stopping_patience is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError("early_stopping_patience: expected an eval_strategy, got 'no'")

    # ---- setfit's names of the halves ----------------------------------------------------------

    @property
    def embedding_batch_size(self) -> int:
        return self.batch_size[0]

    @property
    def classifier_batch_size(self) -> int:
        return self.batch_size[1]

    @property
    def embedding_num_epochs(self) -> int:
        return self.num_epochs[0]

    @property
    def classifier_num_epochs(self) -> int:
        return self.num_epochs[1]

    @property
    def body_embedding_learning_rate(self) -> float:
        return self.body_learning_rate[0]

    @property
    def body_classifier_learning_rate(self) -> float:
        return self.body_learning_rate[1]

    # ---- as a dictionary -----------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every argument; strategies as strings."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.value if isinstance(v, IntervalStrategy) else v for k, v in values.items()}

    def to_sanitized_dict(self) -> dict[str, Any]:
        """What reporting integrations take: numbers and strings."""
        plain = (bool, int, float, str)
        return {k: v if type(v) in plain else str(v) for k, v in self.to_dict().items()}

    def to_json_string(self) -> str:
        import json

        return json.dumps(self.to_sanitized_dict(), indent=2)

    @classmethod
    def from_dict(
        cls, arguments: dict[str, Any], ignore_extra: bool = False
    ) -> SetFitTrainingArguments:
        """Build from a dictionary; unknown names raise TypeError unless ``ignore_extra``."""
        known = inspect.signature(cls).parameters
        return cls(**{k: v for k, v in arguments.items() if not ignore_extra or k in known})

    def update(self, arguments: dict[str, Any], ignore_extra: bool = False):
        """A copy with some arguments replaced."""
        return self.from_dict({**self.to_dict(), **arguments}, ignore_extra)

    def copy(self) -> SetFitTrainingArguments:
        return replace(self)


def _pair(name: str, value: Any) -> tuple:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return tuple(value)
    raise ValueError(f"{name}: expected a number or a pair of them, got {value!r}")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
