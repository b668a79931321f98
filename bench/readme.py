"""``python -m bench.readme``: the last demo, kept, and its table and plot put in the README.

Copies demo_output/demo.json to bench/results/<machine>/demo.json and demo.png to docs/plots/, and
rewrites what stands between the demo marks of README.md.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from bench import measure
from bench.report import DOCS, heading, markdown_table

ROOT = DOCS.parent
MARKS = re.compile(r"(<!-- demo:[^>]*-->\n).*?(<!-- /demo -->)", re.DOTALL)


def rows(part: dict) -> list[list[str]]:
    best = max(part["tokens_per_second"].values())
    found = []
    for name, speed in part["tokens_per_second"].items():
        shown = f"**{speed:,.0f}**" if speed == best else f"{speed:,.0f}"
        difference = part["difference"][name]
        found.append(
            [
                part["title"],
                f"{name} ({part['batches'][name]})",
                shown,
                f"{part['fastenc_over'][name]:.2f}x",
                "reference" if name == part["reference"] else f"{difference:.1e}",
            ]
        )
    return found


def section(results: dict) -> str:
    """The README's Markdown for one demo run."""
    head = ["", "how", "tokens/s", "fastenc is ahead by", "largest difference"]
    table = markdown_table(head, [*rows(results["minilm"]), *rows(results["modernbert"])])
    return f"\n{table}\n\n![the demo's figure](docs/plots/demo.png)\n\n{heading(results)}\n\n"


def main(source: Path = ROOT / "demo_output") -> None:
    results = json.loads((source / "demo.json").read_text())
    readme = ROOT / "README.md"
    text, count = MARKS.subn(
        lambda m: m[1] + section(results) + m[2], readme.read_text(encoding="utf-8")
    )
    if count != 1:
        raise SystemExit(f"README.md: expected one pair of demo marks, found {count}")
    measure.write_json(measure.RESULTS / results["machine"]["name"] / "demo.json", results)
    (DOCS / "plots").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "demo.png", DOCS / "plots" / "demo.png")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
