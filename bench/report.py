"""docs/benchmarks.md and its plots, from the newest JSON of each machine in bench/results/."""

from __future__ import annotations

import json
from pathlib import Path

from bench import measure

DOCS = Path(__file__).parent.parent / "docs"
PEER_COLOURS = {
    "fastenc": "#0b6e4f", "fastenc prepacked": "#6bbf9c", "transformers sdpa": "#c44536",
    "transformers eager": "#e09f8f", "transformers torch.compile": "#7a5195",
    "ONNX Runtime": "#ef8e19", "OpenVINO": "#4a7fb5",
}  # fmt: skip


def newest() -> dict[str, dict]:
    """{machine: results} of the newest full run on each machine."""
    found = {}
    for folder in sorted(measure.RESULTS.glob("*")):
        for file in sorted(folder.glob("*.json")):
            results = json.loads(file.read_text())
            if results.get("modernbert", {}).get("rows"):
                found[folder.name] = results
    return found


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def model_table(results: dict) -> str:
    names = [n for n in PEER_COLOURS if any(n in r["seconds"] for r in results["rows"])]
    rows = []
    for row in results["rows"]:
        speeds = row["tokens_per_second"]
        best = max(speeds.values())
        cells = []
        for name in names:
            if name not in speeds:
                cells.append("–")
            else:
                text = f"{speeds[name]:.0f}"
                cells.append(f"**{text}**" if speeds[name] == best else text)
        rows.append([row["name"], *cells])
    return markdown_table(["tokens/s", *names], rows)


def ratio_table(results: dict) -> str:
    rows = []
    for row in results["rows"]:
        parts = row["breakdown"]
        total = sum(parts.values())
        shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
        rows.append(
            [
                row["name"], f"{row['fraction_of_floor']:.2f}",
                f"{row['ahead_of_best_peer']:.2f}x ({row['best_peer']})",
                f"{row['ahead_of_sdpa']:.2f}x", shares, row.get("commit", "–"),
            ]
        )  # fmt: skip
    head = ["row", "floor / measured", "best peer / fastenc", "sdpa / fastenc", "where time goes",
            "commit"]  # fmt: skip
    return markdown_table(head, rows)


def failure_list(results: dict) -> str:
    lines = [f"- {name}: {why}" for name, why in results["not_built"].items()]
    for row in results["rows"]:
        lines += [f"- {name} at {row['name']}: {why}" for name, why in row["failures"].items()]
        lines += [f"- {name} at {row['name']}: one call, slow" for name in row.get("once", ())]
    return "\n".join(lines) or "- none"


def op_table(figures: list[dict]) -> str:
    by_case: dict[tuple, dict[str, dict]] = {}
    for figure in figures:
        case = figure["case"].split("[", 1)[1].split("-", 1)[1].rstrip("]")
        by_case.setdefault((figure["op"], case), {})[figure["implementation"]] = figure
    rows = []
    for (op, case), found in by_case.items():
        ours, plain = found.get("fastenc"), found.get("pytorch")
        if ours is None:
            continue
        ratio = f"{plain['seconds'] / ours['seconds']:.1f}x" if plain else "–"
        rows.append(
            [op, case, f"{ours['seconds'] * 1e3:.2f}", f"{ours['fraction_of_floor']:.2f}", ratio]
        )
    return markdown_table(["op", "case", "ms", "floor / measured", "plain PyTorch / fastenc"], rows)


def heading(results: dict) -> str:
    m = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return (
        f"{m['cpu']}, {m['threads']} threads, torch on {m['torch_isa']}, fastenc on "
        f"{m['fastenc_isa']}; {results['date']}, commit {results['commit']}; {versions}."
    )


def tables(results: dict) -> str:
    """The Markdown of one machine."""
    model = results["modernbert"]
    training, memory = model.get("training"), model.get("peak_memory")
    parts = [
        heading(results),
        f"### ModernBERT-base, fp32, {model['layers']} layers, random weights",
        model_table(model),
        ratio_table(model),
    ]
    if training:
        parts.append(
            f"Training step (forward + backward, ragged): {training['ahead_of_sdpa']:.2f}x sdpa "
            f"({training['seconds']['fastenc']:.1f} s against "
            f"{training['seconds']['transformers sdpa']:.1f} s)."
        )
    if memory:
        ours, sdpa = (memory["mib"][name] for name in ("fastenc", "transformers sdpa"))
        parts.append(
            f"Peak memory above the loaded model, {memory['row']}: fastenc {ours:.0f} MiB, "
            f"sdpa {sdpa:.0f} MiB."
        )
    parts += ["Peers that failed, were left out, or were called once:", failure_list(model)]
    if "ops" in results:
        parts += ["### Ops", op_table(results["ops"])]
    return "\n\n".join(parts)


def plot(results: dict, path: Path) -> None:
    """Bars of tokens/s by row and peer, relative to transformers sdpa."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["modernbert"]["rows"]
    names = [n for n in PEER_COLOURS if any(n in r["seconds"] for r in rows)]
    figure, axis = plt.subplots(figsize=(11, 4.6), dpi=120)
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        heights = [
            r["tokens_per_second"].get(name, 0) / r["tokens_per_second"]["transformers sdpa"]
            for r in rows
        ]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(rows))]
        bars = axis.bar(places, heights, width, label=name, color=PEER_COLOURS[name])
        if name == "fastenc":
            axis.bar_label(bars, fmt="%.2fx", fontsize=8, padding=2)
    axis.axhline(1, color="#888", linewidth=0.8, zorder=0)
    axis.set_xticks(range(len(rows)), [r["name"] for r in rows])
    axis.set_ylabel("tokens/s, transformers sdpa = 1")
    m = results["machine"]
    axis.set_title(
        f"ModernBERT-base, fp32: {m['cpu']}, {m['threads']} threads, {results['date']}", fontsize=10
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def write_docs() -> None:
    """Regenerate docs/benchmarks.md and docs/plots/*.png."""
    sections = [
        "# Benchmarks",
        "Made by `make bench` from the JSON files in `bench/results/`; do not edit by hand. Every "
        "row compares things run interleaved in one process; figures are medians. The floor is the "
        "linear layers alone plus the attention's FLOPs at the rate of a linear layer, measured in "
        "the same run.",
    ]
    for name, results in newest().items():
        plot(results, DOCS / "plots" / f"{name}.png")
        sections += [f"## {name}", f"![{name}](plots/{name}.png)", tables(results)]
    (DOCS / "benchmarks.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    write_docs()
