"""Copies `examples/` into the built package, where `peagle-hf init` finds it, and makes the README's links absolute;
all else is in pyproject.toml."""

import os
import re
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExamples(build_py):
    """An editable installation needs no copy: there `peagle-hf init` reads the checkout's own `examples/`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copied = Path(self.build_lib, "peagle_hf", "examples")
            rmtree(copied, ignore_errors=True)  # files of an earlier build
            copytree("examples", copied, ignore=ignore_patterns("__pycache__", "output", ".*"))


def readme() -> str:
    """README.md for a package index, where its links and pictures need the repository's address, if that is known."""
    text = Path("README.md").read_text(encoding="utf-8")
    listed = re.search(r'^Repository = "(.+)"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.M)
    address = os.environ.get("PEAGLE_HF_REPOSITORY") or (listed[1] if listed else "")
    if not address:
        return text
    return re.sub(
        r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)",
        lambda link: f"{link[1]}[{link[2]}]({address.rstrip('/')}/{'raw' if link[1] else 'blob'}/main/{link[3]})",
        text,
    )


setup(
    cmdclass={"build_py": BuildWithExamples},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
