"""What every op is held to, written once; each op's test file names its op and adds its own, and
uses the fixture ``two_threads``, behind which a test may set the number of threads."""

from __future__ import annotations

import pytest
import torch

import fastenc
from fastenc import testing

ISA_OPS = ("geglu", "rope", "add_layer_norm", "segment_pool")
BACKENDS = [b for b in ("reference", "cpu", "cuda") if b != "cuda" or torch.cuda.is_available()]


def parity_params(op: str):
    return pytest.mark.parametrize("case", list(testing.cases(op)), ids=str)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def check_parity(case: testing.Case, dtype: torch.dtype, backend: str) -> None:
    """Outputs and gradients obey the parity rule, and the named backend is what ran."""
    public = getattr(fastenc, case.op)
    with fastenc.use_backend(backend), fastenc.record() as ran:
        testing.check_case(public, testing.reference_of(case.op), case, dtype, device_of(backend))
    assert ran.calls[case.op] == {backend: ran.calls[case.op][backend]}
    assert ran.fallbacks == []


def check_opcheck(case: testing.Case, args: tuple) -> None:
    """``torch.library.opcheck`` of the raw forward in every namespace that serves the CPU."""
    for namespace in ("fastenc", "fastenc_reference", "fastenc_cpu"):
        op = getattr(getattr(torch.ops, namespace), f"{case.op}_fwd").default
        results = torch.library.opcheck(op, args)
        assert set(results.values()) == {"SUCCESS"}, (namespace, results)


def check_repeatable(case: testing.Case, dtype: torch.dtype, threads: int) -> None:
    """Two runs are bit-equal, forward and backward."""
    public = getattr(fastenc, case.op)
    torch.set_num_threads(threads)
    first = testing.run_with_gradients(public, *case.make(dtype))
    second = testing.run_with_gradients(public, *case.make(dtype))
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b)
    for key, grad in first[1].items():
        assert grad is None or torch.equal(grad, second[1][key]), key


def check_threads(case: testing.Case, dtype: torch.dtype) -> None:
    """One thread and three make the same bits, forward and backward."""
    public, made = getattr(fastenc, case.op), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(testing.run_with_gradients(public, *case.make(dtype)))
    (one, gradients), (three, others) = made
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)
    for key, grad in gradients.items():
        assert grad is None or torch.equal(grad, others[key]), key


def check_compiles(fn, make_args, sizes=(3, 7, 12, 33, 64)) -> None:
    """``torch.compile(fullgraph=True)``: no break, at most two graphs over all sizes, equal."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, backend=counter, fullgraph=True)
    for size in sizes:
        args = make_args(size)
        torch.testing.assert_close(compiled(*args), fn(*args))
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs over sizes {sizes}"
