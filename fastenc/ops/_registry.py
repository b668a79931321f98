"""One op, several backends: namespaces, dispatch, the choice of a backend, the record of what ran.

A dispatch key holds one kernel, so each backend owns a namespace with the same schema and fake
(``fastenc_reference``, ``fastenc_cpu``, ``fastenc_triton``, ``fastenc_cuda``); ``fastenc`` is the
default one: C++ for CPU tensors, CUDA C++ (else Triton) for CUDA tensors, plain PyTorch elsewhere.
Each namespace's autograd calls its own backward, so a backward stays on its forward's backend.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad
from torch.library import Library

from fastenc.ops import _library
from fastenc.ops._measured import FASTER_IN_TRITON

BACKENDS = ("reference", "cpu", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger("fastenc")

_libraries: dict[str, Library] = {}
_forward: dict[str, dict[str | None, torch._ops.OpOverload]] = {}
_launches: collections.Counter[tuple[str, str]] = collections.Counter()
_records: list[Record] = []
_lock = threading.Lock()


def _checked_backend(name: str | None) -> str | None:
    if name and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name or None


class _Local(threading.local):
    """Per-thread choices. A ContextVar would break ``torch.compile(fullgraph=True)``."""

    backend: str | None = _checked_backend(os.environ.get("FASTENC_BACKEND"))
    debug: bool = False


_local = _Local()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op of this thread on one backend; ``None`` restores the default choice.

    ``name``: "reference", "cpu", "triton" or "cuda". An op that the backend cannot serve raises
    NotImplementedError with each backend's reason: an explicit choice never falls back.
    Also set by the environment variable FASTENC_BACKEND.
    """
    before, _local.backend = _local.backend, _checked_backend(name)
    try:
        yield
    finally:
        _local.backend = before


