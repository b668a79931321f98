"""``python -m bench.sanitize``: small calls of every CUDA op under NVIDIA's compute-sanitizer.

memcheck finds accesses outside of what was allocated (each tensor is an allocation of its own),
racecheck races in shared memory; only the CUDA library's kernels are watched. Exits with 1 if a
tool finds anything, with 2 where there is nothing to run it on. ``--calls`` makes the calls alone,
on any backend: what the tools watch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

import fastenc
from fastenc import testing

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the exit status asked of the sanitizer where it found something
CASE_BYTES = 4 << 20  # racecheck slows a kernel hundreds of times
# test_gpu_ops.py has the same ops; span_candidates has no gradients and is called apart.
OPS = (
    "geglu", "rope", "add_layer_norm", "segment_pool", "varlen_attention", "rope_varlen_attention",
    "span_pool", "span_score", "token_score", "disentangled_attention",
)  # fmt: skip


def find_tool(environment: Mapping[str, str]) -> str | None:
    """compute-sanitizer on the path or in the toolkit that CUDA_HOME or CUDA_PATH names."""
    folders = [f"{environment[v]}/bin" for v in ("CUDA_HOME", "CUDA_PATH") if environment.get(v)]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([environment.get("PATH", ""), *folders])
    )


def command(sanitizer: str, tool: str) -> list[str]:
    """The sanitizer's command line around this module's ``--calls``."""
    return [
        sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND}", "--target-processes=all",
        "--kernel-name", "kernel_substring=fastenc",
        sys.executable, "-m", "bench.sanitize", "--calls",
    ]  # fmt: skip


def why_not(sanitizer: str | None) -> str | None:
    """Why nothing can be run here, or None."""
    if sanitizer is None:
        return "compute-sanitizer was not found (CUDA toolkit; PATH, CUDA_HOME)"
    if not torch.cuda.is_available():
        return "no GPU is available"
    reasons = fastenc.backends()
    if all(reasons[op]["cuda"] != "available" for op in OPS):
        return f"the CUDA library serves no op: {reasons[OPS[0]]['cuda']}"
    return None


def small_cases(op: str, each: int) -> Iterator[testing.Case]:
    """Up to ``each`` cases of ``op`` whose tensors take at most CASE_BYTES in fp32."""
    for case in testing.cases(op):
        args, kwargs = case.make(torch.float32, "cpu")
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if each > 0 and sum(x.nbytes for x in tensors) <= CASE_BYTES:
            each -= 1
            yield case


def candidates(dtype: torch.dtype, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    start, end, labels = (
        torch.randn(shape, generator=g).to(device, dtype)
        for shape in ((21, 72), (21, 72), (2, 40, 72))
    )
    cu = testing.cu_seqlens_of((13, 8), device)
    fastenc.span_candidates(start, end, labels, cu, 12, 0.6)


def call_all(backend: str, device: str, each: int) -> dict[str, int]:
    """Runs the small cases that ``backend`` serves, with gradients: {op: calls}."""
    made = {}
    with fastenc.use_backend(backend):
        for op in (*OPS, "span_candidates"):
            if fastenc.backends()[op][backend] != "available":
                continue
            chosen = [] if op == "span_candidates" else list(small_cases(op, each))
            for dtype in testing.DTYPES:
                for case in chosen:
                    args, kwargs = case.make(dtype, device)
                    testing.run_with_gradients(getattr(fastenc, op), args, kwargs)
                if op == "span_candidates":
                    candidates(dtype, device)
            made[op] = len(testing.DTYPES) * max(len(chosen), 1)
    if device == "cuda":
        torch.cuda.synchronize()
    return made


def main(
    calls: Annotated[bool, typer.Option("--calls", help="the calls alone, unwatched")] = False,
    tool: Annotated[str, typer.Option(help="separated by commas")] = ",".join(TOOLS),
    backend: Annotated[str, typer.Option(help="of --calls")] = "cuda",
    device: Annotated[str, typer.Option(help="of --calls")] = "cuda",
    each: Annotated[int, typer.Option(help="cases of an op, of --calls")] = 12,
) -> None:
    if calls:
        print(call_all(backend, device, each))
        return
    sanitizer = find_tool(os.environ)
    if (reason := why_not(sanitizer)) is not None:
        print(f"bench.sanitize: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    # Without the caching allocator an access past a tensor is one past its allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for name in tool.split(","):
        print(f"{name}:", flush=True)
        if subprocess.run(command(sanitizer, name), cwd=ROOT, env=environment).returncode:
            failed.append(name)
    if failed:
        print(f"bench.sanitize: {', '.join(failed)} failed", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
