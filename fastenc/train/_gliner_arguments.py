"""The arguments of GLiNER training."""

from __future__ import annotations

from dataclasses import dataclass

import transformers

from fastenc.train import _gliner_loss as losses


@dataclass
class GLiNERTrainingArguments(transformers.TrainingArguments):
    """transformers' TrainingArguments, and gliner's.

    Attributes:
        others_lr: learning rate of everything but the encoders (``token_rep_layer``), which take
            ``learning_rate``; None: ``learning_rate`` too. others_weight_decay: theirs, then.
        loss_type: "focal", gliner's loss, or "bce", binary cross-entropy.
        focal_loss_alpha, focal_loss_gamma, focal_loss_prob_margin, label_smoothing: of
            :func:`fastenc.train._gliner_loss.focal_loss`; the defaults make it a cross-entropy.
        loss_reduction: "sum" over all elements, or "mean": over spans (of a token model: over
            words and labels) of the whole batch.
        negatives: share of the negatives that keep their loss. masking: which elements are
            negatives: "none" (all keep it), "global", "label" or "span". Token models obey it too;
            gliner's ignore it.
        max_types, max_neg_type_ratio: None: the model configuration's.
        random_drop: of each example's types a random number is kept.
        shuffle_types: types in random order, else own types first.
        eval_threshold: of the probability, in evaluation.
    """

    others_lr: float | None = None
    others_weight_decay: float = 0.0
    loss_type: str = "focal"
    focal_loss_alpha: float = -1.0
    focal_loss_gamma: float = 0.0
    focal_loss_prob_margin: float = 0.0
    label_smoothing: float = 0.0
    loss_reduction: str = "sum"
    negatives: float = 1.0
    masking: str = "global"
    max_types: int | None = None
    max_neg_type_ratio: int | None = None
    random_drop: bool = False
    shuffle_types: bool = True
    eval_threshold: float = 0.5
    remove_unused_columns: bool | None = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss_type", losses.LOSSES),
            ("loss_reduction", losses.REDUCTIONS),
            ("masking", losses.MASKING),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("negatives", "label_smoothing", "eval_threshold", "focal_loss_prob_margin"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name, least in (("max_types", 1), ("max_neg_type_ratio", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False: the columns are the examples")
        super().__post_init__()
