"""`peagle-hf run`: the steps of a pipeline from one YAML file, going on where it stopped."""

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .arguments import SECTION, Arguments, field_names, parse_mapping
from .cli import COMMANDS
from .errors import PeagleError
from .files import check_writable, read_json, write_json
from .redaction import public_settings

logger = logging.getLogger(__name__)
STEPS = ("regenerate", "prepare", "extract", "train", "evaluate")
LENGTHS = {"num_train_epochs", "max_steps"}
"""Arguments with which a finished training goes on."""


@dataclass
class RunArguments(Arguments):
    """A pipeline: the arguments of each step, by step, as a YAML file holds them; a step left out is not run."""

    output: str = field(metadata={"help": "Folder that remembers which steps are finished (pipeline.json)."})
    regenerate: dict | str | None = field(
        default=None, metadata={"help": "Arguments of peagle-hf regenerate.", "metavar": SECTION}
    )
    prepare: dict | str | None = field(
        default=None, metadata={"help": "Arguments of peagle-hf prepare.", "metavar": SECTION}
    )
    extract: dict | str | None = field(
        default=None, metadata={"help": "Arguments of peagle-hf extract.", "metavar": SECTION}
    )
    train: dict | str | None = field(
        default=None, metadata={"help": "Arguments of peagle-hf train.", "metavar": SECTION}
    )
    evaluate: dict | str | None = field(
        default=None, metadata={"help": "Arguments of peagle-hf evaluate.", "metavar": SECTION}
    )

    GROUPS: ClassVar = {"Pipeline": ("output", *STEPS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for step in STEPS:
            section = getattr(self, step)
            with suppress(json.JSONDecodeError):  # text that is no JSON is refused below
                section = json.loads(section) if isinstance(section, str) else section
            if section is not None and not isinstance(section, dict):
                raise PeagleError(
                    f"The section {step!r} of the pipeline must hold that command's arguments, such as "
                    f"`{step}: {{output: out}}`, not {section!r}."
                )
            setattr(self, step, section)


def run(arguments: RunArguments) -> None:
    """Run a pipeline's steps in order; a finished one is done again only if its arguments or an earlier step changed.

    Steps that are cut off go on where they stopped, as their commands do. All arguments are parsed before the first
    step starts.

    Raises:
        PeagleError: a step is to be done again whose output would stay as it is: training that would go on from its
            last checkpoint with other arguments or data. More epochs alone are fine.
    """
    sections = {step: section for step in STEPS if (section := getattr(arguments, step)) is not None}
    parsed: dict[str, Any] = {
        step: parse_mapping(COMMANDS[step].load()[1], section, f"the section {step}", f"peagle-hf {step}")
        for step, section in sections.items()
    }
    sections = public_settings(sections)  # they are recorded
    record = Path(arguments.output) / "pipeline.json"
    finished = read_json(record, "Remove it: steps that are complete are kept as they are.") if record.exists() else {}
    check_writable(arguments.output)
    unchanged = True
    for step, section in sections.items():
        were_unchanged, unchanged = unchanged, unchanged and finished.get(step) == section
        if unchanged:
            logger.info("%s: finished earlier.", step)
            continue
        if step == "train" and step in finished:
            _require_fresh(parsed[step], finished[step] if were_unchanged else None, section)
            del finished[step]
            write_json(record, finished)
        logger.info("%s", step)
        started = time.monotonic()
        COMMANDS[step].load()[0](parsed[step])
        # Of a step behind this one it stays known that it was finished, with something else before it.
        finished = {name: done if STEPS.index(name) < STEPS.index(step) else None for name, done in finished.items()}
        finished[step] = section
        write_json(record, finished)
        logger.info("%s: %.0f s.", step, time.monotonic() - started)


def _require_fresh(arguments: Any, before: dict[str, Any] | None, section: dict[str, Any]) -> None:
    """Refuse to train on from checkpoints of a training that finished with other arguments, None being other data."""
    from .checkpoints import newest_checkpoint

    now, then = (field_names(type(arguments), one or {}) for one in (section, before))
    changed = [name for name in sorted({*now, *then} - LENGTHS) if now.get(name) != then.get(name)]
    if arguments.resume and (before is None or changed) and newest_checkpoint(arguments.output_dir):
        reason = "an earlier step" if before is None else ", ".join(changed)
        raise PeagleError(
            f"{reason} changed since train was finished, but it would go on from the checkpoints in "
            f"{arguments.output_dir}, where nothing is left to do. Remove that folder to train anew, or name another "
            "one in the section train."
        )
