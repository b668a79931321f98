"""The demo's one picture: tokens a second, one bar a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from demo_runs import Comparison
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

OURS, THEIRS, INK, QUIET, RULE = "#e4572e", "#a9b4c2", "#22303c", "#6b7885", "#e7ebef"
LEFT = 0.025
"""Where headings and footnote begin, of the figure's width."""


def draw(path: Path, comparisons: list[Comparison], stamp: Mapping[str, Any]) -> None:
    """Horizontal bars of the medians, whiskers from the slowest to the fastest round."""
    bars = [len(c.seconds) for c in comparisons]
    style = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 2.5 + 0.62 * sum(bars)))
        axes = figure.subplots(len(bars), 1, gridspec_kw={"height_ratios": bars})
        for axis, comparison in zip(axes, comparisons, strict=True):
            _bars(axis, comparison)
            _heading(figure, axis, comparison)
        figure.text(LEFT, 0.955, "Embedding text on this CPU", size=15, weight="bold", va="center")
        figure.text(LEFT, 0.015, _footnote(stamp), size=7.5, color=QUIET, linespacing=1.5)
        figure.subplots_adjust(left=0.29, right=0.975, top=0.83, bottom=0.15, hspace=0.52)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=160, format="png")
        temporary.replace(path)


def _bars(axis: Any, comparison: Comparison) -> None:
    names = list(comparison.seconds)
    rates = [comparison.rate(name) for name in names]
    slowest = [comparison.tokens / max(comparison.seconds[name]) for name in names]
    fastest = [comparison.tokens / min(comparison.seconds[name]) for name in names]
    below = [rate - slow for rate, slow in zip(rates, slowest, strict=True)]
    above = [fast - rate for rate, fast in zip(rates, fastest, strict=True)]
    places = range(len(names))
    colors = [OURS if name == "fastenc" else THEIRS for name in names]
    axis.barh(places, rates, height=0.66, color=colors)
    axis.errorbar(
        rates, places, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.8, capsize=2
    )
    edge = max(fastest)
    for place, name in zip(places, names, strict=True):
        ours = name == "fastenc"
        ratio = "" if ours else f"   fastenc {comparison.ratio(name):.2f}×"
        axis.text(
            fastest[place] + 0.012 * edge,
            place,
            f"{rates[place]:,.0f}{ratio}",
            va="center",
            size=9.5,
            weight="bold" if ours else "normal",
        )
    axis.set_yticks(places, [f"{name}\n{comparison.batches[name]}" for name in names], size=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, edge * 1.26)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("tokens a second, padding not counted", size=8.5, color=QUIET)
    axis.tick_params(colors=QUIET, labelsize=8.5, length=0)
    axis.tick_params(axis="y", labelcolor=INK)
    axis.grid(axis="x", color=RULE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[:].set_visible(False)


def _heading(figure: Figure, axis: Any, comparison: Comparison) -> None:
    where = blended_transform_factory(figure.transFigure, axis.transAxes)
    inches = axis.get_position().height * figure.get_figheight()
    for line, size, weight, color, up in (
        (comparison.title, 10.5, "bold", INK, 0.27),
        (
            f"{comparison.scope}; largest difference from {comparison.reference}:"
            f" {comparison.difference['fastenc']:.1e}",
            9, "normal", QUIET, 0.08,
        ),
    ):  # fmt: skip
        axis.text(
            LEFT, 1 + up / inches, line, transform=where, size=size, weight=weight, color=color
        )


def _footnote(stamp: Mapping[str, Any]) -> str:
    machine, versions = stamp["machine"], stamp["versions"]
    shown = ("python", "torch", "transformers", "sentence-transformers")
    return (
        f"{machine['cpu']}, {machine['threads']} threads, fastenc on {machine['fastenc_isa']},"
        f" float32 · rounds interleaved, whiskers from slowest to fastest\n"
        f"fastenc {versions['fastenc']} at {stamp['commit']}, "
        + ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
        + f" · {stamp['date']}"
    )
