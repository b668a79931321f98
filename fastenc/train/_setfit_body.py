"""Stage 1: one loop over an objective's batches.

AdamW with setfit's (transformers') settings: no weight decay on biases and norms, gradients clipped
to norm 1, linear warmup and decay. transformers' callbacks are called as its Trainer calls them.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from fastenc.nn import VarlenBatch
from fastenc.train import _processes
from fastenc.train import _setfit_checkpoint as checkpoint
from fastenc.train._setfit_objectives import Objective
from fastenc.train._touched_rows import Embeddings, training_embeddings

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
TOKENS_A_BATCH = 8192
"""Of the forwards without gradients."""

TokenLists = Sequence[Sequence[int]]


class BodyTraining:
    """Trains a body; ``state`` (transformers' TrainerState) tells what happened.

    Args:
        model: the SetFitModel, for callbacks.
        args: training arguments.
        tokens: token ids of every distinct training text.
        objective: over the same texts.
        callbacks: transformers callbacks, or classes of them.
        evaluate: () -> the loss on other texts, or None.
        resume: a checkpoint's folder to go on from, or None.

    Raises:
        ValueError: the checkpoint is of another run.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        tokens: TokenLists,
        objective: Objective,
        callbacks: Sequence[Any] = (),
        evaluate: Callable[[], float] | None = None,
        resume: Path | None = None,
    ):
        self.model, self.body, self.args = model, model.body, args
        self.tokens, self.objective, self.evaluate = tokens, objective, evaluate
        rank, _ = _processes.world()
        self.state = TrainerState(is_local_process_zero=rank == 0, is_world_process_zero=rank == 0)
        self.control = TrainerControl()
        batches = objective.batches_per_epoch * objective.epochs
        self._steps_per_epoch = max(
            1, math.ceil(objective.batches_per_epoch / args.gradient_accumulation_steps)
        )
        steps = math.ceil(round(batches / args.gradient_accumulation_steps, 6))
        whole_epochs = objective.epochs == int(objective.epochs)
        if whole_epochs:
            steps = self._steps_per_epoch * int(objective.epochs)
        if args.max_steps > 0:
            steps = min(steps, args.max_steps)
        self._resume = resume
        if resume is not None:
            self.state = checkpoint.read_state(resume, steps)
            self.state.is_local_process_zero = self.state.is_world_process_zero = rank == 0
        self.state.max_steps = steps
        self.state.num_train_epochs = math.ceil(objective.epochs)
        self.state.logging_steps, self.state.save_steps = args.logging_steps, args.save_steps
        self.state.eval_steps = args.eval_steps or args.logging_steps
        self._guests = [c if isinstance(c, type) else type(c) for c in callbacks]
        self._callbacks = [DefaultFlowCallback, *callbacks]
        if args.show_progress_bar:
            self._callbacks.append(ProgressCallback)
        if args.early_stopping_patience is not None:
            self._callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        self._losses: list[Tensor] = []

    # ---- the loop ------------------------------------------------------------------------------

    def run(self) -> TrainerState:
        """Train; the body is in eval mode afterwards."""
        if self.state.max_steps < 1:
            return self.state
        model, args = self.body.model, self.args
        was = self.body.training
        if self._resume is not None:
            self._load_body(self._resume)
        with training_embeddings(model, args.embedding_rows, self.tokens) as self.embeddings:
            self.body.train()
            try:
                self._run()
            finally:
                self.body.train(was)
        if args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_body(self.state.best_model_checkpoint)
        self._event("on_train_end")
        return self.state

    def _load_body(self, folder: str | Path) -> None:
        self.body.load_state_dict(type(self.body).from_folder(folder).state_dict())

    def _run(self) -> None:
        args = self.args
        parameters = [p for p in self.body.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("nothing to train: every parameter of the body is frozen")
        _processes.same_weights(parameters)
        rate = args.body_embedding_learning_rate * self.objective.rate_factor
        self.optimizer = optimizer_of(self.body, rate, args.l2_weight or 0.0)
        done = self.state.global_step
        self.scheduler = linear_schedule(
            self.optimizer, self.state.max_steps, args.warmup_proportion, done
        )
        self.handler = CallbackHandler(
            self._callbacks, self.model, self.body.tokenizer, self.optimizer, self.scheduler
        )
        started = time.perf_counter()
        self._event("on_train_begin")
        if self._resume is not None:
            checkpoint.load(self._resume, self.state, self.optimizer, self.handler.callbacks)
            if (rank := _processes.world()[0]) > 0:
                torch.manual_seed(args.seed + rank + done)
        first, within = divmod(done, self._steps_per_epoch)
        last = self.state.num_train_epochs if done < self.state.max_steps else first
        for epoch in range(first, last):
            self._event("on_epoch_begin")
            self._epoch(epoch, parameters, within if epoch == first else 0)
            self._event("on_epoch_end")
            self._as_told()
            if self.control.should_training_stop:
                break
        seconds = time.perf_counter() - started
        self._log({"train_runtime": seconds, "train_steps": self.state.global_step})

    def _epoch(self, epoch: int, parameters: list[nn.Parameter], done: int = 0) -> None:
        accumulate = self.args.gradient_accumulation_steps
        group: list[Any] = []
        total = self.objective.batches_per_epoch
        for index, batch in enumerate(self.objective.batches(epoch)):
            if index < done * accumulate:
                continue
            group.append(batch)
            if len(group) < accumulate and index + 1 < total:
                continue
            self._event("on_step_begin")
            self._step(group, parameters)
            group = []
            self.state.global_step += 1
            self.state.epoch = epoch + (index + 1) / total
            self._event("on_step_end")
            self._as_told()
            if self.control.should_training_stop or self.control.should_epoch_stop:
                break

    def _step(self, batches: list[Any], parameters: list[nn.Parameter]) -> None:
        like = parameters[0].detach().new_zeros(self.body.dimension).float()
        scale = 1.0 / len(batches)
        losses = [
            _processes.backward(rows, self._embed, loss_of, scale, like)
            for rows, loss_of in batches
        ]
        _processes.sum_gradients(parameters)
        clip(parameters, self.args.max_grad_norm)
        rates = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.optimizer.step()
        self.embeddings.decay(*rates[0])
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(torch.stack(losses).mean())

    def _embed(self, rows: np.ndarray) -> Tensor:
        return embed(self.body, [self.tokens[i] for i in rows], self.args.bf16)

    # ---- what callbacks ask for ----------------------------------------------------------------

    def _event(self, name: str, **given: Any) -> None:
        """Call every callback; those of the caller may predict with the model, or save it."""
        if not hasattr(self, "handler"):
            return
        unheard = getattr(TrainerCallback, name)
        heard = any(getattr(guest, name) is not unheard for guest in self._guests)
        with self.embeddings.made_whole() if heard else contextlib.nullcontext():
            event = getattr(self.handler, name)
            self.control = event(self.args, self.state, self.control, **given)

    def _as_told(self) -> None:
        """Log, evaluate and save, in this order, as the control says."""
        control = self.control
        if control.should_log and self._losses:
            loss = float(torch.stack(self._losses).mean())
            self._losses = []
            rate = self.optimizer.param_groups[0]["lr"]
            self._log({"embedding_loss": loss, "learning_rate": rate})
        if control.should_evaluate and self.evaluate is not None:
            with self.embeddings.made_whole():
                value = self.evaluate()
            metrics = {"eval_embedding_loss": value}
            self._log(dict(metrics))
            self._event("on_evaluate", metrics=metrics)
            self._judge(value)
        if control.should_save:
            self._save()
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False

    def _log(self, logs: dict[str, float]) -> None:
        logs["epoch"] = round(self.state.epoch or 0.0, 4)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event("on_log", logs=logs)

    def _judge(self, value: float) -> None:
        best, better = self.state.best_metric, self.args.greater_is_better
        if best is None or (value > best if better else value < best):
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step

    def _folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _save(self) -> None:
        """A folder that sentence-transformers reads and training goes on from."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(self._folder())
        if not self.state.is_world_process_zero:
            return
        folder = self._folder()
        with self.embeddings.made_whole():
            checkpoint.save(folder, self.body, self.state, self.optimizer, self.handler.callbacks)
        kept = (self.state.best_model_checkpoint, folder)
        checkpoint.prune(folder.parent, self.args.save_total_limit, kept)
        self._event("on_save")


# ---- parts that stage 2 uses too ---------------------------------------------------------------


def embed(body: nn.Module, tokens: TokenLists, bf16: bool = False) -> Tensor:
    """(n, dim), with gradients where they are on, in one packed forward."""
    batch = VarlenBatch.from_lists(tokens).to(body.device)
    with torch.autocast(body.device.type, torch.bfloat16, enabled=bf16):
        return body(batch)


@torch.no_grad()
def embed_all(body: nn.Module, tokens: TokenLists) -> Tensor:
    """(n, dim) float32 in eval mode, longest first, in batches of ``TOKENS_A_BATCH`` tokens."""
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    was, rows, start = body.training, [], 0
    body.eval()
    try:
        while start < len(order):
            stop, room = start, TOKENS_A_BATCH
            while stop < len(order) and (stop == start or len(tokens[order[stop]]) <= room):
                room -= len(tokens[order[stop]])
                stop += 1
            rows.append(embed(body, [tokens[i] for i in order[start:stop]]).float())
            start = stop
    finally:
        body.train(was)
    out = torch.empty_like(torch.cat(rows))
    out[torch.tensor(order, device=out.device)] = torch.cat(rows)
    return out


def optimizer_of(body: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW in one kernel; the first group decays, the second (biases, norms) does not."""
    norms = {id(p) for m in body.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: list[list[nn.Parameter]] = [[], []]
    for name, p in body.named_parameters():
        if p.requires_grad:
            groups[bool(_NO_DECAY.search(name.lower())) or id(p) in norms].append(p)
    return adamw(
        [
            {"params": groups[0], "lr": rate, "weight_decay": weight_decay},
            {"params": groups[1], "lr": rate, "weight_decay": 0.0},
        ]
    )


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """torch's AdamW, fused where the device has it."""
    types = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, fused=types <= {"cpu", "cuda", "mps"})


def linear_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rate 0 to its peak over ``ceil(warmup * steps)`` steps, then down to 0; after ``done``."""
    rising = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        if step < rising:
            return step / max(1, rising)
        return max(0.0, (steps - step) / max(1, steps - rising))

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done - 1)


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """``clip_grad_norm_``, which on a CPU leaves gradients that are small enough untouched."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if max_norm <= 0 or not gradients:
        return
    norm = torch.nn.utils.get_total_norm(gradients)
    if norm.device.type == "cpu" and norm + 1e-6 <= max_norm:
        return
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


__all__ = ["BodyTraining", "Embeddings", "adamw", "clip", "embed", "embed_all"]
