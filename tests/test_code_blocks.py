"""Every command of README and of all pages runs as it is written, on a small verifier and a few chats.

What a command reads is put where it looks for it, if no command before it on the page has made it. docs/code_blocks.py
says what isn't run.
"""

import json
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from code_blocks import BLOCKS_NOT_RUN, COMMANDS_NOT_RUN, blocks, commands, embedded, not_run, pages
from test_tutorial import share_gpt

from peagle_hf import cli
from peagle_hf.cli import COMMANDS
from peagle_hf.cli.parsing import CommandParser

SMALLER = {
    "--max-samples": "12",
    "--seq-length": "256",
    "--total-seq-len": "256",
    "--epochs": "1",
    "--max-new-tokens": "8",
    "--invent": "2",
    "--draft-vocab-size": "64",
    "--num-workers": "1",
    "--draft-vocab-sizes": "64",
    "--optim": "adamw_torch",
}
"""What large numbers become, and optimizers that other packages bring."""
SHORTER = {"train": ["--epochs", "1"], "regenerate": ["--max-new-tokens", "8"]}
"""What is added to a command that leaves it at its default."""
IN_PYTHON = {"4096": "256", "num_train_epochs=5": "num_train_epochs=1"}
VERIFIER, DRAFTER, CHATS, PROMPTS = "verifier", "drafter", "chats", "prompts"
DATA, CACHED, STATES = "data", "data with hidden states", "states"
READ_BY = {
    "--verifier-name-or-path": VERIFIER,
    "--verifier": VERIFIER,
    "--data": CHATS,
    "--prompts": PROMPTS,
    "--exclude": PROMPTS,
    "--preprocessed-data": DATA,
    "--data-path": CACHED,
    "--from-pretrained": DRAFTER,
}
"""What kind of thing a flag reads; the model and folders without a flag depend on the command."""
WRITTEN_BY = {"prepare": "--output", "regenerate": "--output", "extract": "--output", "train": "--save-path"}
"""Flags that name what a command makes anew, so that a page may show two ways to make the same."""
CHAT_TEXTS = [[f"Why is stone {number} green?", f"It lies in the river for {number} years."] for number in range(12)]


@pytest.fixture(scope="module")
def kit(thinking_verifier, tmp_path_factory) -> dict[str, Path]:
    """One thing of each kind that commands read."""
    folder = tmp_path_factory.mktemp("kit")
    roles = ("user", "assistant")
    turns = [[{"role": role, "content": text} for role, text in zip(roles, chat, strict=True)] for chat in CHAT_TEXTS]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    data, model = folder / DATA, str(thinking_verifier)
    cli.main(["prepare", "--model", model, "--data", str(folder / "chats.jsonl"), "--output", str(data)])
    cli.main(["extract", "--model", model, "--preprocessed-data", str(data)])
    train = ["train", "--verifier-name-or-path", model, "--data-path", str(data), "--save-path", str(folder / "run")]
    cli.main([*train, "--epochs", "1", "--num-layers", "1", "--draft-vocab-size", "64", "--total-seq-len", "256"])
    return {
        VERIFIER: thinking_verifier,
        DRAFTER: (folder / "run" / "checkpoint_best").resolve(),
        CHATS: folder / "chats.jsonl",
        DATA: data,
        STATES: data / "hidden_states",
    }


def prompts(name: str) -> str:
    """A file of three prompts whose words no file of another name has."""
    letters = random.Random(name)
    words = ["".join(letters.choices("abcdefghij", k=6)) for _ in range(24)]
    turns = [" ".join(words[start : start + 8]) for start in (0, 8, 16)]
    return "".join(
        json.dumps({"question_id": n, "category": "a", "turns": [turn]}) + "\n" for n, turn in enumerate(turns)
    )


