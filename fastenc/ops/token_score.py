"""Scores of every word against every label, as starts, ends and insides of entities.

token (words, R), label (num_seqs, C, R), token_factor (words, D), label_factor (num_seqs, C, D),
weight (R, D), out_weight (3, R), cu_words (num_seqs + 1,) -> (words, C, 3):

    hidden[i, c] = relu(token_i + label_c + weight (token_factor_i * label_factor_c))
    out[i, c, :] = out_weight dropout(hidden[i, c]) + out_bias

This is the token-level ``Scorer`` of GLiNER (gliner 0.2.29, modeling/scorers.py), split in three.
It multiplies W1 (4D, 3D) with [t0_i ; l0_c ; t1_i * l1_c] for every word and label, where [t0, t1]
= proj_token(x) and [l0, l1] = proj_label(prompt); but only the last third depends on both:

    token_i = W1[:, :D] t0_i + b1      label_c = W1[:, D:2D] l0_c      weight = W1[:, 2D:]
    token_factor_i = t1_i              label_factor_c = l1_c           R = 4D

24 D^2 FLOPs a (word, label) become 8 D^2. fp32 arithmetic. The backward makes the hidden rows
again, some at a time; nothing of size (words, C, R) is kept.
Dropout: Philox counter ``(r >> 2, packed word row, c, 2)``, word ``r & 3`` (see ops/_philox.py).
"""

from __future__ import annotations

from torch import Tensor

from fastenc.ops import _checks
from fastenc.ops._registry import OpSpec, define, select
from fastenc.ops._rules import lower_precision
from fastenc.ops._token_ref import token_backward, token_forward
from fastenc.ops.varlen_attention import check_dropout

_INPUTS = (
    "Tensor token, Tensor label, Tensor token_factor, Tensor label_factor, Tensor weight, "
    "Tensor out_weight, Tensor cu_words"
)


def _forward_fake(
    token, label, token_factor, label_factor, weight, out_weight, cu_words, out_bias, dropout_p,
    seed,
):  # fmt: skip
    return token.new_empty(token.shape[0], label.shape[1], 3)


def _backward_fake(
    grad, token, label, token_factor, label_factor, weight, out_weight, cu_words, dropout_p, seed
):
    tensors = (token, label, token_factor, label_factor, weight, out_weight)
    return *(x.new_empty(x.shape) for x in tensors), token.new_empty(3)


def _save(ctx, inputs, output):
    *tensors, out_bias, ctx.dropout_p, seed = inputs
    ctx.has_bias = out_bias is not None
    ctx.save_for_backward(*tensors, seed)


def _differentiate(ctx, bwd, grad):
    if grad is None:
        return (None,) * 10
    *tensors, seed = ctx.saved_tensors
    *grads, dbias = bwd(grad, *tensors, ctx.dropout_p, seed)
    return *grads, None, dbias if ctx.has_bias else None, None, None


define(
    OpSpec(
        name="token_score",
        forward=f"({_INPUTS}, Tensor? out_bias, float dropout_p, Tensor? seed) -> Tensor",
        backward=f"(Tensor grad, {_INPUTS}, float dropout_p, Tensor? seed) -> (Tensor dtoken, "
        "Tensor dlabel, Tensor dtoken_factor, Tensor dlabel_factor, Tensor dweight, "
        "Tensor dout_weight, Tensor dout_bias)",
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        forward_ref=token_forward,
        backward_ref=token_backward,
        save=_save,
        differentiate=_differentiate,
        autocast=lower_precision(6, 7),
    )
)


def _check(name: str, x: Tensor, symbols: str, shape: tuple[int, ...], token: Tensor) -> None:
    _checks.floating(name, x, len(shape))
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected {symbols} = {shape}, got {tuple(x.shape)}")
    _checks.same_dtype(name, x, "token", token)
    _checks.same_device(name, x, "token", token)


def token_score(
    token: Tensor,
    label: Tensor,
    token_factor: Tensor,
    label_factor: Tensor,
    weight: Tensor,
    out_weight: Tensor,
    cu_words: Tensor,
    out_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Logits of every word as start, end and inside of an entity of every label of its sequence.

    Args:
        token: (words, R), float32, bfloat16 or float16; every other tensor has its dtype.
        label: (num_seqs, C, R). token_factor: (words, D). label_factor: (num_seqs, C, D).
        weight: (R, D). out_weight: (3, R). out_bias: (3,) or None.
        cu_words: (num_seqs + 1,) int32, 0 to words.
        dropout_p: of the hidden elements, in [0, 1); ``seed`` (an int, or one int64 on the device;
            drawn from torch's generator if None) fixes the mask, the same on every backend.

    Returns:
        (words, C, 3), dtype of ``token``; the autocast dtype under autocast.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or cu_words do not fit.
    """
    _checks.floating("token", token, 2)
    words, size = token.shape
    cu_words = _checks.cu_seqlens("cu_words", cu_words, words, token)
    _checks.floating("label", label, 3)
    _checks.floating("token_factor", token_factor, 2)
    num_seqs, labels, factors = cu_words.shape[0] - 1, label.shape[1], token_factor.shape[1]
    _check("label", label, "(num_seqs, C, R)", (num_seqs, labels, size), token)
    _check("token_factor", token_factor, "(words, D)", (words, factors), token)
    _check("label_factor", label_factor, "(num_seqs, C, D)", (num_seqs, labels, factors), token)
    _check("weight", weight, "(R, D)", (size, factors), token)
    _check("out_weight", out_weight, "(3, R)", (3, size), token)
    if out_bias is not None:
        _check("out_bias", out_bias, "(3,)", (3,), token)
    seed = check_dropout(dropout_p, seed, token)
    return select("token_score", token)(
        token, label, token_factor, label_factor, weight, out_weight, cu_words, out_bias,
        float(dropout_p), seed,
    )  # fmt: skip
