"""The figures of budget_curve.py: which rate is best, the ratio of the gains and its intervals, tables and the picture.

    python tests/benchmarks/budget_figures.py table docs/data/budget_curve.jsonl
    python tests/benchmarks/budget_figures.py plot docs/data/budget_curve.jsonl docs/images/budget_curve.svg
    python tests/benchmarks/budget_figures.py positions docs/data/budget_curve.jsonl docs/images/positions.svg

The file has a training a line (see `Job`), with counts of reached and accepted positions, [prompts, 2, K].
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from against_peer import with_interval
from step_figures import COLOURS, GREY, NAMES, save, style

from peagle_hf.evaluation.acceptance import rates_by_position
from peagle_hf.evaluation.intervals import student_t

Job = dict[str, Any]
"""One training: `who` (ours or peer), `rate`, `steps`, `seed` and, where they differ, other arguments as `flags`."""

RATES = {"ours": (2e-3, 1e-3, 3e-3), "peer": (2e-3, 1e-3, 3e-3)}
"""Learning rates to choose from."""
SEARCH_STEPS = 2000


def conditional(counts_2K: torch.Tensor) -> list[float]:
    rates: list[float] = rates_by_position(*counts_2K.tolist())["conditional_acceptance"]
    return rates


def by_position(counts_2K: torch.Tensor) -> list[float]:
    rates: list[float] = rates_by_position(*counts_2K.tolist())["per_position_acceptance"]
    return rates


def length(result: Job, name: str = "tested") -> float:
    return 1 + sum(by_position(torch.tensor(result[name]).sum(0)))


def searched(results: list[Job], who: str) -> dict[float, float]:
    """The acceptance length on the selection prompts by rate, of those tried so far of RATES."""
    return {
        result["rate"]: length(result, "selected")
        for result in results
        if (result["who"], result["steps"], result["seed"]) == (who, SEARCH_STEPS, 0)
        and result["rate"] in RATES[who]
        and not result.get("flags")
    }


def best_rate(results: list[Job], who: str) -> float | None:
    """The rate that is best on the selection prompts, when all have been tried."""
    tried = searched(results, who)
    return max(tried, key=lambda rate: tried[rate]) if len(tried) == len(RATES[who]) else None


def load(path: str) -> tuple[list[Job], dict[tuple[str, int], list[Job]]]:
    """All results, and by implementation and steps those with the best rate, in the order of their seeds."""
    results = [json.loads(line) for line in Path(path).read_text().splitlines()]
    best = {who: best_rate(results, who) for who in NAMES}
    curve: dict[tuple[str, int], list[Job]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result["rate"] == best[result["who"]] and not result.get("flags"):
            curve.setdefault((result["who"], result["steps"]), []).append(result)
    return results, curve


def jackknife(figure: Callable[[torch.Tensor, torch.Tensor], float], ours: list[Job], peer: list[Job]) -> list[float]:
    """A figure of both implementations' counts [runs, 2, K], and its 95 % interval over the test prompts.

    One prompt at a time is left out of all runs; how far that moves the figure says how far other prompts would.
    """
    counts = [torch.stack([torch.tensor(run["tested"]) for run in runs]) for runs in (ours, peer)]
    whole = [of_runs.sum(1) for of_runs in counts]
    number = counts[0].shape[1]
    without = [
        figure(*(total - of_runs[:, prompt] for total, of_runs in zip(whole, counts, strict=True)))
        for prompt in range(number)
    ]
    mean = statistics.fmean(without)
    half = student_t(number - 1) * math.sqrt((number - 1) / number * sum((one - mean) ** 2 for one in without))
    value = figure(*whole)
    return [value, value - half, value + half]


def gain_ratio(ours_R2K: torch.Tensor, peer_R2K: torch.Tensor) -> float:
    """The ratio of the gains (acceptance length - 1), each the mean of the runs."""
    ours, peer = (statistics.fmean(sum(by_position(run)) for run in runs) for runs in (ours_R2K, peer_R2K))
    return ours / peer


def over_seeds(ours: list[Job], peer: list[Job]) -> dict[str, float | None]:
    """The ratio of the gains with its 95 % interval over seeds, as in `against_peer`."""
    gains = [[length(run) - 1 for run in runs] for runs in (ours, peer)]
    ratio, peer_gain = statistics.fmean(gains[0]) / statistics.fmean(gains[1]), statistics.fmean(gains[1])
    return with_interval(ratio, [(one - ratio * other) / peer_gain for one, other in zip(*gains, strict=True)])


def mean_rates(function: Callable[[torch.Tensor], list[float]], runs: list[Job]) -> str:
    rates = [function(torch.tensor(run["tested"]).sum(0)) for run in runs]
    return ", ".join(f"{100 * statistics.fmean(of):.1f}" for of in zip(*rates, strict=True))


def table(options: argparse.Namespace) -> None:
    results, curve = load(options.results)
    print("| rate | " + " | ".join(f"{rate:g}" for rate in sorted(RATES["ours"])) + " |\n|---|---|---|---|")
    for who, name in NAMES.items():
        tried = searched(results, who)
        print(f"| {name} | " + " | ".join(f"{tried[rate]:.3f}" for rate in sorted(tried)) + " |")
    pairs = {steps: (curve["ours", steps], curve["peer", steps]) for who, steps in sorted(curve) if who == "ours"}
    print("\n| steps | positions | of them learnt | peagle_hf | speculators | gain, ours to theirs | over seeds |")
    print("|---|---|---|---|---|---|---|")
    for steps, runs in pairs.items():
        ratio, low, high = jackknife(gain_ratio, *runs)
        seeds = over_seeds(*runs)
        cells = [f"{steps:,}"]
        cells += [
            ", ".join(f"{statistics.fmean(run[name] for run in of) / 1e6:.2f}" for of in runs)
            for name in ("positions", "learnt")
        ]
        cells += [", ".join(f"{length(run):.3f}" for run in of) for of in runs]
        cells += [f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{seeds['low']:.2f} to {seeds['high']:.2f}"]
        print(f"| {' | '.join(cells)} |")
    print("\n| steps | by position: peagle_hf | speculators | difference at 1, points | at 2 | at 3 |")
    print("|---|---|---|---|---|---|")
    for steps, runs in pairs.items():
        differences = []
        for position in range(3):

            def difference(ours: torch.Tensor, peer: torch.Tensor, position: int = position) -> float:
                rates = [statistics.fmean(by_position(run)[position] for run in of) for of in (ours, peer)]
                return 100 * (rates[0] - rates[1])

            differences.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*jackknife(difference, *runs)))
        rates = [mean_rates(by_position, of) for of in runs]
        print(f"| {steps:,} | {' | '.join(rates + differences)} |")
    print("\n| steps | conditional: peagle_hf | speculators |\n|---|---|---|")
    for steps, runs in pairs.items():
        print(f"| {steps:,} | {' | '.join(mean_rates(conditional, of) for of in runs)} |")
    print("\n| beside the curve | seed | selection | test | by position, test |\n|---|---|---|---|---|")
    for result in results:
        if result not in (run for runs in curve.values() for run in runs):
            flags = ", ".join(f"{name} {value}" for name, value in result.get("flags", {}).items())
            name = (
                f"{NAMES[result['who']]}, {result['steps']:,} steps, rate {result['rate']:g}{', ' * bool(flags)}{flags}"
            )
            lengths = f"{length(result, 'selected'):.3f} | {length(result):.3f}"
            print(f"| {name} | {result['seed']} | {lengths} | {mean_rates(by_position, [result])} |")


def plot(options: argparse.Namespace) -> None:
    """Draw the curve: acceptance length by positions trained on."""
    from matplotlib.figure import Figure

    _, curve = load(options.results)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for who, colour in COLOURS.items():
        mine = [runs for (of, _), runs in curve.items() if of == who]
        points = sorted((runs[0]["positions"], [length(run) for run in runs]) for runs in mine)
        positions = [place for place, _ in points]
        means = [statistics.fmean(lengths) for _, lengths in points]
        axes.plot(positions, means, color=colour, linewidth=2, label=NAMES[who])
        for (place, lengths), mean in zip(points, means, strict=True):
            axes.plot([place] * len(lengths), lengths, "o", color=colour, markersize=4)
            at, offset = (max(lengths), 6) if who == "ours" else (min(lengths), -14)
            where = {"color": colour, "ha": "center", "fontsize": 9, "textcoords": "offset points"}
            axes.annotate(f"{mean:.2f}", (place, at), (0, offset), **where)
        if who == "ours":
            labels = [f"{runs[0]['positions'] / 1e6:.1f} M\n{runs[0]['steps']:,} steps" for runs in mine]
            axes.set_xscale("log")
            axes.set_xticks([runs[0]["positions"] for runs in mine], labels)
    axes.minorticks_off()
    axes.margins(0.08, 0.12)
    axes.set_xlabel("positions trained on, one sequence of 2,048 a step")
    axes.set_ylabel("acceptance length on the test prompts")
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left")
    style(axes)
    save(figure, options.output)


def positions(options: argparse.Namespace) -> None:
    """Draw the acceptance by position on the test prompts, a panel for each number of steps."""
    from matplotlib.figure import Figure

    _, curve = load(options.results)
    steps = sorted({steps for _, steps in curve})
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for number, axes in zip(steps, panels.flat, strict=True):
        for who, colour in COLOURS.items():
            rates = [by_position(torch.tensor(run["tested"]).sum(0)) for run in curve[who, number]]
            means = [100 * statistics.fmean(of) for of in zip(*rates, strict=True)]
            axes.plot(range(1, len(means) + 1), means, marker="o", markersize=4, color=colour, label=NAMES[who])
        axes.set_title(f"{number:,} steps", fontsize=10)
        axes.set_xticks(range(1, len(means) + 1))
        style(axes)
    panels[0, 0].legend(frameon=False, labelcolor="linecolor", loc="upper right")
    figure.supylabel("drafts accepted up to this position, %", color=GREY, fontsize=10)
    figure.supxlabel("position in the draft", color=GREY, fontsize=10)
    save(figure, options.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    for function, names in ((table, ("results",)), (plot, ("results", "output")), (positions, ("results", "output"))):
        stage = stages.add_parser(function.__name__)
        for name in names:
            stage.add_argument(name)
        stage.set_defaults(stage=function)
    options = parser.parse_args()
    options.stage(options)


if __name__ == "__main__":
    main()
