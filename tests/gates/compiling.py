"""Compile what the ops launch, for chips that are not here, and read what came out.

The ops' own host code runs on CPU tensors; a stand-in driver names the target, and every launch
is compiled with the specialisation that a GPU call would get (alignment and divisibility of its
real arguments) instead of being run.

Where a caller asks for it (``on_record``), what was read is kept in the repository and an unchanged
kernel is not compiled anew (record.py); verdicts are not kept, every run judges afresh.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from record import Record, digest
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

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


# The instructions that are judged, in the order in which a reading has their counts.
CLASSES = {
    "HMMA": r"HMMA\..*",
    "HGMMA": r"HGMMA\..*",
    "tcgen05.mma": r"tcgen05\.mma",
    "v_mfma": r"v_mfma.*",
    "TF32": r"HG?MMA.*TF32.*",
    "narrow": r"(LDG|LDGSTS|STG)\.E(\.\w+)*\.[US](16|8)(\.\w+)*",
    "wide": r"(LDG|LDGSTS|STG)\.E(\.\w+)*\.128(\.\w+)*",
}


@dataclass
class Compiled:
    """One kernel for one target. ``classes``: counts by :data:`CLASSES`; ``instructions``: by
    opcode with its width, as in SASS, of what was compiled just now."""

    name: str
    chip: str
    dtype: str
    options: dict
    registers: int
    shared: int
    spills: int
    classes: dict[str, int]
    key: str = ""
    instructions: dict[str, int] | None = field(default=None, repr=False, compare=False)

    @property
    def reading(self) -> list[int]:
        return [self.registers, self.shared, self.spills, *self.classes.values()]

    @property
    def settings(self) -> str:
        shown = {k: v for k, v in self.options.items() if not isinstance(v, tuple) and v != 0}
        return " ".join(k if v is True else f"{k}={v}" for k, v in shown.items())

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def _tool(name: str, *arguments: str) -> str:
    command = [os.path.join(TOOLS, name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _counts(opcodes: Iterable[str]) -> dict[str, int]:
    return dict(Counter(opcodes))


def _code(cubin: bytes) -> bytes:
    """The sections of the ELF file that hold instructions."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    base = sections[names][4]
    found = b""
    for name, *_, offset, length in sections:
        if cubin.startswith(b".text.", base + name):
            found += cubin[offset : offset + length]
    return found


def _read_cubins(arch: int, cubins: list[bytes]) -> list[tuple[int, int, dict[str, int]]]:
    """Registers, bytes of stack and local memory, and instruction counts of each.

    Disassembled in one piece: nvdisasm takes 0.3 s to start.
    """
    used = []
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        for cubin in cubins:
            Path(file.name).write_bytes(cubin)
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
            used.append((int(found[1]), int(found[2]) + int(found[3])))
        Path(file.name).write_bytes(b"".join(codes))
        sass = _tool("nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", file.name)
    line = r"^\s+/\*(\w+)\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)"
    opcodes = [(int(place, 16), opcode) for place, opcode in re.findall(line, sass, re.M)]
    result, first = [], 0
    for (registers, spills), code in zip(used, codes, strict=True):
        inside = (opcode for place, opcode in opcodes if first <= place < first + len(code))
        result.append((registers, spills, _counts(inside)))
        first += len(code)
    return result


def _read_amdgcn(text: str) -> tuple[int, int, dict[str, int]]:
    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    return value("vgpr_count"), spills, _counts(re.findall(r"^\t([a-z]+_\w+)", text, re.M))


def read(chip: str, built: list) -> list[tuple[list[int], dict[str, int]]]:
    """The reading of each compiled kernel (registers, shared memory, spills, counts by
    :data:`CLASSES`), and all its instruction counts."""
    if TARGETS[chip].backend == "hip":
        found = [_read_amdgcn(b.asm["amdgcn"]) for b in built]
    else:
        found = _read_cubins(TARGETS[chip].arch, [b.asm["cubin"] for b in built])
    result = []
    for b, (registers, spills, instructions) in zip(built, found, strict=True):
        products = b.asm.get("ptx", "").count("tcgen05.mma")
        if products:
            instructions["tcgen05.mma"] = products
        counted = (
            sum(n for opcode, n in instructions.items() if re.fullmatch(pattern, opcode))
            for pattern in CLASSES.values()
        )
        result.append(([registers, b.metadata.shared, spills, *counted], instructions))
    return result


@functools.cache
def _readers() -> str:
    return repr(CLASSES) + "".join(map(inspect.getsource, (read, _read_cubins, _read_amdgcn)))


