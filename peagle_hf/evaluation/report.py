"""The report of `peagle-hf evaluate` for readers: text for a terminal, pictures, and one self-contained HTML file."""

import os
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..console import estimate, number_of
from ..data.answer_markers import TEXT, drafted_segments
from ..data.contexts import drafted_contexts
from ..pages.page import render
from ..pages.pictures import bars, picture, save_png
from ..pages.tables import Table
from ..serving.tokens_by_load import RECOMMENDED, describe, describe_not_reached
from .intervals import MIN_PROMPTS
from .runs import BY_DRAFT, coarse_counts, runners_row

TEMPERATURE_HEAD = [
    *("Temperature", "", "Acceptance length", "Acceptance rate", "Accepted by position", "Of those that reach it"),
    *("Tokens/s", "Speed-up"),
]
LONGEST_LABEL = 40
"""Longest name of a category in the text for a terminal, in characters; in a picture half of that."""


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    return "\n\n".join([*(table.text() for table in _tables(report)), "\n".join(_sentences(report))])


def html(report: dict[str, Any]) -> str:
    """The report as one HTML file with its pictures; a picture that can't be drawn is replaced by the reason."""
    return render(
        Path(__file__).with_name("report.html"),
        title=f"P-EAGLE drafter: acceptance length {report['acceptance_length']:.2f}",
        summaries=[(label, _summary(entry, report)) for label, entry in _entries(report)],
        sentences=_sentences(report),
        pictures=[picture(title, partial(drawing, report)) for title, drawing in _PICTURES],
        tables=_tables(report),
    )


