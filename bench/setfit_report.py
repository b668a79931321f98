"""SetFit's figures: kept row by row, put into the README with their plot.

    python -m bench.setfit_report     README.md between the setfit marks, docs/plots/setfit.png

Speed is of bench/results/<machine>/setfit.json (``python -m bench.setfit``, ``python -m
bench.setfit_training``), accuracy of bench/results/accuracy/setfit.json (``make accuracy``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench import accuracy, measure
from bench.report import DOCS, heading, markdown_table

ROOT = DOCS.parent
MARKS = re.compile(r"(<!-- setfit:[^>]*-->\n).*?(<!-- /setfit -->)", re.DOTALL)
OURS, THEIRS = "#0b6e4f", "#c44536"
PEERS = ("setfit", "sentence-transformers")
ORDER = (
    "bulk predict", "single predict", "CrossEncoder bulk predict",
    "exact 2x8", "block 6x8", "block 6x64", "head 6x8",
)  # fmt: skip
TASKS = {"debian": "Debian packages, 4 sections", "mails": "mails, spam or not"}


# ---- keeping rows --------------------------------------------------------------------------------


def keep(kind: str, rows: dict[str, dict[str, Any]], path: Path | None = None) -> Path:
    """Put rows into the machine's setfit.json; those of other versions of the packages go.

    Args:
        kind: "inference", "training" or "memory".
        rows: {name: figures}; each gets the date and the commit.
    """
    stamp = measure.stamp()
    path = path or measure.RESULTS / stamp["machine"]["name"] / "setfit.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("versions") != json.loads(json.dumps(stamp["versions"])):
        kept = {}
    about = {"commit": stamp["commit"], "date": stamp["date"]}
    found = kept.get(kind, {}) | {name: row | about for name, row in rows.items()}
    measure.write_json(path, kept | stamp | {kind: found})
    return path


# ---- the README ----------------------------------------------------------------------------------


def speed_table(results: dict[str, Any]) -> str:
    """One line a comparison: seconds of setfit (or sentence-transformers) and of fastenc."""
    lines = []
    for name, row in in_order(results, "inference"):
        spent = row["seconds"]
        peer = next(who for who in PEERS if who in spent)
        for who in sorted(spent.keys() - {peer}, key=spent.get, reverse=True):
            ahead = f"{row['ahead'][who]:.2f}x"
            lines.append([f"{name}: {who}", _time(spent[peer]), _time(spent[who]), ahead, "–"])
    for name, row in in_order(results, "training"):
        held = results.get("memory", {}).get(name)
        memory = f"{held['setfit_peak_mib']} / {held['fastenc_peak_mib']}" if held else "–"
        lines.append(
            [
                f"train {name}", _time(row["setfit_seconds"]), _time(row["fastenc_seconds"]),
                f"{row['ratio']:.2f}x", memory,
            ]
        )  # fmt: skip
    head = ["", "setfit", "fastenc", "ahead by", "training memory in MiB: setfit / fastenc"]
    return markdown_table(head, lines)


def in_order(results: dict[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    return sorted(results.get(kind, {}).items(), key=lambda pair: ORDER.index(pair[0]))


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def accuracy_table(results: dict[str, Any]) -> str:
    lines = []
    for task, rows in results["summary"].items():
        name, shots = task.split("/")
        if "block" not in rows or "setfit" not in rows:
            continue
        cells = [f"{TASKS[name]}, {shots} a class"]
        for row in ("frozen", "setfit", "block"):
            value = rows[row]
            cells.append(f"{value['accuracy']:.1f} ({value['seeds']})")
        against = rows["block"].get("minus_setfit")
        cells.append(f"{against['lower_95']:+.2f} ({against['seeds']})" if against else "–")
        lines.append(cells)
    return markdown_table(
        [
            "accuracy in % (seeds)", "frozen body + logistic regression", "setfit",
            "fastenc, block pairing", "block − setfit, lower 95% bound",
        ],
        lines,
    )  # fmt: skip


def section(speed: dict[str, Any], right: dict[str, Any]) -> str:
    dates = sorted({row["date"] for kind in ("inference", "training")
                    for row in speed.get(kind, {}).values()})  # fmt: skip
    about = heading(speed | {"date": ", ".join(dates)})
    return (
        f"\n{accuracy_table(right)}\n\n{speed_table(speed)}\n\n"
        f"![SetFit's accuracy and speed](docs/plots/setfit.png)\n\n{about}\n\n"
    )


# ---- the plot ------------------------------------------------------------------------------------


def plot(speed: dict[str, Any], right: dict[str, Any], path: Path) -> None:
    """Left: accuracy of each task; right: how far fastenc is ahead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, axis) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=120)
    rows = ("frozen", "setfit", "block")
    colours = {"frozen": "#9a9a9a", "setfit": THEIRS, "block": OURS}
    labels = {"frozen": "frozen body", "setfit": "setfit", "block": "fastenc, block pairing"}
    tasks = [t for t, found in right["summary"].items() if set(rows) <= set(found)]
    for i, row in enumerate(rows):
        heights = [right["summary"][task][row]["accuracy"] for task in tasks]
        places = [x + (i - 1) * 0.27 for x in range(len(tasks))]
        bars = left.bar(places, heights, 0.27, label=labels[row], color=colours[row])
        left.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    left.set_xticks(range(len(tasks)), [t.replace("/", "\n") + " a class" for t in tasks])
    left.tick_params(axis="x", labelsize=8)
    left.set_ylim(bottom=50)
    left.set_ylabel("accuracy, % (axis from 50)")
    left.legend(fontsize=8, frameon=False, loc="upper left")
    names, ahead = [], []
    for name, row in in_order(speed, "inference"):
        for who, times in sorted(row["ahead"].items(), key=lambda pair: pair[1]):
            if who not in PEERS:
                names.append(f"{name}: {who}")
                ahead.append(times)
    for name, row in in_order(speed, "training"):
        names.append(f"train {name}")
        ahead.append(row["ratio"])
    bars = axis.barh(range(len(names)), ahead, color=OURS)
    axis.bar_label(bars, fmt="%.1fx", fontsize=8, padding=2)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50, 100, 200]
    axis.set_xticks(ticks, [f"{tick}x" for tick in ticks], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlim(1, 1.5 * max(ahead, default=1))
    axis.set_xlabel("times as fast as setfit or sentence-transformers")
    for each in (left, axis):
        each.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def newest() -> dict[str, Any]:
    """The figures of the machine that was measured last."""
    found = [json.loads(path.read_text()) for path in measure.RESULTS.glob("*/setfit.json")
             if path.parent != accuracy.RESULTS]  # fmt: skip
    if not found:
        raise SystemExit("no figures: python -m bench.setfit")
    return max(found, key=lambda results: results["date"])


def main() -> None:
    speed = newest()
    right = json.loads((accuracy.RESULTS / "setfit.json").read_text())
    readme = ROOT / "README.md"
    text, count = MARKS.subn(
        lambda m: m[1] + section(speed, right) + m[2], readme.read_text(encoding="utf-8")
    )
    if count != 1:
        raise SystemExit(f"README.md: expected one pair of setfit marks, found {count}")
    plot(speed, right, DOCS / "plots" / "setfit.png")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
