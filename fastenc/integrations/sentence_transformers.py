"""sentence-transformers: SentenceTransformer and CrossEncoder, in place.

The transformers model inside changes its class, so that every use of the object runs packed,
training included. ``encode`` and ``predict`` also change how they make batches: by a budget of
tokens instead of a count of texts; ``encode`` never pads at all and tokenises ahead of the model.
Only the object's own class is replaced, by a subclass of the same name: modules.json and every
other file it saves stay as sentence-transformers writes them.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import sentence_transformers as st
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastenc._encoder_model import bounded, learns_prompts
from fastenc.encoder import CPU_TOKENS_PER_THREAD
from fastenc.integrations import transformers as inner
from fastenc.models.sentence import SentenceBody
from fastenc.nn import linear
from fastenc.ops._registry import note_fallback

CHARACTERS_PER_TOKEN = 4
"""Of English; only the size of a batch hangs on it."""
GPU_TOKENS = 16384

_bodies: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, SentenceBody | str]] = (
    weakref.WeakKeyDictionary()
)


class SentenceTransformer(st.SentenceTransformer):
    """sentence-transformers' class; ``encode`` runs packed through :class:`fastenc.Encoder`."""

    @torch.inference_mode()
    def _inference(
        self,
        inputs: list,
        *,
        prompt: str | None,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: Any = None,
        **kwargs: Any,
    ) -> Tensor | list:
        batch_size = kwargs.pop("batch_size")
        body = _body_of(self)
        reason = body if isinstance(body, str) else _why_theirs(self, inputs, output_value, kwargs)
        if reason is not None:
            note_fallback(f"SentenceTransformer: {reason}")
            return super()._inference(
                inputs,
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
                output_value=output_value,
                save_to_cpu=save_to_cpu,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                device=device,
                **kwargs,
            )
        target = _target(self, device)
        if self.training:
            self.eval()
        if not inputs:
            return torch.tensor([], device=target)
        whole = truncate_dim is None
        rows = body.encode(
            inputs, bool(show_progress_bar), normalize=normalize_embeddings and whole,
            prompt=prompt or "",
        )  # fmt: skip
        out = torch.from_numpy(rows).to(next(self.parameters()).dtype)
        if not whole:
            out = out[..., :truncate_dim]
            if normalize_embeddings:
                out = nn.functional.normalize(out, dim=1)
        return out if save_to_cpu else out.to(target)


def _target(model: nn.Module, device: Any) -> torch.device:
    """Where to run. sentence-transformers compares every parameter's device in each call; that is
    left out where no device was asked for."""
    if device is None and not getattr(model, "_placement_is_delegated", False):
        return model.device
    return model._resolve_inference_device(device)


def _body_of(model: st.SentenceTransformer) -> SentenceBody | str:
    """The packed form of ``model`` as it is now, or why there is none."""
    first, *rest = list(model)
    tokenizer = getattr(first, "tokenizer", None)
    key = (
        id(getattr(first, "auto_model", None)),
        id(tokenizer),
        getattr(tokenizer, "truncation_side", None),
        getattr(first, "max_seq_length", None),
        str(getattr(first, "modality_config", None)),
        str(getattr(first, "processing_kwargs", None)),
        *(id(part) for module in rest for part in module.modules()),
        *(str(m.get_config_dict()) for m in rest if type(m).__name__ == "Pooling"),
    )
    found = _bodies.get(model)
    if found is None or found[0] != key:
        try:
            body: SentenceBody | str = SentenceBody.from_sentence_transformer(model)
        except NotImplementedError as error:
            body = str(error)
        found = _bodies[model] = (key, body)
    return found[1]


def _why_theirs(
    model: nn.Module, inputs: list, output_value: str | None, kwargs: dict[str, Any]
) -> str | None:
    """What of a call sentence-transformers' own code must do."""
    if output_value != "sentence_embedding":
        return f"output_value={output_value!r}"
    if heeded := kwargs.keys() - (() if _heeds_task(model[0]) else {"task"}):
        return f"arguments ({', '.join(sorted(heeded))})"
    if not all(type(x) is str for x in inputs):
        return "inputs that are no strings"
    if _hooked(model):
        return "hooks on its modules, or a compiled or replaced forward"
    return None


def _heeds_task(first: nn.Module) -> bool:
    """Whether a Transformer module treats queries and documents differently, prompts aside."""
    own = ("query_length", "document_length", "query_expansion")
    declared = getattr(first, "_declared_forward_params", ("task",))
    return "task" in declared or any(getattr(first, name, None) is not None for name in own)


def _hooked(model: nn.Module) -> bool:
    for module in (model, *model):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return True
    return getattr(model, "_compiled_call_impl", None) is not None


