"""What the model tests share: padded inputs, models with telling weights, and the parity rule.

Exact is transformers (sdpa) in float64; plain is transformers at the tested dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastenc.testing import assert_parity, max_error


def padded(
    lengths: Sequence[int], columns: int, vocab: int, side: str = "mixed", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (len(lengths), columns) int64.

    ``side``: "right", "left", or "mixed" (each row's padding is split differently).
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), columns), generator=g)
    mask = torch.zeros(len(lengths), columns, dtype=torch.int64)
    for row, length in enumerate(lengths):
        free = columns - length
        start = {"right": 0, "left": free, "mixed": row * free // max(len(lengths) - 1, 1)}[side]
        mask[row, start : start + length] = 1
    return ids, mask


def telling(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value, so that no bias is 0 and no norm weight is 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
    return model


def at(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its parameters in ``dtype``; rope frequencies stay fp32, as when loaded."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def outputs_and_gradients(
    model: nn.Module, inputs: dict, real: Tensor | None = None, seed: int = 1
):
    """Floating-point outputs and the gradient of every parameter under random cotangents.

    ``real`` (rows, columns) bool: outputs of that shape are read there only.
    """
    model.zero_grad()
    result = model(**inputs)
    outputs = {}
    for name, x in result.items():
        if not isinstance(x, Tensor):
            continue
        per_token = real is not None and x.dim() >= 2 and x.shape[:2] == real.shape
        outputs[name] = x[real] if per_token else x
    g = torch.Generator().manual_seed(seed)
    total = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in outputs.values())
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs, gradients


def check_model(
    packed: nn.Module,
    reference: nn.Module,
    inputs: dict,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> None:
    """Parity of every output and of every parameter's gradient; ``seed`` draws the cotangents."""
    mask = inputs.get("attention_mask")
    real = None if mask is None else mask != 0
    actual, gradients = outputs_and_gradients(at(packed, dtype), inputs, real, seed)
    plain, plain_gradients = outputs_and_gradients(at(reference, dtype), inputs, real, seed)
    exact, exact_gradients = outputs_and_gradients(at(reference, torch.float64), inputs, real, seed)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_parity(name, actual[name], plain[name], exact[name])
    assert gradients.keys() == exact_gradients.keys()
    check_gradients(gradients, plain_gradients, exact_gradients)


def check_gradients(
    actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The parity rule for the gradients of a whole model.

    One parameter's plain error is a single draw, and a lucky one says little: roundings of upstream
    layers reach every gradient. What plain PyTorch allows is therefore its worst error of all
    parameters, relative to the largest gradient in the parameter's module (that of a key bias is 0
    but for the rounding of what cancels in it).
    """
    scales: dict[str, float] = {}
    for name, x in exact.items():
        module = name.rpartition(".")[0]
        scales[module] = max(scales.get(module, 0.0), x.abs().max().item())

    def relative(x: Tensor, name: str) -> float:
        return max_error(x, exact[name]) / (scales[name.rpartition(".")[0]] or 1.0)

    worst = max(relative(plain[name], name) for name in exact)
    for name in exact:
        assert actual[name].dtype == plain[name].dtype, name
        error = relative(actual[name], name)
        allowed = 2 * worst + torch.finfo(plain[name].dtype).eps
        assert error <= allowed, f"gradient of {name}: error {error:.3e}, allowed {allowed:.3e}"
