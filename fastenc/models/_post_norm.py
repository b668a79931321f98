"""What BERT, RoBERTa, MPNet and DeBERTa share: embeddings with absolute positions and token types,
layers whose norm follows the residual sum, and transformers' arguments.

    x = LayerNorm(output(attention(x)) + x)
    x = LayerNorm(output(act(intermediate(x))) + x)

The sum and its norm are one op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fastenc.models._base import PackedInputs, PackedModel, checkpointed, forward_like
from fastenc.nn import VarlenBatch
from fastenc.nn.dropout import dropout
from fastenc.nn.linear import linear
from fastenc.ops import _checks, add_layer_norm


def through(
    layers: Iterable[nn.Module],
    x: Tensor,
    states: list[Tensor] | None,
    run: Callable[..., Tensor],
    rows: Tensor | None = None,
) -> Tensor:
    """``run(layer, x)`` layer by layer, under gradient checkpointing where it is on.

    Args:
        x: (T, hidden), the first layer's input.
        states: a list that receives the input of every layer, or None.
        rows: (N,) int64, what is wanted of the last layer, which is ``run(layer, x, rows=rows)``;
            None: all of it.

    Returns:
        (T, hidden), or (N, hidden) with ``rows``.
    """
    layers = list(layers)
    for i, layer in enumerate(layers):
        if states is not None:
            states.append(x)
        step = functools.partial(run, layer)
        if rows is not None and i == len(layers) - 1:
            step = functools.partial(step, rows=rows)
        x = layer._gradient_checkpointing_func(step, x) if checkpointed(layer) else step(x)
    return x if rows is None or layers else x.index_select(0, rows)


def wanted(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``rows`` of each of ``tensors`` (T, ...), or the tensors themselves for None."""
    return tensors if rows is None else tuple(x.index_select(0, rows) for x in tensors)


def widen(intermediate: nn.Module, x: Tensor) -> Tensor:
    return intermediate.intermediate_act_fn(linear(intermediate.dense, x))


def add_norm(output: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``LayerNorm(dropout(dense(x)) + residual)`` with the modules of ``output``."""
    norm = output.LayerNorm
    branch = dropout(output.dropout, linear(output.dense, x))
    return add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps)[0]


# ---- embeddings ----------------------------------------------------------------------------------


def columns(embeddings: nn.Module, batch: VarlenBatch) -> Tensor:
    """(T,) int64: each token's column of the padded input."""
    return batch.columns


def embed(
    embeddings: nn.Module,
    inputs: PackedInputs,
    default: Callable[[nn.Module, VarlenBatch], Tensor] = columns,
) -> Tensor:
    """(T, hidden): words, and positions and token types where the model has them, normed.

    Args:
        default: makes the positions (T,) where the caller gave none.
    """
    positions = inputs.position_ids
    if positions is None:
        positions = default(embeddings, inputs.batch)
    _check_positions(embeddings, positions)

    def as_row(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(0)

    return embeddings(
        input_ids=as_row(inputs.batch.input_ids),
        token_type_ids=as_row(inputs.token_type_ids),
        position_ids=as_row(positions),
        inputs_embeds=as_row(inputs.inputs_embeds),
    ).squeeze(0)


def _check_positions(embeddings: nn.Module, positions: Tensor) -> None:
    limit = getattr(embeddings.position_embeddings, "num_embeddings", None)
    if limit is None or not _checks.readable(positions) or positions.numel() == 0:
        return
    if positions.is_floating_point():
        raise TypeError(f"position_ids: expected integers, got {positions.dtype}")
    lowest, highest = (int(x) for x in positions.aminmax())
    if lowest < 0:
        raise ValueError(f"position_ids: expected 0 to {limit - 1}, got {lowest}")
    if highest >= limit:
        raise ValueError(
            f"the input is too long: position {highest}, but the model has position embeddings for "
            f"0 to {limit - 1} (max_position_embeddings)"
        )


# ---- the model -----------------------------------------------------------------------------------


def post_norm_forward(theirs: type) -> Callable:
    """``forward_like`` of a model with absolute positions and token types."""
    return forward_like(
        theirs, "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"
    )


class PackedPostNorm(PackedModel):
    """A :class:`PackedModel` with absolute positions and token types."""

    def _graph_columns(self, inputs: PackedInputs) -> Tensor | None:
        """(T,) the default positions that do not follow from token ids, or None."""
        return inputs.batch.columns

    def _graph_rows(self, inputs: PackedInputs) -> dict[str, Tensor | None] | None:
        if inputs.inputs_embeds is not None:
            return None
        positions = inputs.position_ids
        if positions is None:
            positions = self._graph_columns(inputs)
        return {"position_ids": positions, "token_type_ids": inputs.token_type_ids}
