"""The architecture page: the packages, their imports and their modules, all read from the source of peagle_hf.

A part is a package of peagle_hf or a module that lies directly in it. `__init__` (the public names) and `__main__`
belong to no part.
"""

import ast
import re
from graphlib import TopologicalSorter
from html import escape
from pathlib import Path

from peagle_hf.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "peagle_hf"
INTRODUCTION = """# Architecture

This page is made from the source when the site is built: the arrows are the imports, and the sentences are the first
ones of the docstrings. [How it works](design.md) explains the ideas, and the [glossary](glossary.md) the words.

## Packages

An arrow goes from a package to one that it imports. Arrows that follow from others are left out: {example}.
Every package may import the modules of the lowest box, which import no package.

"""
WAY_INTRODUCTION = """
## The way of one chat

"""
MODULES_INTRODUCTION = """
## Modules

"""
WAY = [
    ("data.prepare.prepare", "token ids and a loss mask, in the prepared dataset"),
    ("data.extract.extract", "the verifier's hidden states of each token, in the cache"),
    ("data.dataset.HiddenStatesDataset", "packed sequences of several samples"),
    ("data.collator.CODDataCollator", "slots: pairs of anchor and depth"),
    ("model.drafter.PeagleForSpeculation", "the drafter's state of each slot"),
    ("training.objective.Objective", "loss and counters, from which the Trainer updates the weights"),
    ("training.export_callback.VllmExportCallback", "a checkpoint that vLLM loads"),
    ("serving.launch.serve", "drafts, which the verifier checks"),
]
"""The functions and classes that a chat passes through, and what each of them makes of it."""


def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module's path and syntax tree by its name without `peagle_hf.`, such as `data.cache_storage`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, path: Path, tree: ast.Module) -> set[str]:
    """The modules of peagle_hf that a module imports, at its top or in a function, as dotted names."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module.split(".") if node.module else [])
            found |= {".".join([*base, one.name]) for one in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peagle_hf":
            found |= {".".join([*(node.module or "").split(".")[1:], one.name]) for one in node.names}
        elif isinstance(node, ast.Import):
            found |= {one.name.partition(".")[2] for one in node.names if one.name.split(".")[0] == "peagle_hf"}
    return found


def arrows() -> dict[str, set[str]]:
    """The parts that each part imports; for the command line also those of its commands."""
    found = modules()
    parts = {name.split(".")[0] for name in found} - {"", "__main__"}
    result: dict[str, set[str]] = {part: set() for part in sorted(parts)}
    for name, (path, tree) in found.items():
        if name.split(".")[0] in parts:
            result[name.split(".")[0]] |= {target.split(".")[0] for target in imports(name, path, tree)} & parts
    result["cli"] |= {command.module.split(".")[0] for command in COMMANDS.values()}
    return {part: targets - {part} for part, targets in result.items()}


def parts_in_order(imported: dict[str, set[str]]) -> list[str]:
    """The parts, each after all that it imports.

    Raises:
        graphlib.CycleError: two parts import each other, directly or through others; it names them.
    """
    return list(TopologicalSorter({part: sorted(imported[part]) for part in sorted(imported)}).static_order())


def page() -> str:
    """The architecture page in Markdown, with its pictures as SVG that takes its colours from the site's theme."""
    found, imported = modules(), arrows()
    drawn = {part: targets - _low_modules(imported) for part, targets in imported.items()}
    for module in _low_modules(imported):
        del drawn[module]
    left_out = {part: sorted(drawn[part] - _reduced(drawn)[part]) for part in drawn}
    part = max(left_out, key=lambda part: len(left_out[part]))
    example = f"`{part}` also imports {', '.join(f'`{target}`' for target in left_out[part])}"
    return (
        INTRODUCTION.format(example=example)
        + f"{STYLE}\n\n"
        + _packages_picture(drawn, sorted(_low_modules(imported)))
        + WAY_INTRODUCTION
        + _way(found)
        + MODULES_INTRODUCTION
        + "".join(_table(part, found, imported) for part in reversed(parts_in_order(drawn)))
        + _table("", {name: found[name] for name in sorted(_low_modules(imported))}, imported)
    )


def _low_modules(imported: dict[str, set[str]]) -> set[str]:
    """The modules directly in peagle_hf that import no package."""
    single = {part for part in imported if (PACKAGE / f"{part}.py").is_file()}
    return {part for part in single if imported[part] <= single}


