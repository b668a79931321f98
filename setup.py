"""Builds ``fastenc._C`` (CPU kernels and host code) and, where nvcc is, ``fastenc._cuda``.

Both are built against torch's stable ABI. The CUDA library needs neither a GPU nor a torch with
CUDA to be built, which torch's CUDAExtension would ask for; so nvcc is called here.
Environment: FASTENC_CUDA=0/1, FASTENC_CUDA_ARCHS, FASTENC_SANITIZE=1, MAX_JOBS (docs/install.md).

The Python sources of ``triton_kernels/`` are installed as ``fastenc.triton_kernels`` and under no
other name: ``triton_kernels`` alone is an upstream package.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pybind11
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

ROOT = os.path.dirname(os.path.abspath(__file__))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
DEFAULT_ARCHS = "80;90a"
OLDEST_NVCC = (12, 5)  # cudaGetDriverEntryPointByVersion
# CUDA sources compiled as one. torch's headers take 18 s a source (Zen 3: the host's compiler and
# its front end, and each target's once more), what a small source adds takes 2 to 10.
UNITS = {
    "rows": ("add_layer_norm", "add_layer_norm_bwd", "geglu", "rope", "segment_pool"),
    "spans": ("span_candidates", "span_pool", "span_score", "span_score_bwd"),
    "tokens": ("token_score", "token_score_bwd"),
    "global_sm90": ("global_attention_sm90", "global_attention_bwd_sm90"),
    "local_sm90": (
        "local_attention_sm90",
        "local_attention_bwd_sm90",
        "local_attention_stream_bwd_sm90",
    ),
}
# -O1: at -O3 the instrumented attention backward compiles for a quarter of an hour.
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def cpu_extension(sanitize: bool = False) -> CppExtension:
    sources = sorted(glob.glob("csrc/cpu/*.cpp") + glob.glob("csrc/host/*.cpp"))
    return CppExtension(
        name="fastenc._C",
        sources=sources,
        include_dirs=[ROOT, pybind11.get_include()],
        depends=sorted(glob.glob("csrc/**/*.h", recursive=True)),
        extra_compile_args=[
            *(SANITIZED if sanitize else ["-O3", "-g0"]),
            "-std=c++20",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wall",
            STABLE_ABI,
        ],
        extra_link_args=[
            *(["-Wl,--no-as-needed"] if os.name == "posix" else []),
            *(SANITIZED if sanitize else []),
        ],
    )


# ---- the CUDA library ----------------------------------------------------------------------------


def find_nvcc(env: Mapping[str, str]) -> str | None:
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    named = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    return named or shutil.which("nvcc", path=env.get("PATH", ""))


def nvcc_release(nvcc: str) -> tuple[int, ...]:
    """Such as (13, 0); (0,) where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0,)


def cuda_sources() -> list[str]:
    return glob.glob(f"{ROOT}/csrc/cuda/*.cu")


def obstacle(nvcc: str | None) -> str | None:
    """Why the CUDA library cannot be built, if so."""
    if not cuda_sources():
        return "no sources in csrc/cuda"
    if nvcc is None:
        return "nvcc was not found"
    release = nvcc_release(nvcc)
    if release < OLDEST_NVCC:
        needed = f"nvcc {'.'.join(map(str, OLDEST_NVCC))} or later is needed"
        return f"{needed}, {nvcc} is {'.'.join(map(str, release))}"
    return None


