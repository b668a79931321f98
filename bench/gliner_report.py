"""``python -m bench.gliner_report``: GLiNER's figures put into the README between their marks.

They are those of the newest bench/results/<machine>/gliner-<date>.json: ``python -m bench.gliner``;
and of bench/results/accuracy/gliner.json: ``python -m bench.accuracy_gliner``.
"""

from __future__ import annotations

import json
import re
from typing import Any

from bench import accuracy, measure
from bench.report import DOCS, heading, markdown_table

MARKS = re.compile(r"(<!-- gliner:[^>]*-->\n).*?(<!-- /gliner -->)", re.DOTALL)
ACCURACY = re.compile(r"(<!-- gliner-accuracy:[^>]*-->\n).*?(<!-- /gliner-accuracy -->)", re.DOTALL)
SETS = {
    "templates": "unseen sentences, types under a name of training",
    "renamed": "unseen sentences, types under an unseen name",
    "unseen": "unseen sentences, types and values",
}
PEERS = {
    "gliner int8": "gliner int8", "gliner ONNX": "gliner ONNX",
    "folded, plain PyTorch": "folded head in plain PyTorch",
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row: gliner and fastenc, and every other peer beside fastenc."""
    lines = []
    for row in rows:
        spent, ahead = row["seconds"], row["ahead"]
        others = [
            f"{title} {_milliseconds(spent[name])} ({spent[name] / spent['fastenc']:.2f}x)"
            for name, title in PEERS.items()
            if name in spent
        ]
        others += [f"{name} does not run" for name in row.get("failures", {})]
        if floor := row.get("floor_seconds"):
            others.append(f"floor {_milliseconds(floor)} ({floor / spent['fastenc']:.2f})")
        if memory := row.get("kept_for_backward_mib"):
            own, theirs = memory["fastenc"], memory["gliner"]
            others.append(
                f"kept for the backward {own:.1f} of {theirs:.1f} MiB ({own / theirs:.2f})"
            )
        accelerated = ahead.get("accelerate(gliner)")
        lines.append(
            [
                row["name"], _milliseconds(spent["gliner"]), _milliseconds(spent["fastenc"]),
                f"{ahead['fastenc']:.2f}x", f"{accelerated:.2f}x" if accelerated else "–",
                "; ".join(others) or "–", f"{row['commit']}, {row['date']}",
            ]
        )  # fmt: skip
    head = ["", "gliner", "fastenc", "ahead by", "accelerate(gliner): ahead by", "beside fastenc",
            "commit, date"]  # fmt: skip
    return markdown_table(head, lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def accuracy_section(results: dict[str, Any]) -> str:
    """F1 of both trainers on each set, and what it took."""
    f1, runs = results["f1"], results["runs"]
    lines = [
        [SETS[name], f"{f1['fastenc'][name]:.3f}", f"{f1['gliner'][name]:.3f}"] for name in SETS
    ]
    spent = [sum(run[who]["cpu_seconds"] for run in runs) / len(runs) for who in f1]
    lines.append(["training, seconds of one core", *(f"{x:,.0f}" for x in spent)])
    titles = {"fastenc": "`fastenc.train`", "gliner": "gliner's Trainer"}
    head = ["micro F1, exact boundaries and type", *(titles[who] for who in f1)]
    seeds = "one seed" if len(runs) == 1 else f"mean of {len(runs)} seeds"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{markdown_table(head, lines)}\n\n{results['steps']:,} steps of {results['batch']} texts, "
        f"{seeds}; {results['machine']}; {results['date']}; {versions}."
    )


def main() -> None:
    found = [json.loads(path.read_text()) for path in measure.RESULTS.glob("*/gliner-*.json")]
    if not found:
        raise SystemExit("no figures: python -m bench.gliner")
    results = max(found, key=lambda each: each["date"])
    readme = DOCS.parent / "README.md"
    text, count = MARKS.subn(
        lambda m: f"{m[1]}\n{table(results['gliner'])}\n\n{heading(results)}\n\n{m[2]}",
        readme.read_text(encoding="utf-8"),
    )
    if count != 1:
        raise SystemExit(f"README.md: expected one pair of gliner marks, found {count}")
    judged = json.loads((accuracy.RESULTS / "gliner.json").read_text(encoding="utf-8"))
    text, count = ACCURACY.subn(lambda m: f"{m[1]}\n{accuracy_section(judged)}\n\n{m[2]}", text)
    if count != 1:
        raise SystemExit(f"README.md: expected one pair of gliner-accuracy marks, found {count}")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
