"""The command line: ``fastenc backends``, ``fastenc encode`` and ``fastenc demo``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np


def main() -> None:
    """Entry point of ``fastenc``; needs the extra ``cli``."""
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError as missing:
        sys.exit(f"fastenc: the command line needs {missing.name}: pip install 'fastenc[cli]'")
    _app(typer)()


def read_texts(lines: Iterable[str], jsonl: bool, field: str = "text") -> Iterator[str]:
    """One text a line; an empty line is an empty text, so rows and lines stay aligned.

    Args:
        lines: with or without their line ends.
        jsonl: each line is a JSON string, or an object whose ``field`` is one.

    Raises:
        ValueError: a line is not what was said; its number is named.
    """
    for number, line in enumerate(lines, 1):
        text: Any = line.rstrip("\r\n")
        if jsonl:
            try:
                text = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if isinstance(text, dict):
                text = text.get(field)
            if not isinstance(text, str):
                raise ValueError(f"line {number} has no string {field!r}")
        yield text


def save(path: Path, rows: np.ndarray) -> None:
    """Write a .npy file under a temporary name and rename it: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def show_backends() -> None:
    """Print which backend serves which op here, and why the others do not."""
    from rich.console import Console
    from rich.table import Table

    from fastenc.ops import backends
    from fastenc.ops._registry import BACKENDS

    table = Table("op", *BACKENDS, title="fastenc backends", title_justify="left")
    reasons: dict[str, int] = {}
    for op, served in sorted(backends().items()):
        cells = []
        for backend in BACKENDS:
            why = served[backend]
            if why == "available":
                cells.append("[green]available[/]")
            else:
                cells.append(f"[dim]no ({reasons.setdefault(why, len(reasons) + 1)})[/]")
        table.add_row(op, *cells)
    console = Console()
    console.print(table)
    for why, number in reasons.items():
        console.print(f"({number}) {why}", style="dim", markup=False, highlight=False)


def encode_file(
    model: str, source: Path, out: Path, *, field: str, device: str | None, **options: Any
) -> str:
    """Embed the lines of ``source`` ("-": stdin) into ``out``; returns a sentence about it."""
    from fastenc import Encoder, record

    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}")
    jsonl = source.suffix in (".jsonl", ".ndjson")
    if str(source) == "-":
        texts = list(read_texts(sys.stdin, jsonl, field))
    else:
        with open(source, encoding="utf-8", newline="\n") as file:
            texts = list(read_texts(file, jsonl, field))
    prompts = {name: options.pop(name) for name in ("prompt", "prompt_name")}
    encoder = Encoder(model, **options)
    if device is not None:
        encoder.to(device)
    start = time.perf_counter()
    with record() as ran:
        rows = encoder.encode(texts, **prompts)
    took = time.perf_counter() - start
    save(out, rows)
    slower = "".join(f"\nfell back: {reason}" for reason in ran.fallbacks)
    return f"{rows.shape[0]} x {rows.shape[1]} float32 in {took:.1f} s: {out}{slower}"


def run_demo(arguments: list[str]) -> int:
    """Run examples/demo.py of the source tree; returns its exit status."""
    demo = Path(__file__).parents[1] / "examples" / "demo.py"
    if not demo.is_file():
        raise FileNotFoundError(f"the demo comes with the source tree; there is no {demo}")
    return subprocess.call([sys.executable, str(demo), *arguments])


def _app(typer: Any) -> Any:
    app = typer.Typer(help="Encoder models without padding.", no_args_is_help=True)

    def fail(error: Exception) -> Any:
        typer.secho(f"fastenc: {error}", fg="red", err=True)
        return typer.Exit(1)

    @app.command("backends")
    def backends() -> None:
        """Which backend serves which op on this machine, and why not."""
        show_backends()

    def argument(name: str, help: str) -> Any:
        return typer.Argument(metavar=name, help=help, show_default=False)

    def option(help: str, *names: str) -> Any:
        return typer.Option(*names, help=help, show_default=not names)

    @app.command("encode")
    def encode(
        model: Annotated[str, argument("FOLDER", "Model folder or hub id.")],
        source: Annotated[
            Path, argument("FILE", "One text a line; .jsonl: strings or objects; -: stdin.")
        ],
        out: Annotated[Path, option("The .npy file to write, (n, hidden).", "--out", "-o")],
        field: Annotated[str, option("The field of a JSON object that is the text.")] = "text",
        pooling: Annotated[str | None, option("mean, cls, max or last.")] = None,
        normalize: Annotated[bool, option("Scale vectors to length 1.")] = False,
        prompt: Annotated[str | None, option("Put before every text.")] = None,
        prompt_name: Annotated[str | None, option("A prompt of the model.")] = None,
        token_budget: Annotated[int, option("Most tokens in a batch.")] = 16384,
        truncate: Annotated[bool, option("Cut long texts, or refuse them.")] = True,
        max_length: Annotated[int | None, option("Most tokens of a text.")] = None,
        device: Annotated[str | None, option("cpu, cuda, cuda:1 ...")] = None,
    ) -> None:
        """Embed a file of texts into a .npy file."""
        options = {} if pooling is None else {"pooling": pooling}
        try:
            said = encode_file(
                model,
                source,
                out,
                field=field,
                device=device,
                prompt=prompt,
                prompt_name=prompt_name,
                normalize=normalize,
                token_budget=token_budget,
                truncate=truncate,
                max_length=max_length,
                **options,
            )
        except (ValueError, TypeError, OSError, RuntimeError, AssertionError) as error:
            raise fail(error) from None  # torch asserts that it was built for a device
        typer.echo(said)

    @app.command(
        "demo", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
    )
    def demo(context: typer.Context) -> None:
        """Embed real texts with real weights beside sentence-transformers and transformers."""
        try:
            raise typer.Exit(run_demo(context.args))
        except OSError as error:
            raise fail(error) from None

    return app


if __name__ == "__main__":
    main()
