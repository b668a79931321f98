"""Stage 2: the head. A frozen body is run once over the texts, whatever the head and its epochs.

setfit encodes the texts again in each epoch of a differentiable head (16 by default), padded to the
body's longest text and with the body's dropout on; here the head is trained on the embeddings that
it will see in prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from fastenc.train._setfit_body import TokenLists, adamw, embed, embed_all
from fastenc.train._touched_rows import training_embeddings


def fit_linear(model: Any, tokens: TokenLists, labels: np.ndarray) -> None:
    """Logistic regression on embeddings computed once. ``labels`` (n,) or (n, outputs)."""
    model.fit_head(_frozen(model, tokens).cpu().numpy(), labels)


def fit_differentiable(model: Any, tokens: TokenLists, labels: np.ndarray, args: Any) -> None:
    """A torch head, by setfit's recipe: AdamW, the rate halved every 5 epochs, no warmup.

    Args:
        labels: (n,) class numbers, or (n, outputs) of 0 and 1 under a multitarget head.

    Raises:
        ValueError: a label that the head has no output for.
    """
    head = model.head
    target = torch.as_tensor(labels, device=head.linear.weight.device)
    _check_target(head, target)
    target = target.float() if head.multitarget else target.long()
    if args.end_to_end:
        with training_embeddings(model.body.model, args.embedding_rows, tokens) as held:
            _train(model, _EndToEnd(model, tokens, args, held), target, args)
    else:
        _train(model, _Cached(model, tokens, args), target, args)


def _check_target(head: nn.Module, target: Tensor) -> None:
    outputs = head.out_features
    if head.multitarget:
        if target.ndim != 2 or target.shape[1] != outputs:
            raise ValueError(
                f"labels: expected (n, {outputs}) for the head's outputs, got {tuple(target.shape)}"
            )
    elif target.ndim != 1 or int(target.min()) < 0 or int(target.max()) >= outputs:
        raise ValueError(
            f"labels: expected class numbers 0 to {outputs - 1} for a head of {outputs} outputs, "
            f"got {tuple(target.shape)} up to {int(target.max())}"
        )


def _frozen(model: Any, tokens: TokenLists) -> Tensor:
    rows = embed_all(model.body, tokens)
    return F.normalize(rows, dim=1) if model.normalize_embeddings else rows


class _Cached:
    """Embeddings of a frozen body, once."""

    def __init__(self, model: Any, tokens: TokenLists, args: Any):
        self.rows = _frozen(model, tokens).to(model.head.linear.weight.device)
        self.groups = [_group(model.head, args.head_learning_rate, args)]

    def __call__(self, at: Tensor) -> Tensor:
        return self.rows[at]

    def stepped(self, rate: float) -> None: ...


class _EndToEnd:
    """Embeddings with gradients, anew in each batch."""

    def __init__(self, model: Any, tokens: TokenLists, args: Any, held: Any):
        self.model, self.tokens, self.args, self.held = model, tokens, args, held
        self.groups = [
            _group(model.body, args.body_classifier_learning_rate, args),
            _group(model.head, args.head_learning_rate, args),
        ]

    def __call__(self, at: Tensor) -> Tensor:
        rows = embed(self.model.body, [self.tokens[i] for i in at.tolist()], self.args.bf16)
        rows = rows.float()
        return F.normalize(rows, dim=1) if self.model.normalize_embeddings else rows

    def stepped(self, rate: float) -> None:
        self.held.decay(rate, self.groups[0]["weight_decay"])


def _group(module: nn.Module, rate: float, args: Any) -> dict[str, Any]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return {"params": parameters, "lr": rate, "weight_decay": args.l2_weight or 1e-2}


def _train(model: Any, source: Any, target: Tensor, args: Any) -> None:
    head, criterion = model.head, model.head.get_loss_fn()
    optimizer = adamw(source.groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    generator = torch.Generator().manual_seed(args.seed)
    size, n = args.classifier_batch_size, len(target)
    was = head.training, model.body.training
    head.train()
    model.body.train(args.end_to_end)
    try:
        for _ in trange(
            args.classifier_num_epochs, desc="Head", disable=not args.show_progress_bar
        ):
            order = torch.randperm(n, generator=generator).to(target.device)
            for at in order.split(size):
                optimizer.zero_grad()
                loss = criterion(head(source(at))[0], target[at])
                loss.backward()
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                source.stepped(rate)
            schedule.step()
    finally:
        head.train(was[0])
        model.body.train(was[1])