@functools.cache
def record_of(chip: str) -> Record:
    return Record(chip)


def digest_of(chip: str, kernel, specialisation: str) -> str:
    return digest(TARGETS[chip], kernel, specialisation, _readers())


def build(kernel, grid: tuple, args: tuple, options: dict, known: Callable[[str], bool]):
    """What Triton builds for a launch; None, and nothing is built, if its key is ``known``: the
    types, alignments and divisibility of the arguments, constants and options."""
    kernel.device_caches.clear()
    knobs.runtime.jit_cache_hook = lambda key, **_: known(key)
    try:
        return kernel.warmup(*args, grid=grid, **options)
    finally:
        knobs.runtime.jit_cache_hook = None


def name_of(kernel) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def compile_launch(
    chip: str, kernel, grid: tuple, args: tuple, options: dict, on_record: bool = False
) -> Compiled:
    """``on_record``: known from the record, if it is there, and put there, if it is not."""
    key, reading = "", None
    name = name_of(kernel)

    def known(specialisation: str) -> bool:
        nonlocal key, reading
        key = digest_of(chip, kernel, specialisation)
        reading = record_of(chip).get(key) if on_record else None
        return reading is not None

    built = build(kernel, grid, args, options, known)
    if built is not None:
        ((reading, instructions),) = read(chip, [built])
        if on_record:
            record_of(chip).add({key: (name, reading)})
    dtype = next(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
    registers, shared, spills, *counted = reading
    return Compiled(
        name=name,
        chip=chip,
        dtype=dtype.removeprefix("torch."),
        options=options,
        registers=registers,
        shared=shared,
        spills=spills,
        classes=dict(zip(CLASSES, counted, strict=True)),
        key=key,
        instructions=instructions if built is not None else None,
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
    chip: str,
    calls: list[Callable[[], object]],
    every_candidate: bool = False,
    on_record: bool = False,
) -> list[Compiled]:
    """Every distinct kernel that ``calls`` launch on ``chip``, compiled."""
    seen: dict[tuple, Compiled] = {}

    def launch(kernel, grid, *args, **options):
        kinds = tuple(
            str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in args
        )
        key = (kernel.fn.__name__, kinds, tuple(sorted(options.items())))
        if key not in seen:
            seen[key] = compile_launch(chip, kernel, grid, args, options, on_record)

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
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
WGMMA_ROWS = 64


def multiplies(kernel: Compiled) -> bool:
    """Whether the kernel is made of matrix products."""
    named = re.match(r"\w*attention|span_(score|candidates)|token_score", kernel.name)
    return bool(named) and kernel.name.endswith(PRODUCTS)


def matrix_instruction(kernel: Compiled) -> str:
    """The one its products are meant to take: wgmma on sm_90, but in tiles of fewer rows than that
    needs for heads wider than an encoder's, where 64 rows spill."""
    options = kernel.options
    width = sum(piece[1] for piece in options.get("V_PIECES", options.get("PIECES", ())))
    low = options.get("BAND", WGMMA_ROWS) < WGMMA_ROWS and width > 64
    low |= options.get("BLOCK_M", WGMMA_ROWS) < WGMMA_ROWS and width > 128
    return MATRIX["sm_80" if kernel.chip == "sm_90" and low else kernel.chip]


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
    if multiplies(kernel) and sixteen_bit and not kernel.classes[matrix_instruction(kernel)]:
        found.append(f"no {matrix_instruction(kernel)}")
    if multiplies(kernel) and not sixteen_bit and kernel.classes["TF32"]:
        found.append("fp32 products run in tf32")
    if TARGETS[kernel.chip].backend == "cuda" and vectors and kernel.name not in SMALL:
        allowed = narrow_allowed(kernel)
        narrow = kernel.classes["narrow"]
        if allowed is not None and narrow > allowed:
            found.append(f"{narrow} accesses of 16 bits or less")
        if not kernel.classes["wide"]:
            found.append("no 16-byte access")
    return found


def line_of(k: Compiled) -> str:
    """Registers, shared memory and spills of a kernel on one target."""
    return (
        f"{k.name:44} {k.chip:7} {k.dtype:8} {k.registers:4} {k.shared:7} {k.spills:6}  "
        f"{k.settings}"
    )


def table(lines: Iterable[str]) -> str:
    """What :func:`line_of` says of each kernel, once."""
    head = (
        f"{'kernel':44} {'target':7} {'dtype':8} {'regs':>4} {'shared':>7} {'spills':>6}  settings"
    )
    return "\n".join([head, *sorted(set(lines))])