def choose_cuda(env: Mapping[str, str]) -> tuple[str | None, str]:
    """(nvcc or None, the line to print). FASTENC_CUDA=1 where it cannot be built is an error."""
    wanted = env.get("FASTENC_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTENC_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return None, "fastenc: the CUDA library is not built (FASTENC_CUDA=0)"
    nvcc = find_nvcc(env)
    why = obstacle(nvcc)
    if why and wanted == "1":
        raise SystemExit(f"FASTENC_CUDA=1, but {why}")
    if why:
        return None, f"fastenc: the CUDA library is not built ({why})"
    archs = ", ".join(f"sm_{a}" for a in cuda_archs(env))
    return nvcc, f"fastenc: the CUDA library is built with {nvcc} for {archs}"


def cuda_archs(env: Mapping[str, str]) -> list[str]:
    """FASTENC_CUDA_ARCHS, such as "80;90a": 80 and up; "a" and "f" are nvcc's suffixes."""
    text = env.get("FASTENC_CUDA_ARCHS") or DEFAULT_ARCHS
    archs = [a for a in re.split(r"[;, ]+", text) if a]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise SystemExit(
                f'FASTENC_CUDA_ARCHS: expected 80 or later, such as "80;90a", got {arch!r}'
            )
    return archs


def gencode(archs: list[str]) -> list[str]:
    """Code for each architecture, and PTX of the oldest portable one for those yet to come."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    portable = sorted((a for a in archs if a.isdigit()), key=int)
    if portable:
        flags.append(f"-gencode=arch=compute_{portable[0]},code=compute_{portable[0]}")
    return flags


def nvcc_flags(archs: list[str]) -> list[str]:
    return [
        "-O3",
        "-std=c++20",
        "-DUSE_CUDA",
        STABLE_ABI,
        f'-DFASTENC_CUDA_ARCHS="{";".join(archs)}"',
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-g0",
        "-Xptxas=-v",
        *gencode(archs),
        f"-I{ROOT}",
        *(f"-isystem={path}" for path in include_paths()),
    ]


def included(source: str) -> list[str]:
    """``source`` and the project's headers that it includes, directly or not."""
    found = [os.path.abspath(source)]
    for path in found:
        with open(path) as file:
            for name in re.findall(r'^#include "(.+)"', file.read(), re.MULTILINE):
                header = os.path.normpath(os.path.join(os.path.dirname(path), name))
                if header not in found:
                    found.append(header)
    return found


def units(sources: list[str]) -> dict[str, list[str]]:
    """{name: sources compiled as one}, the longest to compile first."""
    unit_of = {stem: name for name, stems in UNITS.items() for stem in stems}
    found: dict[str, list[str]] = {}
    for source in sorted(sources):
        stem = os.path.splitext(os.path.basename(source))[0]
        found.setdefault(unit_of.get(stem, stem), []).append(source)
    backward = {name for name, of in found.items() if any("_bwd" in source for source in of)}
    return {name: found[name] for name in sorted(found, key=lambda n: (n not in backward, n))}


def object_folder(archs: list[str]) -> str:
    """Where objects are kept for the next build, and for the tests that read them."""
    return os.path.join(ROOT, "build", "-".join(["cuda", *archs]))


def compile_cuda(
    nvcc: str, name: str, sources: list[str], build_dir: str, flags: list[str], threads: int = 1
) -> str:
    """One object file, unless nothing that it depends on has changed; ptxas' words beside it."""
    stem = os.path.join(build_dir, name)
    source = sources[0]
    if len(sources) > 1:
        source = f"{stem}.cu"
        lines = [f'#include "{os.path.relpath(path, build_dir)}"\n' for path in sources]
        with open(source, "w") as file:
            file.writelines(lines)
    command = [nvcc, *flags, "-c", source, "-o", f"{stem}.o"]
    digest = hashlib.sha256("\0".join(command).encode())
    for path in included(source):
        with open(path, "rb") as file:
            digest.update(file.read())
    stamp = f"{stem}.stamp"
    if os.path.exists(stamp) and os.path.exists(f"{stem}.o"):
        with open(stamp) as file:
            if file.read() == digest.hexdigest():
                return f"{stem}.o"
    command.append(f"--threads={threads}")  # targets at once
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(f"{stem}.log", "w") as file:
        file.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    with open(stamp, "w") as file:
        file.write(digest.hexdigest())
    return f"{stem}.o"


def build_cuda(nvcc: str, archs: list[str], build_dir: str, library: str, jobs: int) -> None:
    """csrc/cuda/*.cu into one shared library.

    torch's symbols stay open until it is loaded; libtorch.so is where the loader looks for them:
    with CUDA it brings libtorch_cuda.so, which a torch without CUDA has nothing to link to.
    """
    os.makedirs(build_dir, exist_ok=True)
    os.makedirs(os.path.dirname(library) or ".", exist_ok=True)
    flags = nvcc_flags(archs)
    start = os.times()
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(
            pool.map(
                lambda unit: compile_cuda(nvcc, *unit, build_dir, flags, jobs),
                units(cuda_sources()).items(),
            )
        )
    link = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL,--no-as-needed"]
    torch_libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch"]
    subprocess.run(
        [nvcc, *link, *gencode(archs), *objects, *torch_libraries, "-o", library], check=True
    )
    end = os.times()
    cpu = end.children_user + end.children_system - start.children_user - start.children_system
    wall = end.elapsed - start.elapsed
    print(f"fastenc: the CUDA library took {wall:.0f} s, {cpu:.0f} s of CPU time", flush=True)


def cuda_extension() -> Extension:
    depends = glob.glob("csrc/cuda/**/*.*", recursive=True) + glob.glob("csrc/common/*.h")
    return Extension("fastenc._cuda", sources=[], depends=sorted(depends))


class Build(BuildExtension):
    def build_extension(self, ext: Extension) -> None:
        if ext.name != "fastenc._cuda":
            super().build_extension(ext)
            return
        nvcc, _ = choose_cuda(os.environ)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        archs, library = cuda_archs(os.environ), self.get_ext_fullpath(ext.name)
        build_cuda(nvcc, archs, object_folder(archs), library, jobs)


if __name__ == "__main__":
    cuda, line = choose_cuda(os.environ)
    print(line, flush=True)
    setup(
        packages=[*find_packages(include=["fastenc", "fastenc.*"]), "fastenc.triton_kernels"],
        package_dir={"fastenc.triton_kernels": "triton_kernels"},
        package_data={"fastenc": ["py.typed"]},
        ext_modules=[
            cpu_extension(sanitize=os.environ.get("FASTENC_SANITIZE") == "1"),
            *([cuda_extension()] if cuda else []),
        ],
        cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    )
