"""Plain PyTorch kernels of token_score: the specification the other backends are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastenc.ops._philox import keep_of_three
from fastenc.ops._rules import sequences, wide

TOKEN_TAG = 2


def token_keep(rows: Tensor, labels: int, size: int, dropout_p: float, seed: Tensor) -> Tensor:
    """(rows, labels, size): 1 / (1 - p) where dropout keeps, else 0.

    Philox counter of the element (packed word row, label c, r): ``(r >> 2, row, c, 2)``, word
    ``r & 3``; it is kept iff the word is at least ``floor(p * 2**32)``.
    """
    return keep_of_three(rows, labels, size, TOKEN_TAG, dropout_p, seed)


def _keep(words: slice, token: Tensor, labels: int, dropout_p: float, seed: Tensor) -> Tensor:
    rows = torch.arange(words.start, words.stop, device=token.device)
    return token_keep(rows, labels, token.shape[1], dropout_p, seed).to(token.dtype)


def token_score_ref(
    token: Tensor,
    label: Tensor,
    token_factor: Tensor,
    label_factor: Tensor,
    weight: Tensor,
    out_weight: Tensor,
    cu_words: Tensor,
    out_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Differentiable specification at the dtype of ``token``: (words, C, 3)."""
    scores = [token.new_zeros(0, label.shape[1], 3)]
    for seq, words in sequences(cu_words):
        factors = token_factor[words].unsqueeze(1) * label_factor[seq]
        hidden = F.relu(token[words].unsqueeze(1) + label[seq] + factors @ weight.T)
        if dropout_p > 0:
            hidden = hidden * _keep(words, token, label.shape[1], dropout_p, seed)
        scores.append(hidden @ out_weight.T)
    out = torch.cat(scores)
    return out if out_bias is None else out + out_bias


def token_forward(
    token, label, token_factor, label_factor, weight, out_weight, cu_words, out_bias, dropout_p,
    seed,
):  # fmt: skip
    tensors = (token, label, token_factor, label_factor, weight, out_weight)
    bias = None if out_bias is None else wide(out_bias)
    out = token_score_ref(*map(wide, tensors), cu_words, bias, dropout_p, seed)
    return out.to(token.dtype)


def token_backward(
    grad, token, label, token_factor, label_factor, weight, out_weight, cu_words, dropout_p, seed
):
    tensors = (token, label, token_factor, label_factor, weight, out_weight)
    a, b, s, t, w, o = map(wide, tensors)
    g = wide(grad)
    da, db, ds, dt, dw, do = (torch.zeros(x.shape, dtype=x.dtype, device=x.device)
                              for x in (a, b, s, t, w, o))  # fmt: skip
    for seq, words in sequences(cu_words):
        factors = s[words].unsqueeze(1) * t[seq]
        hidden = F.relu(a[words].unsqueeze(1) + b[seq] + factors @ w.T)
        slope = (hidden > 0).to(hidden.dtype)
        if dropout_p > 0:
            keep = _keep(words, a, b.shape[1], dropout_p, seed)
            hidden, slope = hidden * keep, slope * keep
        do += torch.einsum("ico,icr->or", g[words], hidden)
        dhidden = (g[words] @ o) * slope
        da[words], db[seq] = dhidden.sum(1), dhidden.sum(0)
        dw += torch.einsum("icr,icd->rd", dhidden, factors)
        dfactors = dhidden @ w
        ds[words] = (dfactors * t[seq]).sum(1)
        dt[seq] = (dfactors * s[words].unsqueeze(1)).sum(0)
    return tuple(x.to(token.dtype) for x in (da, db, ds, dt, dw, do, g.sum((0, 1))))