@contextlib.contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Validate what lies in device memory too (cu_seqlens, positions): a synchronisation a call."""
    before, _local.debug = _local.debug, enabled
    try:
        yield
    finally:
        _local.debug = before


def debug_checks_enabled() -> bool:
    return _local.debug


def chosen_backend() -> str | None:
    """What :func:`use_backend` chose for this thread, or None."""
    return _local.backend


# ---- what really ran ---------------------------------------------------------------------------


@dataclass
class Record:
    """What ran while recording: ``calls`` {op: {backend: launches}} and ``fallbacks`` [reason].

    A backward counts under its own name, ``geglu_bwd``. Counts are of the whole process: kernels
    that other threads launch meanwhile are counted too.
    """

    fallbacks: list[str] = field(default_factory=list)
    _before: collections.Counter = field(default_factory=collections.Counter, repr=False)
    _after: collections.Counter | None = field(default=None, repr=False)

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        spent = (launches() if self._after is None else self._after) - self._before
        calls: dict[str, dict[str, int]] = {}
        for (op, backend), count in sorted(spent.items()):
            calls.setdefault(op, {})[backend] = count
        return calls


def launches() -> collections.Counter:
    """Launches since the process began: {(op, backend): count}."""
    return _launches + collections.Counter(_library.launch_counts())


def count_launches(more: collections.Counter) -> None:
    """Count launches that no dispatch sees: those of a replayed CUDA graph."""
    _launches.update(more)


@contextlib.contextmanager
def record() -> Iterator[Record]:
    """Record every kernel launch and every fallback until the block ends."""
    current = Record(_before=launches())
    with _lock:
        _records.append(current)
    try:
        yield current
    finally:
        with _lock:
            _records[:] = [r for r in _records if r is not current]
        current._after = launches()


_logged: set[str] = set()


def note_fallback(reason: str) -> None:
    """Say, once in the log and in every open record, that something slower ran, and why."""
    if torch.compiler.is_compiling():
        return
    with _lock:
        for current in _records:
            if reason not in current.fallbacks:
                current.fallbacks.append(reason)
        first = reason not in _logged
        _logged.add(reason)
    if first:
        log.warning("fastenc falls back: %s", reason)


def _counted(op: str, backend: str, kernel: Callable) -> Callable:
    def launch(*args):
        _launches[op, backend] += 1
        return kernel(*args)

    return launch


# ---- definition --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpSpec:
    """Everything the registry needs of one op; each op's file builds one and calls :func:`define`.

    ``forward``/``backward``: schemas without the name; ``*_fake``: shapes and dtypes;
    ``*_ref``: plain PyTorch kernels; ``save(ctx, inputs, output)``; ``differentiate(ctx, bwd,
    *grads)`` returns one gradient per forward input, calling ``bwd`` of its own namespace;
    ``autocast(dtype, device_type, args)`` returns the arguments as they run under autocast.
    An op without a gradient has no ``backward`` and nothing that belongs to it.
    ``cpu_refuses(x)``, ``cuda_refuses(x)``: why the library's kernel of that device cannot serve a
    call with the first argument ``x``.
    """

    name: str
    forward: str
    forward_fake: Callable
    forward_ref: Callable
    backward: str | None = None
    backward_fake: Callable | None = None
    backward_ref: Callable | None = None
    save: Callable | None = None
    differentiate: Callable | None = None
    autocast: Callable | None = None
    stem: str | None = None
    cpu_refuses: Callable[[torch.Tensor], str | None] | None = None
    cuda_refuses: Callable[[torch.Tensor], str | None] | None = None

    @property
    def triton_module(self) -> str:
        return f"fastenc.triton_kernels.{self.stem or self.name}"


_specs: dict[str, OpSpec] = {}
# Plain sets, filled as ops are defined: torch.compile traces through the choice that reads them.
_both_serve: set[str] = set()  # CUDA tensors: the CUDA library and Triton
_measured: set[str] = set()


def define(spec: OpSpec) -> None:
    """Register ``spec`` in every namespace: schema, fake, autograd, autocast, Python kernels."""
    _specs[spec.name] = spec
    _forward[spec.name] = {}
    for backend in (None, *BACKENDS):
        namespace = f"fastenc_{backend}" if backend else "fastenc"
        library = _libraries.setdefault(namespace, Library(namespace, "FRAGMENT"))
        library.define(f"{spec.name}_fwd{spec.forward}")
        forward = getattr(getattr(torch.ops, namespace), f"{spec.name}_fwd").default
        _forward[spec.name][backend] = forward
        torch.library.register_fake(f"{namespace}::{spec.name}_fwd", spec.forward_fake, lib=library)
        if spec.backward is not None:
            _define_backward(spec, namespace, library)
        if spec.autocast is not None:
            for device in ("cpu", "cuda"):
                library.impl(
                    f"{spec.name}_fwd",
                    _autocast(spec, forward, device),
                    f"Autocast{device.upper()}",
                )
        _register_python_kernels(spec, backend, library)
    in_library = _library.serves_cuda(f"{spec.name}_fwd")
    if in_library and _exists(spec.triton_module) and _exists("triton"):
        _both_serve.add(spec.name)
        capabilities = _library.gpu_capabilities()
        _measured.update(measured_for_triton(FASTER_IN_TRITON, capabilities) & {spec.name})


def _define_backward(spec: OpSpec, namespace: str, library: Library) -> None:
    library.define(f"{spec.name}_bwd{spec.backward}")
    backward = getattr(getattr(torch.ops, namespace), f"{spec.name}_bwd").default
    torch.library.register_fake(f"{namespace}::{spec.name}_bwd", spec.backward_fake, lib=library)
    torch.library.register_autograd(
        f"{namespace}::{spec.name}_fwd",
        _gradient(spec, backward),
        setup_context=_saver(spec),
        lib=library,
    )
    torch.library.register_autograd(
        f"{namespace}::{spec.name}_bwd", _no_second_gradient(spec.name), lib=library
    )


def _saver(spec: OpSpec) -> Callable:
    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        spec.save(ctx, inputs, output)

    return save


def _gradient(spec: OpSpec, backward: Callable) -> Callable:
    def gradient(ctx, *grads):
        return spec.differentiate(ctx, backward, *grads)

    return gradient


def _no_second_gradient(name: str) -> Callable:
    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"{name}: the gradient of its gradient (create_graph=True) is not implemented; "
            "fastenc.restore(model) brings modules back that have one"
        )

    return refuse


def _autocast(spec: OpSpec, forward: Callable, device: str) -> Callable:
    def run(*args):
        args = spec.autocast(torch.get_autocast_dtype(device), device, args)
        with torch.autocast(device, enabled=False):
            return forward(*args)

    return run


def _register_python_kernels(spec: OpSpec, backend: str | None, library: Library) -> None:
    for suffix, reference in (("fwd", spec.forward_ref), ("bwd", spec.backward_ref)):
        if reference is None:
            continue
        op = f"{spec.name}_{suffix}"
        shown = spec.name if suffix == "fwd" else op
        if backend in (None, "reference"):
            plain = _counted(shown, "reference", torch.no_grad()(reference))
            library.impl(op, plain, "CompositeExplicitAutograd")
        if backend in (None, "triton") and _exists(spec.triton_module):
            launch = _counted(shown, "triton", _lazy(spec.triton_module, op))
            key = "CUDA" if backend is None else "CompositeExplicitAutograd"
            if not (backend is None and (_library.serves_cuda(op) or not _exists("triton"))):
                library.impl(op, launch, key)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _lazy(module: str, attribute: str) -> Callable:
    def call(*args):
        return getattr(importlib.import_module(module), attribute)(*args)

    return call


# ---- choice ------------------------------------------------------------------------------------


def runs_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether a call on ``tensors`` is a plain eager one that the C++ library may serve.

    For ops that take the place of one of torch's: traced or transformed, that stays torch's.
    """
    return (
        not torch.compiler.is_compiling()  # before what it cannot trace
        and chosen_backend() in (None, "cpu")
        and all(t.device.type == "cpu" for t in tensors)
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
    )