class Page:
    """The working directory of a page's commands."""

    def __init__(self, kit: dict[str, Path], folder: Path):
        self.kit, self.folder = kit, folder

    def run(self, words: list[str]) -> None:
        """Run the command in this process, with smaller numbers."""
        name = words[0]
        words = [re.sub("^/(?=shared/)", "", word) for word in words]
        given = self.values(words)
        for kind, value in self.reads(name, words, given):
            self.provide(kind, value)
        target = given.get(WRITTEN_BY.get(name, "none"))
        if name == "extract" and not target:
            target = [f"{given['--preprocessed-data'][0]}/hidden_states"]
        if target:
            path = self.folder / target[0]
            with suppress(FileNotFoundError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for flag in SMALLER.keys() & given.keys():
            place = words.index(flag) + 1
            words[place : place + len(given[flag])] = [SMALLER[flag]]
        extra = SHORTER.get(name, [])
        words += extra if extra and extra[0] not in words else []
        if name in ("launch-vllm", "serve") and "--dry-run" not in words:
            words.insert(words.index("--") if "--" in words else len(words), "--dry-run")
        cli.main(words)

    @staticmethod
    def values(words: list[str]) -> dict[str, list[str]]:
        """The values of each flag, and under "" those without one."""
        given: dict[str, list[str]] = {"": []}
        flag = ""
        for word in words[1 : words.index("--") if "--" in words else None]:
            if word.startswith("--"):
                flag = word
                given.setdefault(flag, [])
            else:
                given[flag].append(word)
        return given

    @staticmethod
    def reads(name: str, words: list[str], given: dict[str, list[str]]):
        """What the command reads: pairs of kind and path."""
        kinds = READ_BY | {"--model": DRAFTER if name in ("acceptance", "serve") else VERIFIER}
        if name == "launch-vllm":
            kinds |= {"": VERIFIER}
        if name == "serve":
            kinds |= {"": DRAFTER}
        for flag, values in given.items():
            yield from ((kinds[flag], value) for value in values if flag in kinds)
        if name in ("data", "cache"):
            yield from ((DATA if name == "data" else STATES, value) for value in given[""][1:2])

    def provide(self, kind: str, value: str) -> None:
        """Put a thing of that kind at the path, unless something is there."""
        path = self.folder / value
        if value in ("sharegpt", "ultrachat"):
            path = self.folder / "Aeala/ShareGPT_Vicuna_unfiltered/ShareGPT.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(share_gpt(CHAT_TEXTS)))
        if kind == VERIFIER and "checkpoint" in value:
            kind = DRAFTER
        if kind == CACHED:  # a server that isn't started here may make its states
            self.provide(DATA, value)
            if not (path / "hidden_states").exists():
                cli.main(["extract", "--model", str(self.kit[VERIFIER]), "--preprocessed-data", str(path)])
            return
        if path.exists():
            if kind == DATA and not (path / "dataset_info.json").exists():
                shutil.copytree(self.kit[DATA], path, dirs_exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == PROMPTS:
            path.write_text(prompts(path.name))
            return
        source = self.kit[kind]
        if kind == VERIFIER:
            path.symlink_to(source)
        elif source.is_dir():
            shutil.copytree(source, path)
        else:
            shutil.copy(source, path)


@pytest.fixture
def page(kit, tmp_path, monkeypatch) -> Page:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return Page(kit, tmp_path)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_in_order(path, page):
    names: dict = {}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.reason is not None:
            continue
        if block.language == "python":
            code = block.code
            for written, used in IN_PYTHON.items():
                code = code.replace(written, used)
            for value in re.findall(r'"([\w./-]+)"', code):
                if value == "out":
                    page.provide(CACHED, value)
                elif "checkpoint_best" in value:
                    page.provide(DRAFTER, value)
                elif re.fullmatch(r"Qwen/[\w.-]+|my-[\w.-]+", value):
                    page.provide(VERIFIER, value)
            exec(compile(code, str(path), "exec"), names)
            continue
        for (program, *words), reason in commands(block):
            if reason is None:
                assert program == "peagle-hf", f"Run {program} here, or give a reason in docs/code_blocks.py"
                page.run(words)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_every_command_of_a_page_parses(path):
    """Also those that are not run, as far as they are written out."""
    for block in blocks(path.read_text(encoding="utf-8")):
        for name, *words in embedded(block.code) if block.language == "bash" else ():
            if name.startswith("-") or name == "help":
                continue
            words = words[: words.index("--")] if "--" in words else words
            words = [re.sub(r"\$\w+|\$\{.*?\}", "1", word) for word in words]
            words = [SMALLER["--optim"] if word == "adamw_bnb_8bit" else word for word in words]
            command = COMMANDS[name]
            parser = CommandParser(command.load()[1], command.positional, prog=f"peagle-hf {name}")
            if {"...", "…"} & {*words}:
                assert [word for word in words if word.startswith("--") and parser.field_of(word) is None] == []
            elif not (words and words[0].endswith((".yaml", ".yml"))):
                parser.parse([], words)


def test_no_fence_is_overlooked_and_no_rule_is_left_over():
    texts = {path: path.read_text(encoding="utf-8") for path in pages()}
    for path, markdown in texts.items():
        fences = re.findall(r"^ *(?:```|~~~)(\w+)", markdown, re.M)
        assert {*fences} <= {"bash", "python", "text", "yaml", "json", "jinja", "dockerfile"}, path
        assert len(blocks(markdown)) == sum(language in ("bash", "python") for language in fences), path
        assert markdown.count("<!-- not run") == sum(
            f"<!-- not run: {block.reason} -->" in markdown for block in blocks(markdown) if block.reason
        ), path
    found = [block for markdown in texts.values() for block in blocks(markdown)]
    lines = "\n".join(block.code.replace("\\\n", " ") for block in found if block.language == "bash")
    assert [rule for rule in BLOCKS_NOT_RUN if not any(re.search(rule, block.code, re.M) for block in found)] == []
    assert [rule for rule in COMMANDS_NOT_RUN if not re.search(rule, lines, re.M)] == []
    listed = not_run()
    assert all(block.reason in listed for block in found if block.reason)
