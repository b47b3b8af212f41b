"""Pictures of reports, drawn by matplotlib in one style: in a page as SVG, light and dark, or as a PNG file.

Matplotlib is optional: without it `can_draw` says once what to install, and reports have only tables.
"""

import logging
import os
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from markupsafe import Markup, escape

from ..files import atomic_path

logger = logging.getLogger(__name__)

GREY, BLUE = "#8593a1", "#4a86c5"
COLOURS = (BLUE, "#e0a33e", "#5a9a68", "#c06c84", "#8f80c9", "#5fb0b7")
"""Colours of series, in order; they can be told apart on white and on black."""
MISSING = "Pictures need matplotlib, which is not installed: pip install 'peagle-hf[plots]'."
_PAGE_SIZE = (5.6, 3.2)
"""Width and height of a picture in a page, in inches."""
_DOTS_PER_INCH = 150
_INKS = {"light": "#1d2733", "dark": "#dfe5ec"}

Draw = Callable[[Any], None]
"""Draws into a matplotlib `Axes`."""


@cache
def can_draw() -> bool:
    """Whether matplotlib is installed; if not, the log says so once."""
    is_there = find_spec("matplotlib") is not None
    if not is_there:
        logger.warning(MISSING)
    return is_there


def picture(title: str, draw: Draw) -> Markup:
    """A drawing for a page, for light and for dark screens; one that can't be drawn is replaced by the reason.

    Args:
        title: what the picture shows, for readers who don't see it.
    """
    if not can_draw():
        return Markup("<p>{}: {}</p>").format(title, MISSING)
    try:
        light, dark = (_svg(draw, ink) for ink in _INKS.values())
    # The tables have the figures, so no error of matplotlib is worth failing for.
    except Exception as error:
        logger.warning("The picture %r could not be drawn (%s: %s).", title, type(error).__name__, error)
        return Markup("<p>The picture “{}” could not be drawn: {}</p>").format(title, error)
    return Markup(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(title)}" src="{light}"></picture>'
    )


def save_png(path: str | os.PathLike[str], drawings: Sequence[Draw], size: tuple[float, float], source: str) -> None:
    """Draw side by side into a PNG file on white, atomically; if that can't be done, the log says why.

    Args:
        size: of one drawing, in inches.
        source: the files that have all figures, for the log.
    """
    if not can_draw():
        return
    try:
        with atomic_path(path) as temporary, _style(_INKS["light"]):
            _figure(drawings, size).savefig(temporary, format="png", dpi=_DOTS_PER_INCH, facecolor="white")
    except Exception as error:
        logger.warning(
            "%s could not be drawn (%s: %s). All figures are in %s.", path, type(error).__name__, error, source
        )


def _svg(draw: Draw, ink: str) -> str:
    """A drawing as a data URL; the same drawing gives the same URL."""
    content = BytesIO()
    with _style(ink):
        _figure([draw], _PAGE_SIZE).savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(content.getvalue()).decode()


def _figure(drawings: Sequence[Draw], size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * len(drawings), size[1]), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@contextmanager
def _style(ink: str) -> Iterator[None]:
    """Matplotlib's settings for all pictures: transparent ground, text as text, in a colour."""
    from matplotlib import rc_context

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plain = {"figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False, "text.usetex": False}
    plain["axes.titlepad"] = 24  # in points; leaves room for a legend
    svg = {"svg.hashsalt": "peagle_hf", "svg.fonttype": "none"}
    with rc_context({**dict.fromkeys(inked, ink), **plain, **svg}), warnings.catch_warnings():
        # matplotlib warns of each character that its font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def bars(
    axes: Any,
    groups: list[str],
    series: list[tuple[str, list[tuple[float, Any]]]],
    form: str,
    baseline: bool,
    bottom: float = 0.0,
) -> None:
    """Draw groups of bars side by side, with their intervals.

    Args:
        series: name and, for each group, value and interval.
        form: format of the numbers on the bars, which are drawn if there is room.
        baseline: the first series was measured without a drafter.
    """
    from matplotlib import rcParams

    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series):
        heights = [value - bottom for value, _ in values]
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        spread = [interval or (value, value) for value, interval in values]
        errors = [
            [max(value - low, 0) for (value, _), (low, _) in zip(values, spread, strict=True)],
            [max(high - value, 0) for (value, _), (_, high) in zip(values, spread, strict=True)],
        ]
        bars = axes.bar(
            places,
            heights,
            width * 0.92,
            bottom,
            color=GREY if baseline and number == 0 else COLOURS[(number - baseline) % len(COLOURS)],
            label=label,
            yerr=errors,
            error_kw={"ecolor": rcParams["text.color"], "elinewidth": 1, "capsize": 2},
        )
        if len(groups) * len(series) <= 16:
            axes.bar_label(bars, [form.format(value) for value, _ in values], padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), groups, parse_math=False)
    axes.margins(y=0.15)
    if len(series) > 1:
        axes.legend(fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