def unavailable(name: str, backend: str) -> str | None:
    """Why ``backend`` cannot serve op ``name`` in this process, or None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastenc_cpu::{name}_fwd", "CPU"):
            return None
        return _library.cpu_reason() or "the C++ library has no kernel for this op"
    if backend == "triton":
        if not _exists(_specs[name].triton_module):
            return "there is no Triton kernel for this op"
        if not _exists("triton"):
            return "triton is not installed (pip install fastenc[gpu])"
        if torch.cuda.device_count() == 0 and os.environ.get("TRITON_INTERPRET") != "1":
            return "no GPU is available (TRITON_INTERPRET=1 runs Triton kernels on CPU tensors)"
        return None
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastenc_cuda::{name}_fwd", "CUDA"):
        return None
    return _library.cuda_reason() or "the CUDA library has no kernel for this op"


def backends() -> dict[str, dict[str, str]]:
    """``{op: {backend: "available" | reason}}`` for this process."""
    return {
        name: {backend: unavailable(name, backend) or "available" for backend in BACKENDS}
        for name in _specs
    }


def _refused(name: str, x: torch.Tensor) -> str | None:
    """Why the library's kernel of this kind of device does not serve ``x``, or None."""
    refuses = getattr(_specs[name], f"{x.device.type}_refuses", None)
    return None if refuses is None else refuses(x)


def measured_for_triton(
    table: dict[tuple[str, str], float], capabilities: Sequence[tuple[int, int]]
) -> frozenset[str]:
    """Ops that ``table`` leaves to Triton: its entries for the one kind of GPU that is here."""
    chips = {f"sm_{major}{minor}" for major, minor in capabilities}
    return frozenset(op for op, chip in table if chips == {chip})


def _in_triton(name: str, x: torch.Tensor) -> bool:
    """Whether the default op leaves this call to Triton, though the CUDA library is there.

    Where it was measured to be faster on this chip, or the library has no kernel for the shape.
    """
    return name in _both_serve and (name in _measured or _refused(name, x) is not None)


def _misplaced(backend: str, x: torch.Tensor, name: str = "") -> str | None:
    device = x.device.type
    if backend == "cpu" and device != "cpu":
        return f"it serves CPU tensors, got {device}"
    if backend == "cuda" and device != "cuda":
        return f"it serves CUDA tensors, got {device}"
    if backend in ("cpu", "cuda") and (refused := _refused(name, x)):
        return refused
    if backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it serves CPU tensors only under TRITON_INTERPRET=1"
    if backend != "reference" and x.dtype not in KERNEL_DTYPES:
        return f"it serves float32, bfloat16 and float16, got {x.dtype}"
    return None


def select(name: str, x: torch.Tensor) -> Callable:
    """The forward overload that serves ``x`` under this thread's choice of a backend."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return _without_tangents(name, _selected(name, x))
    return _selected(name, x)


def _without_tangents(name: str, forward: Callable) -> Callable:
    """torch drops the tangents of what a custom op is given without a word."""

    def run(*args):
        for x in args:
            if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented")
        return forward(*args)

    return run


def _selected(name: str, x: torch.Tensor) -> torch._ops.OpOverload:
    backend = _local.backend
    if backend is None:
        refused = f"no kernel for {x.dtype}" if x.dtype not in KERNEL_DTYPES else None
        if x.device.type == "cpu":
            refused = refused or _refused(name, x)
        if refused is None:
            on_gpu = x.device.type == "cuda"
            return _forward[name]["triton" if on_gpu and _in_triton(name, x) else None]
        note_fallback(f"{name}: {refused}, plain PyTorch runs")
        return _forward[name]["reference"]
    reason = unavailable(name, backend) or _misplaced(backend, x, name)
    if reason is None:
        return _forward[name][backend]
    others = {b: unavailable(name, b) or _misplaced(b, x, name) or "available" for b in BACKENDS}
    lines = "; ".join(f"{b}: {why}" for b, why in others.items())
    raise NotImplementedError(f"{name}: backend {backend!r} cannot serve this call ({lines})")
