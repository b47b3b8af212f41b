"""How the package is laid out: imports between its packages run one way, and modules and functions stay small."""

import ast
import re

from architecture import PACKAGE, arrows, modules, page, parts_in_order

MODULES = modules()


def test_imports_between_packages_run_one_way():
    """`graphlib.CycleError` names a cycle; imports within functions and for type checkers count as well."""
    assert parts_in_order(arrows())[-1] == "cli"


def test_few_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_modules_have_a_docstring_and_at_most_500_lines():
    assert [name for name, (_, tree) in MODULES.items() if not ast.get_docstring(tree)] == []
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, (path, _) in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 500} == {}


def test_functions_have_at_most_60_lines_or_their_docstring_says_why():
    long = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, (_, tree) in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
        if "Longer than 60 lines: " not in (ast.get_docstring(node) or "")
    }
    assert long == {}


def test_the_architecture_page_shows_every_module():
    shown = page()
    assert all(f"{path.name}` |" in shown for path, _ in MODULES.values() if path.stem[:2] != "__")


def test_pre_commit_has_the_ruff_of_the_constraints():
    root = PACKAGE.parent
    [pinned] = re.findall(r"^ruff==(\S+)$", (root / "constraints.txt").read_text(), re.M)
    assert f"rev: v{pinned}\n" in (root / ".pre-commit-config.yaml").read_text()
