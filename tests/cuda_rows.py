"""The CUDA row kernels' own sources on the CPU, as ops that the parity rule applies to."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_model
import torch
from cuda_model import f32, i32, i64, pointer
from torch import Tensor

from fastenc import testing

GUARD = 64  # elements before and behind whatever a kernel reads or writes
SIGNATURES = {
    "rows": {
        "geglu_fwd": (i32, i32, pointer, pointer, i64, i64, i64, i32),
        "geglu_bwd": (i32, i32, pointer, pointer, pointer, i64, i64, i64, i32),
        "rope": (i32, i32, *[pointer] * 5, i32, i64, i64, i64, i64, pointer, f32, i64, i32),
        "segment_pool_fwd": (i32, i32, *[pointer] * 4, i64, i64, i64, i32),
        "segment_pool_bwd": (i32, i32, *[pointer] * 4, i64, i64, i64, i32),
    },
    "layer_norm": {
        "add_layer_norm_fwd": (i32, i32, *[pointer] * 8, i64, i64, f32, i32),
        "add_layer_norm_bwd": (i32, *[pointer] * 9, i64, i64, i32, i32),
    },
}


def compile_rows(folder: Path) -> dict[str, Callable[..., int]]:
    """{name of a C function: it}."""

    def functions(name):
        # Half of the time to compile would go into these checks.
        unchecked = "-fno-sanitize=null,pointer-overflow,object-size"
        library = cuda_model.compile_model(name, folder, unchecked)
        for function, types in SIGNATURES[name].items():
            getattr(library, function).argtypes = types
            yield function, getattr(library, function)

    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: list(functions(name)), SIGNATURES)
    return dict(itertools.chain(*found))


def guarded(shape, dtype: torch.dtype, around: float, shift: int = 0) -> tuple[Tensor, Tensor]:
    """A tensor amid ``around``, ``shift`` elements from an aligned address, and all its memory."""
    size, first = math.prod(shape), GUARD + shift
    memory = torch.full((GUARD + size + GUARD,), around, dtype=dtype)
    return memory[first : first + size].view(shape), memory


def poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 10**9


def surrounded(x: Tensor | None, shift: int = 0) -> Tensor | None:
    """A dense copy of ``x`` amid NaN."""
    return x if x is None else guarded(x.shape, x.dtype, poison(x.dtype), shift)[0].copy_(x)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def outputs_of(
    call: Callable[..., int], *wanted: tuple, vectors: bool, shift: int = 0, narrowest: int = 0
) -> list[Tensor]:
    """What ``call(*addresses, order)`` writes to outputs of these (shape, dtype).

    It returns how many elements a thread moves at once: 1, else ``vectors``, of 16 bytes where the
    narrowest tensor has ``narrowest`` bytes an element, by default those of the first output.
    """
    runs = []
    for order in (0, 1):
        # Not amid NaN: NaN is what an index error would find to write there.
        outs, memories = zip(*(guarded(*spec, -7, shift) for spec in wanted), strict=True)
        for out in outs:
            out.fill_(poison(out.dtype))
        width = call(*map(address, outs), order)
        assert width == (16 // (narrowest or outs[0].itemsize) if vectors else 1)
        runs.append([out.clone() for out in outs])
        for out, memory in zip(outs, memories, strict=True):
            out.fill_(-7)
            assert bool((memory == -7).all()), "wrote beside its output"
    assert all(map(same_bits, *runs)), "depends on the order of threads and blocks"
    return runs[0]


def differentiable(op: str, forward: Callable, backward: Callable) -> Callable:
    """``op`` as the registry makes it of these two, without the checks of its arguments."""
    rules = importlib.import_module(f"fastenc.ops.{op}")

    class Op(torch.autograd.Function):
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            rules._save(ctx, inputs, output)

        @staticmethod
        def backward(ctx, *grads):
            return rules._differentiate(ctx, backward, *grads)

    Op.forward = staticmethod(forward)
    return Op.apply


def check(op: str, fn: Callable, *args, **kwargs) -> None:
    """The parity rule for one call: every output, every gradient."""
    case = testing.Case(op, "", lambda dtype, device: (args, kwargs))
    testing.check_case(fn, testing.reference_of(op), case, args[0].dtype)
