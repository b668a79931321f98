"""Who may import whom, read off the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A layer may import the layers named behind it (and itself); third-party packages are listed too.
LAYERS = {
    "fastenc.ops": ({"fastenc.triton_kernels", "fastenc._C"}, {"torch"}),
    "fastenc.nn": ({"fastenc.ops"}, {"torch"}),
    "fastenc.models": (
        {"fastenc.ops", "fastenc.nn", "fastenc._C"},
        {"torch", "numpy", "transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm"},
    ),
    "fastenc.encoder": (
        {"fastenc.ops", "fastenc.nn", "fastenc.models"},
        {"torch", "numpy", "transformers", "safetensors", "tokenizers", "huggingface_hub", "tqdm"},
    ),
    # models of texts, not of tokens: fastenc/models/sentence.py, setfit.py
    "fastenc.sentence": (
        {"fastenc.ops", "fastenc.nn", "fastenc.models", "fastenc.encoder"},
        {"torch", "numpy", "safetensors", "transformers", "huggingface_hub", "sklearn", "joblib",
         "setfit"},
    ),
    "fastenc.train": (
        {"fastenc.ops", "fastenc.nn", "fastenc.models", "fastenc.encoder", "fastenc.sentence"},
        None,
    ),
    "fastenc.integrations": (
        {"fastenc._C", "fastenc.ops", "fastenc.nn", "fastenc.models", "fastenc.encoder",
         "fastenc.sentence"},
        None,
    ),
    "fastenc.cli": (
        {"fastenc.ops", "fastenc.nn", "fastenc.models", "fastenc.encoder", "fastenc.train",
         "fastenc.integrations"},
        None,
    ),
    "fastenc.testing": ({"fastenc.ops"}, {"torch"}),
    "fastenc._C": (set(), set()),
    "fastenc.triton_kernels": (set(), {"torch", "triton"}),
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("fastenc", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    if module.startswith("fastenc._encoder"):
        return "fastenc.encoder"
    if module.startswith(("fastenc.models.sentence", "fastenc.models.setfit")):
        return "fastenc.sentence"
    if module.startswith("fastenc.models._setfit"):
        return "fastenc.sentence"
    if module == "fastenc._gliner_cases":
        return "fastenc.testing"
    names = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    return names[0] if names else None


def imports(path: Path) -> set[str]:
    found = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted([*ROOT.glob("fastenc/**/*.py"), *ROOT.glob("triton_kernels/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    layer = layer_of(module_name(path))
    if layer is None:
        assert module_name(path) == "fastenc", f"{path} belongs to no layer"
        return
    below, third_party = LAYERS[layer]
    for name in imports(path):
        top = name.split(".")[0]
        if top == "fastenc":
            target = layer_of(name)
            from_the_top = layer == "fastenc.cli" and target is None
            assert from_the_top or target in below | {layer}, f"{layer} imports {name}"
        elif third_party is not None and top not in sys.stdlib_module_names:
            assert top in third_party, f"{layer} imports {name}"


def test_cpu_and_cuda_sources_do_not_include_each_other():
    for kind, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in ROOT.glob(f"csrc/{kind}/**/*.*"):
            included = [line for line in path.read_text().splitlines() if "#include" in line]
            assert not any(f"{other}/" in line for line in included), path


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    run(
        "import sys; sys.modules['triton'] = None; import fastenc\n"
        "heavy = {'transformers', 'gliner', 'setfit', 'sentence_transformers', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "fastenc.geglu(__import__('torch').randn(2, 4))"
    )


def test_triton_kernels_refuse_another_name():
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode != 0 and "fastenc.triton_kernels" in done.stderr


def current_device_calls(tree: ast.AST) -> list[int]:
    """Lines that ask torch.cuda for whatever device is current: a model may live on another."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            called = ast.unparse(node.func)
            name = called.rpartition(".")[2]
            cuda = called.startswith("torch.cuda.") and name in ("Stream", "current_stream")
            event = name == "record" and called not in ("record", "fastenc.record")
            if cuda or event or called == "torch.cuda.synchronize":
                found.append(node.lineno)
    return found


def test_no_stream_of_the_current_device():
    assert current_device_calls(ast.parse("e = torch.cuda.Event()\ne.record()")) == [2]
    assert current_device_calls(ast.parse("s = torch.cuda.current_stream()")) == [1]
    for path in sorted((ROOT / "fastenc").rglob("*.py")):
        assert current_device_calls(ast.parse(path.read_text())) == [], path
