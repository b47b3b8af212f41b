"""The code blocks of README and all pages: what CI runs of them, and why it doesn't run the rest.

tests/test_code_blocks.py runs each `peagle-hf` command of a page, in order, on a small verifier and small data that it
puts where the command looks for them. What it leaves out must match a rule below, or stand under a comment
`<!-- not run: reason -->`. Anything else fails the test, so a new block is either run or gets its reason here. The
`peagle-hf` commands of what isn't run are parsed.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<language>bash|python)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_EMBEDDED = re.compile(
    r"(?:peagle-hf|-m peagle_hf|(?P<script>\S*train\.py)) +(?P<words>[^\n#;&']*(?:'[^'\n]*'[^\n#;&']*)*)"
)
BLOCKS_NOT_RUN = {
    r"#SBATCH|\bsbatch\b": "SLURM runs it",
    r"tests/benchmarks/": "a measurement, which takes minutes to hours; each describes itself with `--help`",
    r"^make\b|pre-commit|\.venv/bin/": "CI runs these itself, or they are for people who work on the code",
    r"from peagle_hf import VerifierParts": "it needs a GPT-2; `tests/test_architectures.py` registers one",
    r"my-gpt2": "it needs a GPT-2; `tests/test_architectures.py` registers one",
    r"custom_generate=draft_and_verify": "a part of a program; `tests/test_generation.py` runs it",
    r"^register_loss\(": "it reads the command line; `tests/test_losses.py` registers such a loss",
    r"trainer\.hyperparameter_search": "it trains several times; `tests/test_trainer_features.py` runs a search",
    r'from_pretrained\("my-org/': "it needs the hub; `tests/test_hub.py` loads from one",
}
"""Patterns of whole blocks, and why those are not run."""
COMMANDS_NOT_RUN = {
    r"^(pip|uv|git|source|cd|docker) ": "it changes the machine; `tests/test_release.py` installs the wheel",
    r"^(head|tail) ": "programs of the system",
    r"^peagle-hf evaluate ": "it starts vLLM several times; `make demo` and `tests/test_docs.py` run it",
    r"^peagle-hf plan ": "it starts vLLM several times; `tests/test_plan.py` runs it",
    r"^peagle-hf push |--push-to-hub": "it needs the hub; `tests/test_hub.py` uploads to one",
    r"^peagle-hf chat\b": "it needs a server; `tests/test_tutorial.py` chats with one",
    r"^peagle-hf .*--(vllm-)?endpoint\b": "it needs a server; `tests/test_endpoint.py` has one",
    r"^peagle-hf regenerate .*--invent\b": "a random verifier ends no prompt; `tests/test_regenerate.py` invents",
    r"^(torchrun|accelerate) ": "it needs several GPUs; `tests/test_distributed.py` starts two processes on a CPU",
    r"^vllm (serve|bench) ": "vLLM's own command",
    r"^python hellinger\.py ": "the script is not in a file; `tests/test_losses.py` registers such a loss",
    r"^python examples/smollm2\.py ": "the fixture of the tests runs it for all of them",
    r"^peagle-hf .*(\.\.\.|…)": "a part of a command",
    r"^peagle-hf run ": "`make demo` and `tests/test_pipeline.py` run pipelines",
    r"^peagle-hf .* (ultrachat|\w[\w-]*/[\w.-]+:\w+)\b": "it needs a data set of the hub",
}
"""Patterns of commands, and why those are not run."""
_INTRODUCTION = """# What CI does not run

The tests run the commands of all pages with a small random verifier in place of Qwen3-8B and a dozen chats in place of
ShareGPT. They parse, but don't run, these:

| page | begins | not run because |
|---|---|---|
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of code of a page; `reason` says why none of it is run."""

    language: str
    code: str
    reason: str | None


def pages() -> list[Path]:
    """README and every page of the site that is a file."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(markdown: str) -> list[Block]:
    """The bash and python blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(markdown):
        code = dedent(match["code"])
        rule = (reason for pattern, reason in BLOCKS_NOT_RUN.items() if re.search(pattern, code, re.M))
        found.append(Block(match["language"], code, match["reason"] or next(rule, None)))
    return found


def commands(block: Block) -> Iterator[tuple[list[str], str | None]]:
    """The words of each command of a bash block that no rule of whole blocks leaves out, and why it isn't run, or None.

    Variables before a command are left out.
    """
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            command = " ".join(words)
            yield words, next((why for rule, why in COMMANDS_NOT_RUN.items() if re.search(rule, command)), None)


def embedded(code: str) -> Iterator[list[str]]:
    """The words after `peagle-hf` of all its commands in a block, also within loops and under torchrun."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if not line.startswith("docker ")]
    for match in _EMBEDDED.finditer("\n".join(lines)):
        words = shlex.split(match["words"])
        yield ["train", *words] if match["script"] else words


def not_run() -> str:
    """The page of what is not run, and why."""
    rows = {}
    for path in pages():
        for block in blocks(path.read_text(encoding="utf-8")):
            left_out = [(block.code, block.reason)] if block.reason else []
            if not block.reason and block.language == "bash":
                left_out = [(" ".join(words), reason) for words, reason in commands(block) if reason]
            for code, reason in left_out:
                first = re.sub(r"\s+(\\|#.*)?$", "", code.splitlines()[0])
                begins = first if len(first) <= 60 else f"{first[:59]}…"
                rows[f"| {path.relative_to(ROOT)} | `{begins.replace('|', chr(92) + '|')}` | {reason} |\n"] = None
    return _INTRODUCTION + "".join(rows)
