"""Compile what the ops launch, for chips that are not here, and read what came out.

The ops' own host code runs on CPU tensors; a stand-in driver names the target, and every launch
is compiled with the specialisation that a GPU call would get (alignment and divisibility of its
real arguments) instead of being run.

What was read is kept in the user's cache folder (:func:`_record`), by everything it follows from,
so that an unchanged kernel is not compiled anew; verdicts are not kept, every run judges afresh.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastenc import triton_kernels
from fastenc.triton_kernels import _common

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class _Driver:
    """Answers what Triton asks before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@dataclass
class Compiled:
    """One kernel for one target. ``instructions``: counts by opcode with its width, as in SASS."""

    name: str
    chip: str
    dtype: str
    options: dict
    shared: int
    registers: int
    spills: int
    instructions: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def settings(self) -> str:
        shown = {k: v for k, v in self.options.items() if not isinstance(v, tuple) and v != 0}
        return " ".join(k if v is True else f"{k}={v}" for k, v in shown.items())

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def _tool(name: str, *arguments: str) -> str:
    command = [os.path.join(TOOLS, name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cubin(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, bytes of stack and local memory, and instruction counts."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    counts: dict[str, int] = {}
    for opcode in re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sass, re.M):
        counts[opcode] = counts.get(opcode, 0) + 1
    return int(used[1]), int(used[2]) + int(used[3]), counts


def _read_amdgcn(text: str) -> tuple[int, int, dict[str, int]]:
    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    counts: dict[str, int] = {}
    for opcode in re.findall(r"^\t([a-z]+_\w+)", text, re.M):
        counts[opcode] = counts.get(opcode, 0) + 1
    return value("vgpr_count"), value("vgpr_spill_count") + value("sgpr_spill_count"), counts


def _read(chip: str, built) -> dict:
    """What the gates judge of a compiled kernel."""
    if TARGETS[chip].backend == "hip":
        registers, spills, counts = _read_amdgcn(built.asm["amdgcn"])
    else:
        registers, spills, counts = _read_cubin(built.asm["cubin"])
        if "tcgen05.mma" in built.asm["ptx"]:
            counts["tcgen05.mma"] = built.asm["ptx"].count("tcgen05.mma")
    shared = built.metadata.shared
    return {"shared": shared, "registers": registers, "spills": spills, "instructions": counts}


@functools.cache
def _hash_sources() -> None:
    """Triton's hash of a kernel's sources also depends on which kernels were hashed before it: here
    all are, in one order."""
    for module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        for member in vars(importlib.import_module(module.name)).values():
            getattr(member, "cache_key", None)


def _record(chip: str, kernel, specialisation: str) -> Path | None:
    """Where the reading of a compilation is kept, named by what it follows from: the source of the
    kernel and of all that it calls, the types, alignments and constants of its arguments, options,
    target, Triton's version and the code that reads. FASTENC_GATES_AFRESH=1: nowhere."""
    if os.environ.get("FASTENC_GATES_AFRESH") == "1":
        return None
    _hash_sources()
    readers = "".join(map(inspect.getsource, (_read, _read_cubin, _read_amdgcn)))
    switches = get_cache_invalidating_env_vars()
    switches |= {name: x for name, x in os.environ.items() if name.startswith("TRITON_PTXAS")}
    switches = sorted(switches.items())
    follows = triton.__version__, kernel.cache_key, specialisation, str(TARGETS[chip]), switches
    digest = hashlib.sha256(repr((*follows, readers)).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "fastenc" / "gates" / f"{digest}.json"


def build(kernel, grid: tuple, args: tuple, options: dict, known: Callable[[str], bool]):
    """What Triton builds for a launch; None, and nothing is built, if its key is ``known``: the
    types, alignments and divisibility of the arguments, constants and options."""
    kernel.device_caches.clear()
    knobs.runtime.jit_cache_hook = lambda key, **_: known(key)
    try:
        return kernel.warmup(*args, grid=grid, **options)
    finally:
        knobs.runtime.jit_cache_hook = None


def compile_launch(chip: str, kernel, grid: tuple, args: tuple, options: dict) -> Compiled:
    path: Path | None = None

    def known(key: str) -> bool:
        nonlocal path
        path = _record(chip, kernel, key)
        return path is not None and path.exists()

    built = build(kernel, grid, args, options, known)
    if built is None:
        read = json.loads(path.read_text())
    else:
        read = _read(chip, built)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(read))
            partial.replace(path)
    dtype = next(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
    stem = kernel.fn.__module__.rpartition(".")[2]
    return Compiled(
        name=f"{stem}.{kernel.fn.__name__}",
        chip=chip,
        dtype=dtype.removeprefix("torch."),
        options=options,
        **read,
    )


@contextlib.contextmanager
def target(chip: str, launch: Callable, every_candidate: bool = False) -> Iterator[None]:
    """Within: the host code sees ``chip``, and ``launch`` gets each kernel launch."""
    before = _common.launch, _common.chip_of, _common.run_chosen
    active = driver._active

    def run_all(key, device, candidates, run):
        for candidate in candidates:
            run(candidate)

    _common.launch = launch
    _common.chip_of = lambda device: _common.CHIPS[chip]
    if every_candidate:
        _common.run_chosen = run_all
    driver.set_active(_Driver(TARGETS[chip]))
    try:
        yield
    finally:
        driver._active = active
        _common.launch, _common.chip_of, _common.run_chosen = before


def compile_calls(
    chip: str, calls: list[Callable[[], object]], every_candidate: bool = False
) -> list[Compiled]:
    """Every distinct kernel that ``calls`` launch on ``chip``, compiled."""
    seen: dict[tuple, Compiled] = {}

    def launch(kernel, grid, *args, **options):
        kinds = tuple(
            str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args
        )
        key = (kernel.fn.__name__, kinds, tuple(sorted(options.items())))
        if key not in seen:
            seen[key] = compile_launch(chip, kernel, grid, args, options)

    with target(chip, launch, every_candidate):
        for call in calls:
            call()
    return list(seen.values())


# ---- verdicts ----------------------------------------------------------------------------------

PRODUCTS = ("forward_kernel", "backward_kernel", "partial_kernel", "candidates_kernel")
# These touch one row a sequence, a table or a list: nothing there is worth 16 bytes.
SMALL = {
    "_attention._schedule_kernel",
    "add_layer_norm._reduce_kernel",
    "disentangled_attention_bwd.disentangled_reduce_kernel",
    "segment_pool._finish_kernel",
    "segment_pool._pick_kernel",
    "span_score_bwd.add_chunks_kernel",
    "varlen_attention_bias.bias_reduce_kernel",
}
NARROW = r"(LDG|LDGSTS|STG)\.E(\.\w+)*\.[US](16|8)(\.\w+)*"
WIDE = r"(LDG|LDGSTS|STG)\.E(\.\w+)*\.128(\.\w+)*"
MATRIX = {
    "sm_80": r"HMMA\..*",
    "sm_90": r"HGMMA\..*",
    "sm_100": r"tcgen05\.mma",
    "gfx942": r"v_mfma.*",
}
WGMMA_ROWS = 64


def multiplies(kernel: Compiled) -> bool:
    """Whether the kernel is made of matrix products."""
    named = re.match(r"\w*attention|span_(score|candidates)|token_score", kernel.name)
    return bool(named) and kernel.name.endswith(PRODUCTS)


def matrix_instruction(kernel: Compiled) -> str:
    """The one its products are meant to take: wgmma, unless none of them has the rows for it."""
    rows = min(kernel.options.get(name, WGMMA_ROWS) for name in ("BAND", "BLOCK"))
    return MATRIX["sm_80" if kernel.chip == "sm_90" and rows < WGMMA_ROWS else kernel.chip]


def narrow_allowed(kernel: Compiled) -> int | None:
    """16-bit accesses that are meant: gathers of the bias table, one row of a pooled gradient, the
    gradient of span scores, whose rows are as long as there are labels, and the three outputs of
    token scores with their three rows of weights."""
    if kernel.name == "token_score.scores_forward_kernel":
        return 6
    if kernel.name == "token_score_bwd.hidden_backward_kernel":
        return 12
    if kernel.options.get("BIAS") or "bias" in kernel.name:
        return None
    if kernel.name.startswith("span_score_bwd"):
        o = kernel.options
        loads = o["BLOCK_M"] * o["BLOCK_C"] // (32 * o["num_warps"])
        loads *= 2 if kernel.chip == "sm_100" else 1  # a step of the loop is there twice
        return 2 * loads if "words" in kernel.name else loads + 1
    return 1 if kernel.name == "segment_pool._backward_kernel" else 0


def faults(kernel: Compiled, sixteen_bit: bool, vectors: bool = True) -> list[str]:
    """What the gates hold against ``kernel``. ``vectors``: its rows allow 16-byte accesses."""
    found = []
    if kernel.chip == "sm_90" and kernel.spills:
        found.append(f"{kernel.spills} bytes of spills")
    limit = _common.CHIPS[kernel.chip].shared
    if kernel.shared > limit:
        found.append(f"{kernel.shared} bytes of shared memory, the chip has {limit}")
    if multiplies(kernel) and sixteen_bit and not kernel.count(matrix_instruction(kernel)):
        found.append(f"no {matrix_instruction(kernel)}")
    if multiplies(kernel) and not sixteen_bit and kernel.count(r"HG?MMA.*TF32.*"):
        found.append("fp32 products run in tf32")
    if TARGETS[kernel.chip].backend == "cuda" and vectors and kernel.name not in SMALL:
        allowed = narrow_allowed(kernel)
        narrow = kernel.count(NARROW)
        if allowed is not None and narrow > allowed:
            found.append(f"{narrow} accesses of 16 bits or less")
        if not kernel.count(WIDE):
            found.append("no 16-byte access")
    return found


def table(kernels: list[Compiled]) -> str:
    """Registers, shared memory and spills, one line a kernel and target."""
    head = (
        f"{'kernel':44} {'target':7} {'dtype':8} {'regs':>4} {'shared':>7} {'spills':>6}  settings"
    )
    lines = {
        f"{k.name:44} {k.chip:7} {k.dtype:8} {k.registers:4} {k.shared:7} {k.spills:6}  "
        f"{k.settings}"
        for k in kernels
    }
    return "\n".join([head, *sorted(lines)])
