"""The report of `peagle-hf plan` for readers: text for a terminal, and a picture."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ..console import number_of
from ..pages.pictures import COLOURS, GREY, save_png
from ..pages.tables import Table
from .runs import runners_row

GREAT_ERROR = 0.05
"""Deviation of the model of speed, as a share, above which the text says that figures are rough."""


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    tables = [_speed_table(report), _serve_table(report), Table("How it was measured", ["", ""], _measured(report))]
    return "\n\n".join([*(table.text() for table in tables), "\n".join(_sentences(report))])


def draw(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw, as a PNG, the length from which each drafter pays and its speed-up at length 2, both by load."""
    drawings = [partial(_draw_break_even, report), partial(_draw_speed_up, report)]
    save_png(path, drawings, (6.2, 4.4), "plan.json beside it")


def _size(entry: dict[str, Any]) -> str:
    return f"{number_of(entry['num_layers'], 'layer')}, {entry['draft_vocab_size']:,} tokens"


def _speed_table(report: dict[str, Any]) -> Table:
    lengths = list(report["drafters"][0]["by_concurrency"][0]["speed_up"])
    rows = [
        [
            _size(drafter),
            str(drafter["num_speculative_tokens"]),
            str(run["concurrency"]),
            f"{run['tokens_per_second_without']:,.1f}",
            _pays_from(run, drafter["num_speculative_tokens"]),
            *("" if value is None else f"{value:.2f}" for value in run["speed_up"].values()),
            f"{run['model_error']:.1%}",
        ]
        for drafter in report["drafters"]
        for run in drafter["by_concurrency"]
    ]
    return Table(
        "Acceptance length from which a drafter pays, and speed-up at several lengths",
        ["Drafter", "K", "Chats at a time", "Without, tokens/s", "Pays from", *lengths, "Model error"],
        rows,
    )


def _pays_from(run: dict[str, Any], tokens: int) -> str:
    length = run["break_even_length"]
    if length is None:
        return "never"
    spread = run["break_even_range"]
    shown = "1.00 (always)" if length <= 1 else f"{length:.2f}"
    shown += f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else ""
    return f"never: {shown} of at most {tokens + 1}" if length > tokens + 1 else shown


def _serve_table(report: dict[str, Any]) -> Table:
    lengths = [item["length_with_largest_k"] for item in report["serve"][0]["by_length"]]
    rows = [
        [
            _size(entry),
            str(entry["concurrency"]),
            *(
                "no drafter"
                if item["num_speculative_tokens"] is None
                else f"K {item['num_speculative_tokens']}: {item['speed_up']:.2f}"
                for item in entry["by_length"]
            ),
        ]
        for entry in report["serve"]
    ]
    largest = report["drafters"][-1]["num_speculative_tokens"]
    return Table(
        f"Which K to serve, and the speed-up with it, by the acceptance length that the drafter has with K {largest}",
        ["Drafter", "Chats at a time", *(f"{length:g}" for length in lengths)],
        rows,
    )


def _measured(report: dict[str, Any]) -> list[list[str]]:
    counts = report["num_prompts"].items()
    return [
        ["Command", report["command"]],
        ["Verifier", f"{report['verifier']}, {report['dtype']} on {report['device']}, weights: {report['weights']}"],
        ["Drafters", "random weights; vLLM accepts at set rates (synthetic acceptance)"],
        [
            "Prompts",
            f"{number_of(report['prompt_tokens'], 'random token')}, answers of {report['max_tokens']}; "
            + ", ".join(
                f"{number_of(count, 'prompt')} with {number_of(int(concurrency), 'chat')} at a time"
                for concurrency, count in counts
            ),
        ],
        *runners_row(report),
        ["Seed, rounds", f"{report['seed']}, {report['rounds']}"],
        ["Versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())],
    ]


def _sentences(report: dict[str, Any]) -> list[str]:
    runs = [(drafter, run) for drafter in report["drafters"] for run in drafter["by_concurrency"]]
    reachable = [
        (length, drafter, run) for drafter, run in runs if (length := _reachable_length(drafter, run)) is not None
    ]
    sentences = []
    # Acceptance lengths can be compared for the same K only.
    for tokens in sorted({drafter["num_speculative_tokens"] for drafter, _ in runs}):
        of_k = [one for one in reachable if one[1]["num_speculative_tokens"] == tokens and one[0] > 1]
        if of_k:
            length, drafter, run = min(of_k, key=lambda one: one[0])
            sentences.append(
                f"With K {tokens} the drafter with {_size(drafter)} pays first: from acceptance length {length:.2f} "
                f"on, with {number_of(run['concurrency'], 'chat')} at a time."
            )
    if sentences:
        sentences.append("peagle-hf evaluate says which acceptance length a trained drafter has.")
    if not reachable:
        sentences.append("No drafter of these pays at any of these loads, whatever is accepted.")
    if any(length <= 1 for length, *_ in reachable):
        sentences.append(
            'Where the table says "always", vLLM was no slower with a drafter of which nothing is accepted, so the '
            "difference is too small for this measurement: run more --num-prompts and --rounds."
        )
    error = max(run["model_error"] for _, run in runs)
    if error > GREAT_ERROR:
        sentences.append(
            f"Measured times deviate from the model of speed by up to {error:.0%}, so take the figures as rough. Run "
            "more --num-prompts and --rounds, with nothing else on this machine."
        )
    return sentences


def _reachable_length(drafter: dict[str, Any], run: dict[str, Any]) -> float | None:
    """The acceptance length from which a drafter pays; None if it never has so high a one."""
    length: float | None = run["break_even_length"]
    return length if length is not None and length <= drafter["num_speculative_tokens"] + 1 else None


def _draw_break_even(report: dict[str, Any], axes: Any) -> None:
    _draw_by_load(axes, report, _reachable_length)
    axes.set(ylabel="Acceptance length", title="A drafter pays from this acceptance length (no point: never)")


def _draw_speed_up(report: dict[str, Any], axes: Any) -> None:
    _draw_by_load(axes, report, lambda drafter, run: run["speed_up"]["2"])
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(ylabel="Times as fast as without a drafter", title="Speed-up at acceptance length 2")


def _draw_by_load(
    axes: Any, report: dict[str, Any], value: Callable[[dict[str, Any], dict[str, Any]], float | None]
) -> None:
    """One line for each drafter and K: the colour says which drafter, the dashes and points which K."""
    sizes = list(dict.fromkeys(map(_size, report["drafters"])))
    tokens = sorted({drafter["num_speculative_tokens"] for drafter in report["drafters"]})
    for drafter in report["drafters"]:
        values = [value(drafter, run) for run in drafter["by_concurrency"]]
        of_k = tokens.index(drafter["num_speculative_tokens"])
        axes.plot(
            [str(run["concurrency"]) for run in drafter["by_concurrency"]],
            [float("nan") if one is None else one for one in values],
            color=COLOURS[sizes.index(_size(drafter)) % len(COLOURS)],
            linestyle=("-", "--", ":", "-.")[of_k % 4],
            marker=".x^s"[of_k // 4 % 4],
            label=f"{_size(drafter)}, K {drafter['num_speculative_tokens']}",
        )
    axes.set_xlabel("Chats at a time")
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
