"""What the model tests share: padded inputs, models with telling weights, and the parity rule.

Exact is transformers (sdpa) in float64; plain is transformers at the tested dtype.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastenc.nn import VarlenBatch
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
    return outputs, gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters' gradients."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


COTANGENTS = (1, 2, 3)


def check_model(
    packed: nn.Module, reference: nn.Module, inputs: dict, dtype: torch.dtype = torch.float32
) -> None:
    """Parity of every output and of every parameter's gradient."""
    mask = inputs.get("attention_mask")
    real = None if mask is None else mask != 0
    models = ((packed, dtype), (reference, dtype), (reference, torch.float64))
    drawn = [
        [outputs_and_gradients(at(*model), inputs, real, seed) for model in models]
        for seed in COTANGENTS
    ]
    (actual, _), (plain, _), (exact, _) = drawn[0]
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_parity(name, actual[name], plain[name], exact[name])
    check_gradients(*([gradients for _, gradients in of] for of in zip(*drawn, strict=True)))


def check_gradients(
    actual: list[dict[str, Tensor]], plain: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]
) -> None:
    """The parity rule for the gradients of a whole model, under one or more cotangents.

    One parameter's plain error is a single draw, and a lucky one says little: roundings of upstream
    layers reach every gradient. What plain PyTorch allows is therefore its worst error of all
    parameters, relative to the largest gradient in the parameter's module (that of a key bias is 0
    but for the rounding of what cancels in it); errors are the root mean square over cotangents.
    """
    names = exact[0].keys()
    assert all(found.keys() == names for found in (*actual, *plain, *exact))
    assert all(a[n].dtype == p[n].dtype for a, p in zip(actual, plain, strict=True) for n in names)

    def errors(of: list[dict[str, Tensor]]) -> dict[str, float]:
        squares = dict.fromkeys(names, 0.0)
        for found, true in zip(of, exact, strict=True):
            scales: dict[str, float] = {}
            for name, x in true.items():
                module = name.rpartition(".")[0]
                scales[module] = max(scales.get(module, 0.0), x.abs().max().item())
            for name in names:
                error = max_error(found[name], true[name])
                squares[name] += (error / (scales[name.rpartition(".")[0]] or 1.0)) ** 2
        return {name: (square / len(exact)) ** 0.5 for name, square in squares.items()}

    eps = torch.finfo(next(iter(plain[0].values())).dtype).eps
    allowed = 2 * max(errors(plain).values()) + eps
    for name, error in errors(actual).items():
        assert error <= allowed, f"gradient of {name}: error {error:.3e}, allowed {allowed:.3e}"


def check_draws(name: str, draws: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The parity rule for a whole model's output, (actual, plain, exact) of several inputs.

    Of one input plain PyTorch's worst error is a single draw: errors are the root mean square over
    inputs.
    """
    assert all(a.dtype == p.dtype and a.shape == e.shape for a, p, e in draws)

    def error(which: int) -> float:
        return math.sqrt(sum(max_error(of[which], of[2]) ** 2 for of in draws) / len(draws))

    largest = max(exact.abs().max().item() for _, _, exact in draws)
    allowed = 2 * error(1) + torch.finfo(draws[0][0].dtype).eps * largest
    assert error(0) <= allowed, f"{name}: error {error(0):.3e}, allowed {allowed:.3e}"


def far(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Distance over all parameters."""
    squares = ((a[k].detach().double() - b[k].detach().double()).square().sum() for k in b)
    return math.sqrt(sum(float(x) for x in squares))


def check_trained(
    actual: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> None:
    """The parity rule for the weights that training leaves.

    An optimizer that divides by a gradient's size makes a whole step of a vanishing gradient's
    rounding: what tells is the distance over all parameters, not a parameter's error.
    """
    moved, lost = far(before, exact), far(plain, exact)
    assert lost < 0.2 * moved, "the comparison says nothing"
    error, allowed = far(actual, exact), 2 * lost + 1e-5 * moved
    assert error <= allowed, f"trained weights: error {error:.3e}, allowed {allowed:.3e}"


def check_wanted_rows(modeling, ours: nn.Module, reference: nn.Module, monkeypatch) -> None:
    """``forward_packed(rows=...)``: those rows, their gradients, and no others in the last layer.

    ``modeling`` is the file of ``fastenc.models`` whose ``add_norm`` ends each half of a layer.
    """
    lists = [list(range(3, 3 + n)) for n in (9, 1, 17)]
    rows = torch.tensor([25, 0, 3, 9, 3])
    seen = []
    add_norm = modeling.add_norm

    def counted(output: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return add_norm(output, x, residual)

    monkeypatch.setattr(modeling, "add_norm", counted)
    packed = VarlenBatch.from_lists(lists)
    hidden = [ours.forward_packed(packed, rows=rows)]
    assert seen == [27] * (len(seen) - 2) + [5, 5]
    exact_model = at(reference, torch.float64)
    for model in (reference, exact_model):
        each = [model(torch.tensor([x])).last_hidden_state[0] for x in lists]
        hidden.append(torch.cat(each)[rows])
    assert_parity("rows", *hidden)
    gradients = []
    for model, x in zip((ours, reference, exact_model), hidden, strict=True):
        drawn = []
        for seed in COTANGENTS:
            model.zero_grad()
            g = torch.Generator().manual_seed(seed)
            x.backward(torch.randn(x.shape, generator=g).to(x.dtype), retain_graph=True)
            drawn.append(gradients_of(model))
        gradients.append(drawn)
    check_gradients(*gradients)
