"""What fastenc's base models share: the door in and out of the packed path, and its way around.

A model class is ``class ModernBertModel(PackedModel, transformers' class)``: transformers builds,
loads and saves it; ``forward`` unpads once, runs one packed function through every layer and pads
once. Where that would not do exactly what was asked (attentions returned, hooks on inner layers)
transformers' own forward runs instead, with one logged reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.modeling_outputs import BaseModelOutput

from fastenc.models._loading import StrictLoading
from fastenc.models._obstacles import Slots, obstacle, traced
from fastenc.nn import VarlenBatch
from fastenc.nn.graphs import ForwardGraphs, GraphsOf
from fastenc.ops import _checks
from fastenc.ops._registry import note_fallback

_GRAPHS = "_fastenc_graphs"
_IGNORED = frozenset({"use_cache", "num_items_in_batch", "cu_seq_lens_k", "max_length_k"})


@dataclass(frozen=True)
class CallOptions:
    """The keyword arguments of transformers' forwards that the packed path understands.

    ``hidden_as`` is fastenc's own, passed by its heads: what last_hidden_state shall be.
    "padded": (rows, columns, hidden), as in transformers. "first": (rows, 1, hidden), each row's
    first real token wherever its padding is. "packed": (T, hidden), beside it ``varlen_batch``.
    "everywhere": padded, with transformers' values in the padding too.
    """

    return_dict: bool
    output_hidden_states: bool
    output_attentions: bool
    hidden_as: str
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    others: dict[str, Any]

    @property
    def unknown(self) -> list[str]:
        """Names of the other arguments that ask for what the packed path does not do."""
        return sorted(self.others.keys() - _IGNORED)

    @classmethod
    def read(cls, config, given: dict[str, Any]) -> CallOptions:
        given = dict(given)

        def flag(name: str) -> bool:
            return bool(given.pop(name, getattr(config, name, False)))

        return cls(
            return_dict=given.pop("return_dict", getattr(config, "return_dict", True)) is not False,
            output_hidden_states=flag("output_hidden_states"),
            output_attentions=flag("output_attentions"),
            hidden_as=given.pop("fastenc_hidden_as", "padded"),
            cu_seqlens=given.pop("cu_seq_lens_q", None),
            max_seqlen=given.pop("max_length_q", None),
            others={k: v for k, v in given.items() if v is not None},
        )


@dataclass(frozen=True)
class PackedInputs:
    """What a packed function reads: tensors of ``batch.total_tokens`` rows.

    ``position_ids``: (T,) where the caller gave them, else None. ``inputs_embeds``: (T, hidden)
    where given in place of ``batch.input_ids``. ``token_type_ids``: (T,) or None. ``rows``: (N,)
    int64, the rows of the last hidden state that are wanted, in this order; None: all.
    """

    batch: VarlenBatch
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    token_type_ids: Tensor | None = None
    rows: Tensor | None = None


class Holes(ValueError):
    """Tokens of one sequence are not adjacent columns of the padded input, and it matters."""


class PackedModel(StrictLoading):
    """Mixin in front of a transformers base model.

    A subclass names the layers that its packed function replaces (``_slots``) and implements
    :meth:`_encode`.
    """

    _slots: ClassVar[Slots]
    _skips_rows: ClassVar[bool] = False
    """Whether :meth:`_encode` leaves out of its last layer what ``inputs.rows`` does not want."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # transformers looks recordable outputs up by class, and fills the table on construction;
        # accelerate changes an object's class without constructing one
        registry = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})
        registry[str(cls)] = getattr(cls, "_can_record_outputs", None)

    def _encode(self, inputs: PackedInputs, states: list[Tensor] | None) -> Tensor:
        """(T, hidden): the last hidden state; a class that ``_skips_rows``: its ``inputs.rows``.

        Appends to ``states`` what precedes each layer.

        Raises:
            Holes: the packed path would not do what transformers does with them.
        """
        raise NotImplementedError

    def forward_packed(
        self,
        batch: VarlenBatch,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Packed tokens in, packed hidden states out: no padding anywhere.

        Args:
            batch: with ``input_ids``, unless ``inputs_embeds`` (T, hidden) are given.
            token_type_ids, position_ids: (T,) or None.
            rows: (N,) int64: only these rows of the last hidden state are wanted; DeBERTa and BERT
                compute no others after the last attention.

        Returns:
            (T, hidden), the last hidden state; (N, hidden) with ``rows``.
        """
        if (batch.input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of batch.input_ids and inputs_embeds")
        reason = obstacle(self, self._slots) or self._config_obstacle()
        if reason is not None:
            padded = {
                "input_ids": batch.input_ids,
                "attention_mask": torch.ones(batch.total_tokens, device=batch.device).bool(),
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
            }
            padded = {name: batch.pad(x) for name, x in padded.items() if x is not None}
            hidden = batch.pack(self(**padded).last_hidden_state)
            return hidden if rows is None else hidden.index_select(0, rows)
        self._check_ids(batch.input_ids)
        inputs = PackedInputs(batch, position_ids, inputs_embeds, token_type_ids, rows)
        return self._encode_or_replay(inputs, None)

    # ---- CUDA graphs ---------------------------------------------------------------------------

    def use_cuda_graphs(self, on: bool = True) -> None:
        """Run packed forwards through CUDA graphs (:class:`fastenc.nn.graphs.ForwardGraphs`)."""
        self.__dict__.pop(_GRAPHS, None)
        if on:
            self.__dict__[_GRAPHS] = GraphsOf()

    def _graph_rows(self, inputs: PackedInputs) -> dict[str, Tensor | None] | None:
        """What a captured forward reads beside ``batch.input_ids``, (T,) each; None: no capture."""
        unusual = inputs.position_ids is not None or inputs.inputs_embeds is not None
        return None if unusual or inputs.batch.gaps else {"token_type_ids": inputs.token_type_ids}

    def _encode_or_replay(self, inputs: PackedInputs, states: list[Tensor] | None) -> Tensor:
        wish = self.__dict__.get(_GRAPHS)
        runs = wish is None or states is not None or torch.compiler.is_compiling()
        if inputs.rows is not None and not (runs and self._skips_rows):
            hidden = self._encode_or_replay(replace(inputs, rows=None), states)
            return hidden.index_select(0, inputs.rows)
        if runs:
            return self._encode(inputs, states)
        rows = self._graph_rows(inputs)
        if rows is None:
            note_fallback(f"cuda_graphs: {type(self).__name__} with explicit positions or holes")
            return self._encode(inputs, None)
        if wish.made is None:
            wish.made = self._graphs()
        return wish.made(inputs.batch, **rows)

    def _graphs(self) -> ForwardGraphs:
        def forward(batch: VarlenBatch, **rows: Tensor) -> Tensor:
            return self._encode(PackedInputs(batch, **rows), None)

        pad_id = getattr(self.config, "pad_token_id", None) or 0
        return ForwardGraphs(forward, self, pad_id=pad_id, keep=getattr(self, "_kept_tables", None))

    def _implied_positions(self, input_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """(rows or 1, columns): positions that transformers reads off the padded input, or None."""
        return None

    # ---- the padded door ---------------------------------------------------------------------

    def _run(self, options: CallOptions, **tensors: Tensor | None):
        """transformers' forward on padded ``tensors``, on the packed path where that is exact."""
        reason = self._why_not_packed(options, tensors["attention_mask"])
        if reason is not None:
            return self._fall_back(reason, options, tensors)
        shape = _padded_shape(**tensors)
        inputs = self._enter(options, shape, **tensors)
        states: list[Tensor] | None = [] if options.output_hidden_states else None
        try:
            hidden = self._encode_or_replay(inputs, states)
        except Holes:
            return self._fall_back("an attention_mask with holes", options, tensors)
        batch = inputs.batch
        output = self._output(batch, hidden)
        if states is not None:
            output.hidden_states = (*map(batch.pad, states), output.last_hidden_state)
        if options.hidden_as == "first":
            output.last_hidden_state = batch.first(hidden).unsqueeze(1)
        elif options.hidden_as == "packed":
            output.last_hidden_state, output["varlen_batch"] = hidden, batch
        return output if options.return_dict else self._as_tuple(output)

    def _output(self, batch: VarlenBatch, hidden: Tensor):
        """transformers' output object of the packed last hidden state (T, hidden)."""
        return BaseModelOutput(last_hidden_state=batch.pad(hidden))

    def _as_tuple(self, output) -> tuple:
        """What ``return_dict=False`` makes of :meth:`_output`."""
        return output.to_tuple()

    def _enter(
        self,
        options: CallOptions,
        shape: tuple[int, int],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None = None,
    ) -> PackedInputs:
        device = (input_ids if input_ids is not None else inputs_embeds).device
        split_by = position_ids if options.cu_seqlens is None else None
        batch = VarlenBatch.from_padded(
            None, attention_mask, position_ids=split_by, shape=shape, device=device
        )
        if options.cu_seqlens is not None:
            batch = batch.split(options.cu_seqlens, options.max_seqlen)
        if position_ids is None:
            position_ids = self._implied_positions(input_ids, shape)
        pack = _packer(batch, shape)
        if input_ids is not None:
            batch = replace(batch, input_ids=pack(input_ids))
            self._check_ids(batch.input_ids)
        return PackedInputs(batch, pack(position_ids), pack(inputs_embeds), pack(token_type_ids))

    def _check_ids(self, ids: Tensor | None) -> None:
        """Token ids that no embedding row serves, said before the embedding op crashes on them."""
        size = getattr(self.get_input_embeddings(), "num_embeddings", None)
        if ids is None or size is None or not _checks.readable(ids) or ids.numel() == 0:
            return
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ValueError(f"input_ids: expected ids below the vocabulary size {size}, got {bad}")

    # ---- the way around ----------------------------------------------------------------------

    def _config_obstacle(self) -> str | None:
        """What in the config the packed path does not do."""
        return "is_causal" if getattr(self.config, "is_causal", False) else None

    def _why_not_packed(self, options: CallOptions, attention_mask: object) -> str | None:
        tracer = traced()
        if tracer is not None:
            return tracer
        if options.output_attentions:
            return "output_attentions"
        if options.unknown:
            return f"unknown arguments ({', '.join(options.unknown)})"
        if attention_mask is not None and not _is_padding_mask(attention_mask):
            return "an attention_mask that is no (rows, columns) tensor"
        everywhere = options.hidden_as == "everywhere" and attention_mask is not None
        if everywhere and bool((attention_mask == 0).any()):
            return "the loss reads hidden states of the padding"
        return self._config_obstacle() or obstacle(self, self._slots)

    def _fall_back(self, reason: str, options: CallOptions, tensors: dict[str, Tensor | None]):
        """transformers' own forward. It would let packed sequences see each other: refused."""
        restarts = tensors["attention_mask"] is None and _restarts(tensors["position_ids"])
        if restarts or options.cu_seqlens is not None:
            raise ValueError(
                f"packed sequences cannot run in transformers' own forward, which is needed here: "
                f"{reason}"
            )
        note_fallback(f"{type(self).__name__}: {reason}")
        output = super().forward(
            **{name: x for name, x in tensors.items() if x is not None},
            **options.others,
            output_hidden_states=options.output_hidden_states,
            output_attentions=options.output_attentions,
            return_dict=True,
        )
        hidden, mask = output.last_hidden_state, tensors["attention_mask"]
        # a cache's columns, of earlier tokens or of a prefix, stand before those of the input
        mask = mask[:, -hidden.shape[1] :] if _is_padding_mask(mask) else None
        first = _first_real(hidden, mask)
        self._see_first(output, first)
        if options.hidden_as == "first":
            output.last_hidden_state = first
        elif options.hidden_as == "packed":
            batch = VarlenBatch.from_padded(None, mask, shape=tuple(hidden.shape[:2]))
            output.last_hidden_state, output["varlen_batch"] = batch.pack(hidden), batch
        return output if options.return_dict else self._as_tuple(output)

    def _see_first(self, output, first: Tensor) -> None:
        """Redo what transformers computed from column 0 with ``first`` (rows, 1, hidden)."""


def checkpointed(layer: nn.Module) -> bool:
    """Whether transformers' gradient checkpointing is on for ``layer``."""
    return getattr(layer, "gradient_checkpointing", False) and layer.training


def forward_like(theirs: type, *tensors: str) -> Callable:
    """A packed model's ``forward``: the arguments of ``theirs.forward``, by name or in its order.

    ``tensors``: names of those that :meth:`PackedModel._run` takes. What ``theirs`` names, given as
    None, is as if left out.
    """
    signature = inspect.signature(theirs.forward)
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [p.name for p in signature.parameters.values() if p.kind is plain][1:]

    def forward(self, *args, **kwargs):
        """As transformers' forward; ``attention_mask`` (rows, columns): nonzero is a real token."""
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(name in kwargs for name in given):
            signature.bind(self, *args, **kwargs)  # says which
        given.update(kwargs)
        given = {k: x for k, x in given.items() if x is not None or k not in names}
        inputs = {name: given.pop(name, None) for name in tensors}
        return self._run(CallOptions.read(self.config, given), **inputs)

    forward.__signature__ = signature
    return forward


def _first_real(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, columns, hidden) -> (rows, 1, hidden): the first real token of each row."""
    if mask is None:
        return hidden[:, :1]
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, (mask != 0).byte().argmax(1).to(hidden.device)].unsqueeze(1)


def _is_padding_mask(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _restarts(position_ids: Tensor | None) -> bool:
    return position_ids is not None and bool((position_ids.diff(dim=-1) <= 0).any())


def _packer(batch: VarlenBatch, shape: tuple[int, int]):
    def pack(x: Tensor | None) -> Tensor | None:
        return None if x is None else batch.pack(x.expand(*shape, *x.shape[2:]))

    return pack


def _padded_shape(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, **others: Tensor | None
) -> tuple[int, int]:
    """(rows, columns), after every tensor was found to have them."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        _checks.tensor("input_ids", input_ids, 2)
        if input_ids.is_floating_point():
            raise TypeError(f"input_ids: expected integers, got {input_ids.dtype}")
        shape = tuple(input_ids.shape)
    else:
        _checks.floating("inputs_embeds", inputs_embeds, 3)
        shape = tuple(inputs_embeds.shape[:2])
    for name, x in others.items():
        if not _is_padding_mask(x):
            continue
        rows = (1, shape[0]) if name != "attention_mask" else (shape[0],)
        if x.shape[0] not in rows or x.shape[1] != shape[1]:
            raise ValueError(f"{name}: expected the input's shape {shape}, got {tuple(x.shape)}")
    return shape