def _reduced(imported: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows without those that follow from two or more others (the transitive reduction)."""
    reached: dict[str, set[str]] = {}
    for part in parts_in_order(imported):
        reached[part] = imported[part].union(*(reached[target] for target in imported[part]))
    return {
        part: {one for one in targets if not any(one in reached[other] for other in targets)}
        for part, targets in imported.items()
    }


BOX_WIDTH, BOX_HEIGHT, GAP = 150, 52, 56
STYLE = """<style>
.architecture { max-width: 100%; height: auto; font-family: inherit; }
.architecture rect { fill: var(--md-code-bg-color); stroke: var(--md-default-fg-color--light); rx: 6px; }
.architecture text { fill: var(--md-default-fg-color); text-anchor: middle; font-size: 15px; font-weight: 600; }
.architecture .small { fill: var(--md-default-fg-color--light); font-size: 11.5px; font-weight: 400; }
.architecture .label { font-size: 13.5px; font-weight: 400; text-anchor: start; }
.architecture path { fill: none; stroke: var(--md-default-fg-color--light); stroke-width: 1.5; }
td:first-child code { white-space: nowrap; }
.architecture marker path { fill: var(--md-default-fg-color--light); stroke: none; }
</style>"""
ARROW_HEAD = """<defs>
<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L8,4 L0,8 z"/></marker></defs>"""


def _packages_picture(imported: dict[str, set[str]], low_modules: list[str]) -> str:
    reduced = _reduced(imported)
    level: dict[str, int] = {}
    for part in parts_in_order(imported):
        level[part] = 1 + max((level[target] for target in reduced[part]), default=0)
    rows = [sorted(part for part in level if level[part] == one) for one in range(max(level.values()), 0, -1)]
    width = max(max(map(len, rows)) * (BOX_WIDTH + GAP) + GAP, 640)
    height = len(rows) * (BOX_HEIGHT + GAP) + BOX_HEIGHT
    shapes, centre = [], {}
    for row, parts in enumerate(rows):
        for column, part in enumerate(parts):
            x = width / 2 + (column - (len(parts) - 1) / 2) * (BOX_WIDTH + GAP)
            y = row * (BOX_HEIGHT + GAP) + BOX_HEIGHT / 2
            centre[part] = x, y
            count = sum(path.name != "__init__.py" for path in (PACKAGE / part).rglob("*.py"))
            shapes.append(_box(x, y, BOX_WIDTH, part, f"{count} modules"))
    for part, targets in reduced.items():
        for target in sorted(targets):
            shapes.append(_arrow(centre[part], centre[target]))
    names = ", ".join(low_modules)
    shapes.append(_box(width / 2, height - BOX_HEIGHT / 2, width - 2, names, "modules for all packages"))
    return _svg(width, height, shapes, "The packages of peagle_hf and their imports")


def _box(x: float, y: float, width: float, title: str, line: str) -> str:
    return (
        f'<rect x="{x - width / 2}" y="{y - BOX_HEIGHT / 2 + 1}" width="{width}" height="{BOX_HEIGHT - 2}"/>'
        f'<text x="{x}" y="{y - 3}">{escape(title)}</text>'
        f'<text class="small" x="{x}" y="{y + 15}">{escape(line)}</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """From the lower edge of one box to the upper edge of another, which is further down."""
    (x, y), (to_x, to_y) = (start[0], start[1] + BOX_HEIGHT / 2), (end[0], end[1] - BOX_HEIGHT / 2)
    middle = (y + to_y) / 2
    return f'<path d="M{x},{y} C{x},{middle} {to_x},{middle} {to_x},{to_y - 1}" marker-end="url(#head)"/>'


def _svg(width: float, height: float, shapes: list[str], title: str) -> str:
    return (
        f'<div><svg class="architecture" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(title)}">{ARROW_HEAD}{"".join(shapes)}</svg></div>\n'
    )


def _way(found: dict[str, tuple[Path, ast.Module]]) -> str:
    width, step, x = 640, BOX_HEIGHT + GAP, 140
    shapes, sentences = [], []
    for row, (name, result) in enumerate(WAY):
        module, _, attribute = name.rpartition(".")
        y = row * step + BOX_HEIGHT / 2
        shapes.append(_box(x, y, 260, attribute, f"{module.replace('.', '/')}.py"))
        shapes.append(_arrow((x, y), (x, y + step)))
        shapes.append(f'<text class="label" x="{x + 14}" y="{y + step / 2 + 4}">{escape(result)}</text>')
        sentence = _first_sentence(_definition(found[module][1], attribute))
        sentences.append(f"{row + 1}. `{attribute}`: {sentence}\n")
    picture = _svg(width, len(WAY) * step, shapes, "The way of one chat through the packages")
    return picture + "\n" + "".join(sentences)


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class of that name in a module.

    Raises:
        LookupError: there is none; then `WAY` names something that was moved or renamed.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"docs/architecture.py names {name}, which isn't there any more.")


def _first_sentence(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph)[0].replace("|", "\\|")


def _table(part: str, found: dict[str, tuple[Path, ast.Module]], imported: dict[str, set[str]]) -> str:
    """A table of a part's modules; of all of `found` if the part is ''."""
    title = f"peagle_hf.{part}" if part else "Modules for all packages"
    table = f"\n### {title}\n\n"
    if part:
        others = [f"`{target}`" for target in parts_in_order(imported) if target in imported[part]]
        table += f"{_first_sentence(found[part][1])} Imports {', '.join(others)}.\n\n"
    table += "| module | what it holds |\n|---|---|\n"
    for name, (path, tree) in found.items():
        if (name.startswith(f"{part}.") if part else True) and path.name != "__init__.py":
            table += f"| `{path.relative_to(PACKAGE / part)}` | {_first_sentence(tree)} |\n"
    return table