class CrossEncoder(st.CrossEncoder):
    """sentence-transformers' class; ``predict`` makes batches by a budget of tokens.

    Its tokenizer and head are its own; the encoder inside runs unpadded.
    """

    @torch.inference_mode()
    def _inference(
        self,
        inputs: list,
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        activation_fn: Any,
        apply_softmax: bool | None,
        device: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        target = _target(self, device)
        if self.training:
            self.eval()
        lengths = np.array([self._input_length(pair) for pair in inputs], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        single = self.num_labels == 1
        rows = []
        with tqdm(total=len(inputs), desc="Pairs", disable=not show_progress_bar) as bar:
            for start, stop in _cuts(lengths[order], self._budget(target), self.max_seq_length):
                batch = [inputs[i] for i in order[start:stop]]
                features = self.preprocess(batch, prompt=prompt, **kwargs)
                features = {
                    k: x.to(target) if isinstance(x, Tensor) else x for k, x in features.items()
                }
                scores = self(features, **kwargs)["scores"]
                if scores.is_floating_point() and torch.finfo(scores.dtype).bits < 32:
                    scores = scores.float()
                if activation_fn is not None:
                    scores = activation_fn(scores)
                if single and scores.ndim > 1:
                    scores = scores.squeeze(-1)
                if apply_softmax and scores.ndim > 1:
                    scores = scores.softmax(1)
                rows.append(scores)
                bar.update(stop - start)
        if not rows:
            return torch.tensor([], device=target)
        back = torch.from_numpy(np.argsort(order)).to(target)
        return torch.cat(rows).index_select(0, back)

    @staticmethod
    def _budget(device: torch.device) -> int:
        on_cpu = CPU_TOKENS_PER_THREAD * torch.get_num_threads()
        return on_cpu if device.type == "cpu" else GPU_TOKENS


def _cuts(lengths: np.ndarray, budget: int, most: int | None) -> list[tuple[int, int]]:
    """Batches [(start, stop)] of pairs, longest first, each of about ``budget`` tokens.

    Args:
        lengths: (n,) characters, not increasing. most: tokens at which a pair is cut, or None.
    """
    tokens = np.maximum(lengths // CHARACTERS_PER_TOKEN, 1) + 3
    if (most := bounded(most)) is not None:
        tokens = np.minimum(tokens, most)
    edges = np.concatenate([[0], np.cumsum(tokens)])
    cuts, start = [], 0
    while start < len(lengths):
        stop = int(np.searchsorted(edges, edges[start] + budget, side="right")) - 1
        stop = min(max(stop, start + 1), len(lengths))
        cuts.append((start, stop))
        start = stop
    return cuts


# ---- there and back ------------------------------------------------------------------------------

_CLASSES = {st.SentenceTransformer: SentenceTransformer, st.CrossEncoder: CrossEncoder}


def accelerate(obj: nn.Module, prepack: bool = False) -> nn.Module:
    """Take over the model inside, and the class of a SentenceTransformer or CrossEncoder."""
    if (what := _reads_padding(obj)) is not None:
        note_fallback(f"{type(obj).__name__}: it {what}, it stays as it is")
        return inner.restore(obj)
    try:
        inner.accelerate(obj)
    except TypeError:
        known = (st.SentenceTransformer, st.CrossEncoder)
        if not isinstance(obj, known):
            raise
        note_fallback(f"{type(obj).__name__}: its model has no packed form, it runs padded")
    ours = _CLASSES.get(type(obj))
    if ours is not None and hasattr(type(obj), "_inference"):
        obj.__class__ = ours
    elif ours is not None:
        note_fallback(f"{type(obj).__name__}: this release has its loop elsewhere, it stays")
    elif type(obj) not in _CLASSES.values() and isinstance(obj, tuple(_CLASSES)):
        note_fallback(f"{type(obj).__name__}: a class of its own keeps its encode and predict")
    return linear.prepack(obj) if prepack else obj


def _reads_padding(obj: nn.Module) -> str | None:
    """What reads hidden states of padding, which are zeros in ours."""
    scores_all = isinstance(obj, getattr(st, "MultiVectorEncoder", ()))
    for module in obj.modules():
        if learns_prompts(module):  # then Pooling leaves the attention mask out
            return "learns prompts by peft"
        expansion = getattr(module, "query_expansion", None)
        if scores_all and expansion and not expansion["attend"]:
            return "scores expansion tokens unattended"
    return None


def restore(obj: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`."""
    for theirs, ours in _CLASSES.items():
        if type(obj) is ours:
            obj.__class__ = theirs
            _bodies.pop(obj, None)
    return inner.restore(obj)