def draw(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw all pictures of the report side by side into a PNG; error bars are the intervals."""
    drawings = [partial(drawing, report) for _, drawing in _PICTURES]
    save_png(path, drawings, (6.2, 3.6), "evaluation.json and evaluation.html beside it")


def _summary(entry: dict[str, Any], report: dict[str, Any]) -> dict[str, str]:
    """What a reader asks first about a drafter, by name; `report` has what all entries share."""
    is_same = entry["text_identical"]
    return {
        "Drafter": f"{entry['drafter']}, K={entry['num_speculative_tokens']}",
        "Verifier": report["verifier"],
        "Acceptance length": _figure(entry, "acceptance_length", ".3f"),
        "Speed-up": _speed_up(entry) or "not measured",
        **({"Pays from acceptance length": pays_from} if (pays_from := _pays_from(entry)) else {}),
        "Text identical": "not compared" if is_same is None else "yes" if is_same else f"NO, in {_num_other(entry)}",
    }


def _pays_from(entry: dict[str, Any]) -> str:
    """The break-even length, or the side of it that is known; empty without a baseline.

    Without the time of the prompts' own passes, which isn't known then, a drafter that is slower than none pays only
    from a greater length than acceptance length / speed-up, and one that is faster already from a smaller one.
    """
    length = entry["break_even_length"]
    if entry["speed_up"] is None or (length is not None and length > 1):
        return _figure(entry, "break_even_length", ".2f")
    bound = entry["acceptance_length"] / entry["speed_up"]
    if length is not None or bound <= 1 < entry["speed_up"]:
        return "1.00 (always)"
    return f"{'more' if entry['speed_up'] < 1 else 'less'} than {bound:.2f}"


def _num_other(entry: dict[str, Any]) -> str:
    return f"{entry['num_prompts'] - entry['num_identical']} of {number_of(entry['num_prompts'], 'prompt')}"


def _entries(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The main entry of the report and all others, each with a short name."""
    entries = [report, *report["others"]]
    drafters = list(dict.fromkeys(entry["drafter"] for entry in entries))
    if len(entries) == 1:
        return [("drafter", report)]
    return [
        (f"{_letter(drafters.index(entry['drafter']), len(drafters))}K={entry['num_speculative_tokens']}", entry)
        for entry in entries
    ]


def _labels(report: dict[str, Any]) -> dict[tuple[Any, ...], str]:
    """The short names by drafter and number of tokens."""
    return {(entry["drafter"], entry["num_speculative_tokens"]): label for label, entry in _entries(report)}


def _letter(number: int, count: int) -> str:
    return f"{chr(ord('A') + number)}, " if count > 1 else ""


def _figure(entry: dict[str, Any], name: str, form: str) -> str:
    return "" if entry[name] is None else estimate(entry[name], entry["intervals"].get(name), form)


def _rates(rates: list[float | None]) -> str:
    """Shares by position; one that isn't known is a dash."""
    return "  ".join("-" if rate is None else f"{rate:.1%}" for rate in rates)


def _speed_up(entry: dict[str, Any]) -> str:
    return _figure(entry, "speed_up", ".2f") + (", no difference" if entry["is_speed_up_or_down"] is False else "")


def _tables(report: dict[str, Any]) -> list[Table]:
    entries = _entries(report)
    acceptance = Table(
        "Acceptance",
        ["", "Acceptance length", "Acceptance rate", "Accepted by position", "Of those that reach it", "Drafter"],
        [
            [
                label,
                _figure(entry, "acceptance_length", ".3f"),
                _figure(entry, "acceptance_rate", ".1%"),
                _rates(entry["per_position_acceptance"]),
                _rates(entry["conditional_acceptance"]),
                f"{entry['drafter']}, K={entry['num_speculative_tokens']}",
            ]
            for label, entry in entries
        ],
    )
    by_category = [
        Table(
            "By category" if len(entries) == 1 else f"By category: {label}",
            ["Category", "Prompts", "Acceptance length", "Acceptance rate", "Tokens/s", "Speed-up"],
            [
                [
                    shown(category),
                    str(row["num_prompts"]),
                    _figure(row, "acceptance_length", ".3f"),
                    _figure(row, "acceptance_rate", ".1%"),
                    _figure(row, "tokens_per_second", ".1f"),
                    _speed_up(row),
                ]
                for category, row in entry["by_category"].items()
            ],
        )
        for label, entry in entries
    ]
    head = ["", "From", "Figure", "Difference", ""]
    return [
        acceptance,
        *(
            [Table("By temperature", TEMPERATURE_HEAD, _temperature_rows(entries))]
            if "by_temperature" in report
            else []
        ),
        *by_category,
        *_part_tables("By segment of the answers", "Segment", entries, drafted_segments),
        *_part_tables("By position in the context", "Tokens before the draft", entries, drafted_contexts),
        Table(
            "Speed; times are mean, median and 99th percentile",
            [
                *("Chats at a time", "", "Tokens/s", "Speed-up", "Pays from"),
                *("Request, s", "To first token, s", "Between tokens, ms"),
            ],
            _speed_rows(entries),
        ),
        *([Table("Differences", head, _difference_rows(report))] if report["others"] else []),
        Table("How it was measured", ["", ""], _measured_rows(report)),
    ]


def _temperature_rows(entries: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """The rows of the table of figures by temperature."""
    return [
        [
            f"{row['temperature']:g}",
            label,
            _figure(row, "acceptance_length", ".3f"),
            _figure(row, "acceptance_rate", ".1%"),
            _rates(row["per_position_acceptance"]),
            _rates(row["conditional_acceptance"]),
            _figure(row, "tokens_per_second", ".1f"),
            _speed_up(row),
        ]
        for label, entry in entries
        for row in entry["by_temperature"]
    ]


def _part_tables(
    title: str,
    part: str,
    entries: list[tuple[str, dict[str, Any]]],
    shown_parts: Callable[[dict[str, Any]], dict[str, dict[str, Any]]],
) -> list[Table]:
    """A table of the acceptance by part of the answers for each entry that has parts to show."""
    return [
        Table(
            title if len(entries) == 1 else f"{title}: {label}",
            [part, "Prompts", "Drafts", "Acceptance length", "Acceptance rate"],
            _part_rows(parts),
        )
        for label, entry in entries
        if (parts := shown_parts(entry))
    ]


def _part_rows(parts: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of a table of acceptance by part of the answers."""
    return [
        [
            name,
            str(figures["num_prompts"]),
            str(figures["num_drafts"]),
            _figure(figures, "acceptance_length", ".3f"),
            _figure(figures, "acceptance_rate", ".1%"),
        ]
        for name, figures in parts.items()
    ]


def _speed_rows(entries: list[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Times as mean, median and 99th percentile."""

    def row(label: str, run: dict[str, Any], suffix: str) -> list[str]:
        times = run[f"latency_seconds{suffix}"]
        return [
            _load(run),
            label,
            _figure(run, f"tokens_per_second{suffix}", ".1f"),
            "" if suffix else _speed_up(run),
            "" if suffix else _pays_from(run),
            _three(times["request"], 1),
            _three(times["first_token"], 1),
            _three(times["output_token"], 1000),
        ]

    rows = []
    for number, first in enumerate(entries[0][1]["by_concurrency"]):
        if first["tokens_per_second_without"] is not None:
            rows.append(row("no drafter", first, "_without"))
        rows += [row(label, entry["by_concurrency"][number], "") for label, entry in entries]
    return rows


def _three(times: dict[str, float] | None, scale: float) -> str:
    return "" if times is None else "  ".join(f"{scale * times[name]:.3f}" for name in ("mean", "median", "p99"))


def _difference_rows(report: dict[str, Any]) -> list[list[str]]:
    labels, rows = _labels(report), []
    loads = {run["concurrency"]: _load(run) for run in report["by_concurrency"]}
    for label, entry in _entries(report)[1:]:
        difference = entry["difference"]
        other = labels[tuple(difference["from"].values())]
        lengths = [("acceptance length", difference["acceptance_length"])]
        by_category = difference["by_category"].items()
        lengths += [(f"acceptance length, {shown(category)}", row) for category, row in by_category]
        rows += [
            [label, other, figure, estimate(row["value"], row["interval"], "+.3f"), _verdict(row, 0)]
            for figure, row in lengths
        ]
        for run in difference["by_concurrency"]:
            ratio = run["tokens_per_second_ratio"]
            figure = f"tokens/s, {loads[run['concurrency']]} at a time, ratio"
            rows.append([label, other, figure, estimate(ratio["value"], ratio["interval"], ".3f"), _verdict(ratio, 1)])
    return rows


def _verdict(row: dict[str, Any], same: float) -> str:
    if row["is_difference"] is None:
        return "not known: too few prompts or rounds"
    if not row["is_difference"]:
        return "no difference"
    return "higher" if row["value"] > same else "lower"


def _measured_rows(report: dict[str, Any]) -> list[list[str]]:
    sampling = "greedy" if report["temperature"] == 0 else f"temperature {report['temperature']:g}"
    temperatures = [report["temperature"], *(row["temperature"] for row in report.get("by_temperature", []))]
    seed, rounds, method = report["seed"], report["rounds"], report["interval_method"]
    links = {entry["drafter"]: entry["drafter_link"] for entry in [report, *report["others"]] if entry["drafter_link"]}
    dropped = report["dropped_prompts"]
    return [
        ["Command", report["command"]],
        *(["Drafter", f"{folder}, the folder that {link} linked to at the start"] for folder, link in links.items()),
        ["Verifier", f"{report['verifier']}, {report['dtype']} on {report['device']}"],
        [
            "Prompts",
            f"{report['num_prompts']} of {report['prompts']}"
            + (f"; {len(dropped)} left out, see dropped_prompts in evaluation.json" if dropped else ""),
        ],
        [
            "Answers",
            f"at most {number_of(report['max_tokens'], 'token')}, {sampling}; "
            f"{number_of(report['concurrency'], 'chat')} at a time",
        ],
        *(
            [["Drafts at temperatures above 0", report["draft_sample_method"] or "as the server makes them"]]
            if any(temperatures)
            else []
        ),
        [
            "Seed of vLLM",
            "the server's own" if seed is None else f"{seed}{', and 1 more in each later round' * (rounds > 1)}",
        ],
        *runners_row(report),
        ["Versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())],
        [
            "Intervals",
            f"{method['confidence']:.0%}, for other prompts of the same kind ({method['name']}); speed intervals are "
            "the union over rounds",
        ],
        *([["Segments", _markers(report)]] if report.get("segment_markers") else []),
        ["Rounds", f"{rounds}{': how much speeds vary between rounds is not known' * (rounds == 1)}"],
    ]


def _markers(report: dict[str, Any]) -> str:
    """The segments of answers, in words."""
    markers = [
        f"{name.replace('_', ' ')} from {opening} to {'the end of the answer' if closing is None else closing}"
        for name, (opening, closing) in report["segment_markers"].items()
    ]
    begin = report["answers_begin_in"]
    return "; ".join(markers + ([f"answers begin in {begin}"] if begin != TEXT else []))


def _sentences(report: dict[str, Any]) -> list[str]:
    labelled, labels = _entries(report), _labels(report)
    prefixes = [f"{label}: " if len(labelled) > 1 else "" for label, _ in labelled]
    found = [prefixes[0] + _speed_sentence(report), describe_not_reached(report), describe(report[RECOMMENDED])]
    found += [prefixes[0] + sentence for sentence in _break_even_sentences(report)]
    sentences = [sentence for sentence in found if sentence]
    for prefix, (_, entry) in zip(prefixes, labelled, strict=True):
        sentences.append(prefix + _text_sentence(entry, report))
        if entry.get("num_drafts") == 0:
            sentences.append(
                f"{prefix}vLLM drafted nothing, so acceptance isn't known: all answers ended with their first token, "
                "or K is 0 at this load. Raise --max-tokens, or lower --concurrency."
            )
    if report["counts"] != BY_DRAFT:
        is_server = report["seed"] is None
        sentences.append(coarse_counts(report["counts"], report["versions"]["vllm"], is_server))
    elif any(entry.get("by_context", {}) is None for _, entry in labelled):
        sentences.append(
            "Acceptance isn't known by segment or by position in the context, because vLLM generated tokens without "
            "drafts, as with K 0 under load, and doesn't say where. Measure with one K at any load."
        )
    for label, entry in labelled[1:]:
        difference = entry["difference"]
        row, other = difference["acceptance_length"], labels[tuple(difference["from"].values())]
        verdict = f"{_verdict(row, 0)}, {estimate(row['value'], row['interval'], '+.3f')}"
        sentences.append(f"Acceptance length of {label} against {other}: {verdict}.")
    return sentences


def _load(run: dict[str, Any]) -> str:
    """The number of chats at a time, with the one that was asked for if that wasn't reached."""
    asked, ran = run["concurrency"], run["chats_at_a_time"]
    return str(ran) if ran == asked else f"{ran} of {asked}"


def _chats(run: dict[str, Any]) -> str:
    return number_of(run["chats_at_a_time"], "chat") if _load(run).isdigit() else f"{_load(run)} chats"


def _speed_sentence(report: dict[str, Any]) -> str:
    speed, speed_without = report["tokens_per_second"], report["tokens_per_second_without"]
    start = f"Speed with {_chats(report['by_concurrency'][-1])} at a time: {speed:.1f} tokens/s with the drafter"
    if speed_without is None:
        return f"{start}; the speed without it was not measured."
    sentence = f"{start}, {speed_without:.1f} without: {_figure(report, 'speed_up', '.2f')} times as fast."
    if report["is_speed_up_or_down"] is None:
        return (
            f"{sentence} Run at least {MIN_PROMPTS} prompts with --rounds 2 or more to tell whether the difference is "
            "real."
        )
    if not report["is_speed_up_or_down"]:
        return sentence + " That is no difference: the interval contains 1."
    if speed < speed_without:
        sentence += (
            " The drafter slows vLLM down here: drafting and verifying "
            f"{number_of(report['num_speculative_tokens'], 'token')} takes time, especially on a CPU, and too few "
            "are accepted."
        )
    return sentence


def _break_even_sentences(report: dict[str, Any]) -> list[str]:
    """From which acceptance length the drafter pays, at each number of chats at a time."""
    if report["speed_up"] is None:
        return []
    first, *others = report["by_concurrency"]
    lengths = [f"{_pays_from(first)} with {_chats(first)} at a time"]
    lengths += [f"{_pays_from(run)} with {_load(run)}" for run in others]
    sentences = [
        f"The acceptance length from which a drafter pays here is {', '.join(lengths)}; this drafter has "
        f"{report['acceptance_length']:.2f}."
    ]
    if any(_pays_from(run).startswith(("more than", "less than")) for run in report["by_concurrency"]):
        sentences.append(
            "Where only one side of that length is given, the prompts' own passes may take a large part of the time, "
            "while other answers go on. --concurrency 1 as well, or longer answers, tell more, and peagle-hf plan "
            "measures it."
        )
    return sentences


def _all_prompts(count: int) -> str:
    return "the only prompt" if count == 1 else f"all {count} prompts"


def _text_sentence(entry: dict[str, Any], report: dict[str, Any]) -> str:
    if entry["text_identical"] is None:
        return "Text: not compared, because it is sampled or was generated only with the drafter."
    if entry["text_identical"]:
        return f"Text: identical with and without the drafter for {_all_prompts(entry['num_prompts'])}."
    places = [f"{shown(place['id'])} (turn {place['turn']}, token {place['token']})" for place in entry["differences"]]
    hint = (
        ""
        if report["dtype"] == "float32"
        else f" In {report['dtype']} greedy text can change with the batch composition: try --dtype float32."
    )
    return f"Text: DIFFERENT with the drafter for {_num_other(entry)}: {', '.join(places)}.{hint}"


def shown(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name from the data in one line: white space as one space, control characters escaped, cut to `longest`."""
    line = " ".join(name.split())
    line = "".join(repr(letter)[1:-1] if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in line)
    if not line:
        return "(no name)"
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _draw_positions(report: dict[str, Any], axes: Any) -> None:
    entries = _entries(report)
    positions = range(max(len(entry["per_position_acceptance"]) for _, entry in entries))
    series = [(label, _positions(entry, len(positions))) for label, entry in entries]
    bars(axes, [str(position + 1) for position in positions], series, "{:.1%}", baseline=False)
    axes.set(xlabel="Draft position", ylabel="Accepted, of all drafts", title="Acceptance by position")
    axes.yaxis.set_major_formatter("{x:.0%}")


def _positions(entry: dict[str, Any], count: int) -> list[tuple[float, Any]]:
    rates = entry["per_position_acceptance"]
    spread = entry["intervals"].get("per_position_acceptance", [None] * len(rates))
    return [*zip(rates, spread, strict=True), *[(0.0, None)] * (count - len(rates))]


def _draw_categories(report: dict[str, Any], axes: Any) -> None:
    def lengths(entry: dict[str, Any]) -> list[tuple[float, Any]]:
        rows = entry["by_category"].values()
        return [(row["acceptance_length"], row["intervals"].get("acceptance_length")) for row in rows]

    series = [(label, lengths(entry)) for label, entry in _entries(report)]
    names = [shown(name, LONGEST_LABEL // 2) for name in report["by_category"]]
    bars(axes, names, series, "{:.2f}", baseline=False, bottom=1.0)
    axes.set(ylabel="Acceptance length", title="Acceptance length by category")
    axes.tick_params("x", rotation=30)


def _draw_speeds(report: dict[str, Any], axes: Any) -> None:
    def speeds(entry: dict[str, Any], name: str) -> list[tuple[float, Any]]:
        return [(run[name], run["intervals"].get(name)) for run in entry["by_concurrency"]]

    entries = _entries(report)
    series = [(label, speeds(entry, "tokens_per_second")) for label, entry in entries]
    baseline = report["tokens_per_second_without"] is not None
    if baseline:
        series.insert(0, ("no drafter", speeds(report, "tokens_per_second_without")))
    concurrency = [_load(run) for run in report["by_concurrency"]]
    bars(axes, concurrency, series, "{:.1f}", baseline)
    axes.set(xlabel="Chats at a time", ylabel="Tokens per second", title="Speed")


_PICTURES: list[tuple[str, Callable[[dict[str, Any], Any], None]]] = [
    ("Acceptance by position", _draw_positions),
    ("Acceptance length by category", _draw_categories),
    ("Speed", _draw_speeds),
]
