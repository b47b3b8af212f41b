"""The table and the pictures of docs/performance.md, from the figures of training_step.py in one file.

    python tests/benchmarks/step_figures.py table docs/data/training_step.csv docs/performance.md
    python tests/benchmarks/step_figures.py plot docs/data/training_step.csv docs/images
    python tests/benchmarks/step_figures.py parts docs/data/step_parts.jsonl docs/images/step_parts.svg

The first file has a line for each configuration: positions of a packed sequence, K (`depths`), milliseconds and GiB.
The second has a line for each bar of the picture, from top to bottom: its `name`, its `parts` in milliseconds ("whole
step" where no profile divides it; `training_step.py --profile` does), and `source`, which the picture doesn't show.
"""

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

PLACE = re.compile(r"(?<=<!-- table: data/training_step\.csv -->\n\n).*?(?=\n<!-- end of table -->)", re.S)
"""Where the table stands in the page."""
COLUMNS = (
    *("positions", "K", "draft vocabulary", "speculators ms", "ours ms", "ratio"),
    *("speculators GiB", "ours GiB", "ours tokens/s", "ours MFU"),
)
COLOURS = {"ours": "#d9730d", "peer": "#3d85c6"}
NAMES = {"ours": "peagle_hf", "peer": "speculators 0.9.0"}
GREY = "#808080"
"""Colours that can be read on white and on black."""
PARTS = {
    "whole step": "#3d85c6",
    "matrix products": "#d9730d",
    "optimizer and clipping": "#a967aa",
    "attention": "#6a9f58",
    "loss": "#c9a227",
    "casts": "#5aa7a7",
    "norms, activations, copies": "#a08070",
    "between kernels": "#b0b0b0",
}
"""The parts of a step and their colours."""

Row = dict[str, str]


def load(path: str | Path) -> list[Row]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[Row]) -> str:
    """The configurations as a Markdown table; the ratio is that of the times."""
    lines = [f"| {' | '.join(COLUMNS)} |\n", f"|{'---|' * len(COLUMNS)}\n"]
    for row in rows:
        peer, ours = row["peer_ms"], float(row["ours_ms"])
        is_measured = re.fullmatch(r"[\d.]+", peer)
        cells = [
            f"{int(row['positions']):,}" + (f", {row['setting']}" if row["setting"] else ""),
            row["depths"],
            f"{int(row['draft_vocabulary']):,}",
            peer,
            f"{ours:,.0f}" if ours >= 1000 else row["ours_ms"],
            f"{ours / float(peer):.2f}" if is_measured else "",
            row["peer_gib"],
            row["ours_gib"],
            f"{int(row['ours_tokens_per_second']):,}",
            row["ours_mfu"],
        ]
        lines.append(f"| {' | '.join(cells)} |\n".replace("|  |", "| |").replace("|  |", "| |"))
    return "".join(lines)


def write_table(options: argparse.Namespace) -> None:
    page = Path(options.output)
    text, count = PLACE.subn(lambda _: table(load(options.figures)), page.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{page} has no place for the table.")
    page.write_text(text, encoding="utf-8")


def style(axes: Any) -> None:
    """Frame, grid and labels in grey, for light and dark pages."""
    axes.tick_params(colors=GREY)
    axes.grid(color=GREY, alpha=0.25)
    for part in (axes.xaxis.label, axes.yaxis.label, axes.title):
        part.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def save(figure: Any, path: str | Path) -> None:
    """Write an SVG that is the same for the same data, without a background."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "peagle_hf", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})


def plot(options: argparse.Namespace) -> None:
    """Draw step_time.svg and step_memory.svg: K 8, whole vocabulary, by the length of the packed sequence."""
    rows = [
        row
        for row in load(options.figures)
        if (row["depths"], row["draft_vocabulary"]) == ("8", "151936") and row["setting"] in ("", "checkpointed")
    ]
    for name, unit, label in (("time", "ms", "milliseconds per step"), ("memory", "gib", "GiB of GPU memory")):
        draw(rows, unit, label, Path(options.output) / f"step_{name}.svg")


def draw(rows: list[Row], unit: str, label: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = [("peer", "", "-", ""), ("ours", "", "-", ""), ("ours", "checkpointed", "--", ", activation checkpointing")]
    for who, setting, dashes, suffix in lines:
        points = [
            (int(row["positions"]), float(row[f"{who}_{unit}"]))
            for row in rows
            if row["setting"] == setting and re.fullmatch(r"[\d.]+", row[f"{who}_{unit}"])
        ]
        lengths, values = zip(*points, strict=True)
        axes.plot(lengths, values, dashes, marker="o", color=COLOURS[who], label=NAMES[who] + suffix)
    failed = min(int(row["positions"]) for row in rows if row["peer_ms"] == "out of memory")
    axes.axvline(failed, color=COLOURS["peer"], linestyle=":", linewidth=1)
    where = {"x": failed * 1.06, "y": 0.03, "transform": axes.get_xaxis_transform(), "color": COLOURS["peer"]}
    axes.text(s=f"{NAMES['peer']}, without checkpointing:\nout of memory", fontsize=9, **where)
    ticks = sorted({int(row["positions"]) for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_yticks(values := [30, 100, 300] if unit == "gib" else [100, 1_000, 10_000], [f"{v:,}" for v in values])
    axes.minorticks_off()
    axes.set(xlabel="positions in a packed sequence", ylabel=label)
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left")
    style(axes)
    save(figure, path)


def parts(options: argparse.Namespace) -> None:
    """Draw how a step's time divides, one bar under another."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars = [json.loads(line) for line in Path(options.figures).read_text(encoding="utf-8").splitlines()]
    if unknown := {part for bar in bars for part in bar["parts"]} - PARTS.keys():
        raise SystemExit(f"{options.figures} has parts that are not in PARTS: {', '.join(sorted(unknown))}")
    figure = Figure(figsize=(7.5, 1.3 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, bar in enumerate(bars):
        start = 0.0
        for part, milliseconds in bar["parts"].items():
            axes.barh(place, milliseconds, left=start, color=PARTS[part], height=0.6)
            if milliseconds > 15:
                axes.text(start + milliseconds / 2, place, f"{milliseconds:.0f}", ha="center", va="center", fontsize=8)
            start += milliseconds
        axes.annotate(f"{start:.0f} ms", (start, place), (4, 0), textcoords="offset points", va="center", color=GREY)
    shown = [part for part in PARTS if any(part in bar["parts"] for bar in bars)]
    handles = [Patch(color=PARTS[part], label=part) for part in shown]
    figure.legend(
        handles=handles, frameon=False, labelcolor="linecolor", fontsize=8, ncols=4, loc="outside lower center"
    )
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds")
    style(axes)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    save(figure, options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    for name, function in (("table", write_table), ("plot", plot), ("parts", parts)):
        stage = stages.add_parser(name)
        stage.add_argument("figures")
        stage.add_argument("output")
        stage.set_defaults(stage=function)
    options = parser.parse_args()
    options.stage(options)


if __name__ == "__main__":
    main()
