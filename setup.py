"""Copies `examples/` into the built package, where `peagle-hf init` finds it; all else is in pyproject.toml."""

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


setup(cmdclass={"build_py": BuildWithExamples})
