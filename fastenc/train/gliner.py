"""``GLiNERTrainer``: named-entity models, trained on transformers' Trainer without padding.

The data, the sampling of entity types, the losses and the names of the arguments are gliner's
(0.2.29, training/trainer.py); Zaratiana et al. 2023, arXiv:2311.08526. What differs: batches are
packed and heads folded, so that no (words, max_width, hidden) tensor is kept; a batch that does not
fit into memory is split, and never skipped; several processes take the gradients of one.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, distributed, nn
from transformers.trainer_utils import EvalLoopOutput

from fastenc.models._gliner_decode import entities_in_words
from fastenc.models._gliner_encode import encode_labels
from fastenc.models._gliner_files import read_weights
from fastenc.models.gliner import GLiNER
from fastenc.train import _gliner_loss as losses
from fastenc.train import _gliner_metrics as metrics
from fastenc.train._gliner_arguments import GLiNERTrainingArguments
from fastenc.train._gliner_data import (
    Collator,
    Example,
    TrainingBatch,
    TypeSampling,
    check_example,
)

__all__ = ["GLiNERTrainer", "GLiNERTrainingArguments"]
log = logging.getLogger("fastenc")


class GLiNERTrainer(transformers.Trainer):
    """Trains a :class:`fastenc.GLiNER` in place.

    Args:
        model: uni- or bi-encoder, span or token level.
        args: training arguments; None: the defaults, in ``./trainer_output``.
        train_dataset, eval_dataset: examples ``{"tokenized_text": words, "ner": [[first word, last
            word, type], …]}``, words inclusive; a list or anything that transformers' Trainer takes
            (a dictionary of them for evaluation too). Optional keys: "ner_labels", the types to ask
            for, and "ner_negatives", types to ask for beside its own. Lists are checked at once,
            everything else when it is read.
        eval_types: the types that evaluation asks for; None: all that the dataset has.
        callbacks, optimizers: transformers', such as ``EarlyStoppingCallback``.

    Metrics of :meth:`evaluate`: ``eval_loss`` (a text), ``eval_precision``, ``eval_recall``,
    ``eval_f1`` (micro), ``eval_macro_f1`` …, and ``eval_f1/TYPE`` … of each type. Entities count by
    exact boundaries and type.

    Types are drawn from ``args.seed``, the epoch and the texts of a batch: a resumed run goes on as
    the one that was interrupted.

    Raises:
        TypeError, ValueError: data that is not of this form; says which example, and what is wrong.
    """

    def __init__(
        self,
        model: GLiNER,
        args: GLiNERTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_types: Sequence[str] | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(model, GLiNER):
            raise TypeError(f"model: expected a fastenc.GLiNER, got {type(model).__name__}")
        args = GLiNERTrainingArguments("trainer_output") if args is None else args
        if not isinstance(args, GLiNERTrainingArguments):
            raise TypeError(f"args: expected GLiNERTrainingArguments, got {type(args).__name__}")
        config = model.config
        self.sampling = TypeSampling(
            args.max_types or config.max_types,
            config.max_neg_type_ratio if args.max_neg_type_ratio is None
            else args.max_neg_type_ratio,
            args.random_drop, args.shuffle_types,
        )  # fmt: skip
        self.eval_types = None if eval_types is None else list(eval_types)
        if isinstance(eval_dataset, dict):
            eval_dataset = {k: _checked(d, f"eval_dataset[{k!r}]") for k, d in eval_dataset.items()}
        super().__init__(
            model, args, Collator(model, self.sampling, args.seed),
            _checked(train_dataset, "train_dataset"),
            eval_dataset if isinstance(eval_dataset, dict)
            else _checked(eval_dataset, "eval_dataset"),
            callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.add_callback(_EpochOfTypes(self.data_collator))

    # ---- a step --------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The loss of a packed batch; gradients of several processes are those of one."""
        data: TrainingBatch = inputs["batch"]
        embeds = None
        if data.label_tokens is not None:
            layers = self.accelerator.unwrap_model(model).token_rep_layer
            embeds = encode_labels(layers, data.label_tokens)
        logits = model(data.batch, embeds)
        sampled = model.training
        loss = self._summed_loss(logits.float(), data, sampled)
        divisor = inputs.get("divisor")
        if divisor is None and self.args.loss_reduction == "mean":
            divisor = self._divisor(data, everywhere=sampled)
        loss = loss if divisor is None else loss / max(divisor, 1)
        if sampled:
            # DDP averages over processes what is a sum over all of their examples
            loss = loss * self.accelerator.num_processes
        return (loss, logits) if return_outputs else loss

    def _summed_loss(self, logits: Tensor, data: TrainingBatch, sampled: bool) -> Tensor:
        args, batch = self.args, data.batch
        class_dim = 1 if self.model.config.token_level else 2
        targets = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
        targets[data.positives.unbind(1)] = 1.0
        lengths = batch.cu_words.diff().long()
        seqs = torch.arange(batch.num_seqs, device=logits.device)
        seq_of_word = seqs.repeat_interleave(lengths, output_size=batch.words)
        valid = torch.ones((), dtype=torch.bool, device=logits.device)
        if data.label_tokens is None:
            valid = batch.label_mask[seq_of_word].unsqueeze(3 - class_dim)
        if class_dim == 2:
            valid = valid & batch.span_mask(self.model.config.max_width).unsqueeze(2)
        logits = logits.masked_fill(~valid, 0.0)
        if args.loss_type == "bce":
            each = losses.bce_loss(logits, targets, args.label_smoothing)
        else:
            each = losses.focal_loss(
                logits, targets, args.focal_loss_alpha, args.focal_loss_gamma,
                args.focal_loss_prob_margin, args.label_smoothing,
            )  # fmt: skip
        if sampled:
            kept = losses.negative_mask(
                targets, class_dim, seq_of_word, batch.num_seqs, args.masking, args.negatives
            )
            valid = valid if kept is None else valid & kept
        return (each * valid).sum(dtype=torch.float64).to(each.dtype)

    def _divisor(self, data: TrainingBatch, everywhere: bool) -> int:
        """What a mean is over: spans, or words and labels; of all processes' batches."""
        batch, width = data.batch, self.model.config.max_width
        if self.model.config.token_level:
            labels = batch.num_labels
            if data.label_tokens is not None:
                labels = [len(data.examples[0].types)] * batch.num_seqs
            count = sum(n * c for n, c in zip(batch.word_lengths, labels, strict=True))
        else:
            count = sum(min(width, n - i) for n in batch.word_lengths for i in range(n))
        if not everywhere or self.accelerator.num_processes == 1:
            return count
        total = torch.tensor(count, device=self.args.device)
        distributed.all_reduce(total)
        return int(total)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One forward and backward. A batch that does not fit into memory is done in halves.

        Raises:
            torch.OutOfMemoryError: a single example does not fit, or one of several processes is
                short of memory (its halves would leave the others waiting).
        """
        waiting: list[dict[str, Any]] = [inputs]
        divisor = None
        if self.args.loss_reduction == "mean":
            divisor = self._divisor(inputs["batch"], everywhere=True)
        total = torch.zeros((), device=self.args.device)
        while waiting:
            part = waiting.pop(0)
            gradients = self._set_gradients_aside(model)
            try:
                loss = super().training_step(model, {**part, "divisor": divisor}, None)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or not self._may_split(part["batch"], error):
                    raise
                loss = None
            self._bring_gradients_back(model, gradients, dropped=loss is None)
            if loss is None:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                waiting[:0] = self._halves(part["batch"])
                continue
            total += loss
        return total

    def _may_split(self, data: TrainingBatch, error: BaseException) -> bool:
        """Say what happens to a batch that was too large."""
        size, tokens = data.batch.num_seqs, data.batch.tokens.total_tokens
        splits = size > 1 and self.accelerator.num_processes == 1
        what = "it is done in halves" if splits else "it cannot be split"
        if self.accelerator.num_processes > 1:
            what += " among several processes; lower per_device_train_batch_size"
        log.warning(
            "GLiNER training: out of memory on a batch of %d texts and %d tokens; %s (%s)",
            size, tokens, what, str(error).splitlines()[0] if str(error) else "no details",
        )  # fmt: skip
        return splits

    def _halves(self, data: TrainingBatch) -> list[dict[str, Any]]:
        middle = len(data.examples) // 2
        parts = (data.examples[:middle], data.examples[middle:])
        return [{"batch": self.data_collator.pack(part).to(self.args.device)} for part in parts]

    def _set_gradients_aside(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients of earlier parts, kept safe from an attempt that fails halfway."""
        if self.accelerator.num_processes > 1:
            return []
        kept = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        for p, _ in kept:
            p.grad = None
        return kept

    def _bring_gradients_back(
        self, model: nn.Module, kept: Iterable[tuple[nn.Parameter, Tensor]], dropped: bool
    ) -> None:
        if dropped:
            model.zero_grad(set_to_none=True)
        for p, gradient in kept:
            p.grad = gradient if p.grad is None else gradient.add_(p.grad)

    # ---- optimizer ------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; neither biases nor the weights of norms."""
        return [n for n, p in model.named_parameters() if p.dim() > 1 and "bias" not in n]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or what ``optim`` names; with ``others_lr``, two learning rates."""
        args = self.args
        model = self.model if model is None else model
        if self.optimizer is not None or args.others_lr is None:
            return super().create_optimizer(model)
        decay = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups.setdefault(("token_rep_layer" in name, name in decay), []).append(p)
        made = []
        for (encoder, decays), parameters in groups.items():
            rate = {} if encoder else {"lr": args.others_lr}
            weight_decay = args.weight_decay if encoder else args.others_weight_decay
            made.append(
                {"params": parameters, "weight_decay": weight_decay if decays else 0.0, **rate}
            )
        kind, options = self.get_optimizer_cls_and_kwargs(args, model)
        self.optimizer = kind(made, **options)
        return self.optimizer

    # ---- evaluation ----------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches in order, with the types that evaluation asks for."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset, got none")
        examples = _checked([*dataset], "eval_dataset")
        types = self.eval_types
        if types is None:
            types = sorted({kind for e in examples for *_, kind in e.entities})
        training, self.data_collator = self.data_collator, Collator(self.model, types)
        try:
            return super().get_eval_dataloader(examples)
        finally:
            self.data_collator = training

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: Any = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Loss and scores of a dataset; every example counts once over all processes."""
        model = self._wrap_model(self.model, training=False, dataloader=dataloader)
        if not self.is_in_train:
            model = model.to(self.args.device)
        model.eval()
        rows: list[tuple[int, dict[str, metrics.Counts]]] = []
        loss = torch.zeros((), device=self.args.device)
        texts = 0
        for inputs in dataloader:
            data = self._prepare_inputs(inputs)["batch"]
            with self.compute_loss_context_manager():
                found_loss, logits = self.compute_loss(model, {"batch": data}, True)
            loss += found_loss * (len(data.examples) if self.args.loss_reduction == "mean" else 1)
            texts += len(data.examples)
            found = entities_in_words(
                logits, data.batch.word_lengths, [len(e.types) for e in data.examples],
                self.model.config.token_level, self.args.eval_threshold,
            )  # fmt: skip
            for example, entities in zip(data.examples, found, strict=True):
                named = [(first, last, example.types[c]) for first, last, c, _ in entities]
                rows.append((example.index, metrics.count(example.entities, named)))
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        loss, texts, rows = self._of_all_processes(float(loss), texts, rows)
        counts: dict[str, metrics.Counts] = {}
        for one in dict(rows).values():
            for kind, found_counts in one.items():
                counts[kind] = counts.get(kind, metrics.Counts()) + found_counts
        scores = {f"{metric_key_prefix}_loss": loss / max(texts, 1)}
        scores |= metrics.summary(counts, f"{metric_key_prefix}_")
        return EvalLoopOutput(None, None, scores, len(dict(rows)))

    def _of_all_processes(self, loss: float, texts: int, rows: list) -> tuple[float, int, list]:
        if self.accelerator.num_processes == 1:
            return loss, texts, rows
        parts: list[Any] = [None] * self.accelerator.num_processes
        distributed.all_gather_object(parts, (loss, texts, rows))
        merged = itertools.chain.from_iterable(part[2] for part in parts)
        return sum(p[0] for p in parts), sum(p[1] for p in parts), [*merged]

    # ---- files ---------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """gliner's files, which gliner and ``GLiNER.from_pretrained`` load."""
        folder = self.args.output_dir if output_dir is None else output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = read_weights(Path(resume_from_checkpoint))
        self.accelerator.unwrap_model(self.model if model is None else model).load_state_dict(
            weights
        )

    def _load_best_model(self) -> None:
        log.info("loading the best model, %s", self.state.best_model_checkpoint)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _EpochOfTypes(transformers.TrainerCallback):
    """Tells the collator which epoch it samples types for."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


def _checked(dataset: Any, name: str) -> Any:
    """Lists are checked example by example; other datasets when they are read."""
    if isinstance(dataset, str):
        raise TypeError(f"{name}: expected examples, got a string; read the file first")
    if not isinstance(dataset, (list, tuple)):
        return dataset
    return [
        e if isinstance(e, Example) else check_example(e, f"{name}[{i}]", i)
        for i, e in enumerate(dataset)
    ]


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, torch.OutOfMemoryError) or said
