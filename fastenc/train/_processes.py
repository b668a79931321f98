"""One batch over several processes: the gradients of one process, whatever the loss.

A contrastive loss needs all embeddings of a batch, so averaging losses of shards (DDP) would change
it. Here each process embeds its share of the texts, all of them get all embeddings and the same
loss, each takes the gradient of its own rows through its own body, and parameter gradients are
summed (Gao et al. 2021, arXiv:2101.06983, split the same way in time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, distributed, nn


def world() -> tuple[int, int]:
    """(rank, processes)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def backward(
    rows: np.ndarray,
    embed: Callable[[np.ndarray], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    scale: float,
    like: Tensor,
) -> Tensor:
    """The loss of a batch, detached; gradients of ``scale * loss`` are added to the parameters.

    Args:
        rows: (m,) texts of the batch.
        embed: rows -> (rows, dim).
        loss_of: (m, dim) -> scalar.
        like: (dim,), dtype and device of embeddings.
    """
    rank, processes = world()
    if processes == 1:
        loss = loss_of(_full(embed(rows)))
        (loss * scale).backward()
        return loss.detach()
    mine = np.arange(rank, len(rows), processes)
    gathered = like.new_zeros(len(rows), like.shape[0])
    own = _full(embed(rows[mine])) if len(mine) else None
    if own is not None:
        gathered[torch.from_numpy(mine).to(like.device)] = own.detach().to(like.dtype)
    distributed.all_reduce(gathered)
    leaf = gathered.requires_grad_()
    loss = loss_of(leaf)
    (loss * scale).backward()
    if own is not None:
        own.backward(leaf.grad[torch.from_numpy(mine).to(like.device)].to(own.dtype))
    return loss.detach()


def _full(embeddings: Tensor) -> Tensor:
    """Losses are computed in float32 at least, whatever autocast gave."""
    low = embeddings.dtype in (torch.bfloat16, torch.float16)
    return embeddings.float() if low else embeddings


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up every process's gradients, one message for all of them.

    A parameter without a gradient on any process keeps none: AdamW leaves it alone.
    """
    if world()[1] == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    used = parameters[0].new_tensor([p.grad is not None for p in parameters])
    distributed.all_reduce(used)
    parameters = [p for p, anywhere in zip(parameters, used.tolist(), strict=True) if anywhere]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    distributed.all_reduce(flat)
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(summed.view_as(p))


@torch.no_grad()
def same_weights(parameters: Iterable[nn.Parameter]) -> None:
    """The first process's weights for all."""
    if world()[1] > 1:
        for p in parameters:
            distributed.broadcast(p.data, 0)
