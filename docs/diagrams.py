"""Draw docs/images/drafting.svg and docs/images/slots.svg: python docs/diagrams.py

Both are readable on light and on dark pages: a media query in the SVG changes its colours with those of the page.
"""

from html import escape
from pathlib import Path

import torch

from peagle_hf.model.slots import sample_slots, trained_positions

IMAGES = Path(__file__).parent / "images"
STYLE = """<style>
svg { --ink: #1f2328; --quiet: #59636e; --drafter: #b35900; --verifier: #0a5dc2; --no: #c62828; --page: #ffffff }
@media (prefers-color-scheme: dark) {
svg { --ink: #e6edf3; --quiet: #9aa4ae; --drafter: #f0a35e; --verifier: #74b0f4; --no: #ff8a80; --page: #1f2129 }
}
text { font: 16px -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: var(--ink);
  text-anchor: middle; dominant-baseline: central }
.left { text-anchor: start } .bold { font-weight: 600 } .small { font-size: 14px } .quiet { fill: var(--quiet) }
.drafter { fill: var(--drafter) } .verifier { fill: var(--verifier) } .no { fill: var(--no) }
.page { fill: var(--page) }
rect { fill: none; stroke: var(--quiet); stroke-width: 1.5; rx: 6px }
rect.drafter { stroke: var(--drafter); fill: none } rect.verifier { stroke: var(--verifier); fill: none }
rect.soft { fill-opacity: .16 } rect.soft.drafter { fill: var(--drafter) } rect.soft.verifier { fill: var(--verifier) }
rect.full.drafter { fill: var(--drafter) } rect.dashed { stroke-dasharray: 5 4 } rect.faint { stroke-opacity: .35 }
rect.no { stroke: var(--no); fill: none }
path { fill: none; stroke: var(--quiet); stroke-width: 1.5; marker-end: url(#head) }
marker path { fill: var(--quiet); stroke: none; marker-end: none }
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L8,4 L0,8 z"/></marker></defs>
"""
NUM_DEPTHS, RATIO, RATIO_MIN, SEED = 4, 0.7, 0.2, 4
TOKENS = ["[user]", "Name", "a", "city", "[bot]", "Paris", "is", "the", "capital", "of", "France", "[end]"]
REPLY = 5
"""The number of the first token of TOKENS that the verifier generates."""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>\n'


def box(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    """A rectangle with its centre at (x, y)."""
    return (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" class="{kind}"/>\n'
    )


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x:g},{y:g} L{to_x:g},{to_y:g}"/>\n'


def save(name: str, width: int, height: int, title: str, shapes: list[str]) -> None:
    (IMAGES / name).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n{STYLE}{"".join(shapes)}</svg>\n',
        encoding="utf-8",
    )


def drafting() -> None:
    """One round: the drafter proposes four tokens, the verifier accepts two and adds one of its own."""
    columns, width, rows = [398, 496, 594, 692], 88, [26, 80, 140, 200]
    labels = [
        ("", "The text so far", ""),
        ("drafter", "The drafter proposes", "K tokens, here 4, in one forward pass"),
        ("verifier", "The verifier checks them", "all in one forward pass of its own"),
        ("", "The text grows by 3 tokens", "2 accepted ones, 1 of the verifier's own"),
    ]
    shapes = [text(columns[0] - width / 2 + 2, rows[0], "The capital of France is …", "left")]
    for y, (colour, first, second) in zip(rows, labels, strict=True):
        shapes += [text(16, y - 10 * bool(second), first, f"left bold {colour}")]
        shapes += [text(16, y + 11, second, "left small quiet")] if second else []
    chips = [
        [(word, "drafter soft dashed", "") for word in ("Paris", ",", "a", "river")],
        [("Paris ✓", "verifier soft", ""), (", ✓", "verifier soft", ""), ("a ✗", "no dashed", "no")],
        [(word, "verifier soft", "bold") for word in ("Paris", ",", "which")],
    ]
    chips[1].append(("dropped", "dashed faint", "quiet"))
    for y, row in zip(rows[1:], chips, strict=True):
        for x, (word, kind, colour) in zip(columns, row, strict=False):
            shapes += [box(x, y, width, 34, kind), text(x, y, word, colour)]
            if y < rows[-1] and word != "dropped":
                shapes += [arrow(x, y + 19, x, y + 40)]
    save("drafting.svg", 752, 232, "One round of speculative decoding with a P-EAGLE drafter", shapes)


def slots() -> None:
    """The slots of one sample after COD, and what one of them may attend to."""
    mask = torch.tensor([number >= REPLY for number in range(len(TOKENS))])
    anchors, depths = sample_slots(
        trained_positions(mask), NUM_DEPTHS, RATIO, RATIO_MIN, torch.Generator().manual_seed(SEED)
    )
    kept = set(zip(anchors.tolist(), depths.tolist(), strict=True))
    length = len(TOKENS) - 2
    query = max((one for one in kept if one[1]), key=lambda slot: slot[1])
    step, left, top, height = 72, 84, 96, 52
    shapes = [
        text(left - step / 2 + 4, 20, "the token that each position sees", "left quiet"),
        text(24, top - 14, "depth", "small quiet"),
    ]
    trained = trained_positions(mask).tolist()
    for anchor in range(length):
        x = left + anchor * step
        shapes += [text(x, 46, TOKENS[anchor + 1], "small bold"), text(x, 66, f"anchor {anchor}", "small quiet")]
        for depth in range(NUM_DEPTHS):
            if not all([*trained, False, False, False][anchor + 1 : anchor + depth + 1]):
                continue
            y = top + depth * height + 16
            slot = (anchor, depth)
            visible = slot in kept and (
                (depth == 0 and anchor <= query[0]) or (anchor == query[0] and depth <= query[1])
            )
            kind = "full drafter" if slot == query else "soft drafter" if visible else ""
            kind += "" if slot in kept else " dashed faint"
            word = TOKENS[anchor + depth + 2]
            colour = "page bold" if slot == query else "" if trained[anchor + depth] and slot in kept else "quiet"
            shapes += [box(x, y, step - 8, 38, kind), text(x, y, word, f"small {colour}")]
    for depth in range(NUM_DEPTHS):
        shapes.append(text(24, top + depth * height + 16, str(depth), "bold"))
    y = top + NUM_DEPTHS * height + 22
    legend = [
        ("full drafter", "the chosen slot"),
        ("soft drafter", "the slots that it may attend to"),
        ("", "other slots"),
        ("dashed faint", "dropped by COD"),
    ]
    x = 24.0
    for kind, words in legend:
        shapes += [box(x + 12, y, 24, 18, kind), text(x + 32, y, words, "left small")]
        x += 58 + 7.4 * len(words)
    shapes.append(
        text(
            24,
            y + 32,
            "Each box shows the token that the slot predicts. Grey ones aren't trained on.",
            "left small quiet",
        )
    )
    save("slots.svg", left + (length - 1) * step + 44, y + 52, "The slots of one sample after COD sampling", shapes)


if __name__ == "__main__":
    drafting()
    slots()
