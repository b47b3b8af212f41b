"""`peagle-hf run`: run the steps of a pipeline from one YAML file, continuing where it stopped."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ..arguments import Arguments, config_path, write_config
from ..cli import COMMANDS
from ..data.cache_manifest import Manifest
from ..data.cache_storage import STATES_FILE, cache_folder
from ..data.prepared_dataset import CHAT_TEMPLATE_FILE, DATASET_INFO, read_prepare_record, rows_fingerprint
from ..data.sources import data_sha256, is_local_file
from ..errors import PeagleError
from ..files import check_writable, locked_folder, read_json, remove_leftovers, write_json
from ..fingerprint import file_fingerprint, weights_of
from ..redaction import public_settings
from ..training.checkpoints import BEST, newest_checkpoint
from .parsing import SECTION, field_names, parse_mapping

logger = logging.getLogger(__name__)
STEPS = ("regenerate", "prepare", "extract", "train", "evaluate")
LENGTHS = {"num_train_epochs", "max_steps"}
"""Arguments that may change for a finished training, which then continues."""
TELLING = ("dry_run", "memory_report")
"""Arguments with which a step only says what it would do or need: it isn't finished, and later steps can't begin."""


@dataclass
class RunArguments(Arguments):
    """A pipeline: the arguments of each step, as in its YAML file; a step without arguments is not run."""

    output: str = field(metadata={"help": "Folder of pipeline.json, the record of finished steps."})
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
            with suppress(json.JSONDecodeError):  # text that isn't JSON is refused below
                section = json.loads(section) if isinstance(section, str) else section
            if section is not None and not isinstance(section, dict):
                raise PeagleError(
                    f"The section {step!r} of the pipeline must hold that command's arguments, such as "
                    f"`{step}: {{output: out}}`, not {section!r}."
                )
            setattr(self, step, section)


def run(arguments: RunArguments) -> None:
    """Run a pipeline's steps in order; a finished step runs again if it changed, and the log says what changed.

    A step has changed if its arguments, the content of its input or its output have. Its command decides what it can
    still use: it continues where it was interrupted, and refuses to mix data that doesn't belong together. All
    arguments are parsed before the first step starts. A step with `dry_run` or `memory_report` says what it would do,
    and ends the pipeline.

    Raises:
        PeagleError: a changed step would keep its old output: training would continue from its last checkpoint with
            other arguments or data (except for more epochs), or a file was changed by hand. Or another process runs a
            pipeline with the same output folder.
    """
    sections = {step: section for step in STEPS if (section := getattr(arguments, step)) is not None}
    parsed: dict[str, Any] = {
        step: parse_mapping(COMMANDS[step].load()[1], section, f"the section {step}", f"peagle-hf {step}")
        for step, section in sections.items()
    }
    with locked_folder(arguments.output, "Wait until it has ended, or name another output.", "run"):
        remove_leftovers(arguments.output, r"pipeline\.json|(config|run)\.yaml")
        if os.access(arguments.output, os.W_OK):  # otherwise this only says what is finished
            write_config(arguments, config_path(arguments.output, "run"), "run")
        for step, section in public_settings(sections).items():  # without passwords, since they are recorded
            if told := [name for name in TELLING if getattr(parsed[step], name, False)]:
                COMMANDS[step].load()[0](parsed[step])
                logger.info("%s: not done, because of %s; the pipeline ends here.", step, told[0])
                return
            _run_step(step, parsed[step], section, Path(arguments.output) / "pipeline.json")


def _run_step(step: str, arguments: Any, section: dict[str, Any], record: Path) -> None:
    remedy = "Remove it: steps that are complete are kept as they are."
    finished = read_json(record, remedy) if record.exists() else {}
    before = finished.pop(step, None)
    state = _State.now(step, arguments, section)
    try:
        reasons = [] if before is None else state.differences(before)
    except (AttributeError, KeyError, TypeError) as error:
        raise PeagleError(
            f"{record} is damaged: what it says of {step} has another form ({error}). {remedy}"
        ) from error
    if before is not None and not reasons:
        logger.info("%s: finished earlier.", step)
        return
    check_writable(record.parent)
    if before is not None:
        _require_fresh(step, arguments, state, before)
        logger.info("%s: again, because %s.", step, "; ".join(reasons))
    else:
        logger.info("%s", step)
    if record.exists():
        write_json(record, finished)  # the step is unfinished until it has ended
    started = time.monotonic()
    COMMANDS[step].load()[0](arguments)
    finished[step] = asdict(state.after(step, arguments))
    write_json(record, {name: finished[name] for name in STEPS if name in finished})
    logger.info("%s: %.0f s.", step, time.monotonic() - started)


@dataclass(frozen=True)
class _State:
    """The arguments, input and output of a step, as JSON values.

    Args:
        arguments: those that aren't paths, by field.
        read: for each input, the fingerprints of its parts.
        written: the same for each output.
    """

    arguments: dict[str, Any]
    read: dict[str, dict[str, str]]
    written: dict[str, dict[str, str]]

    @classmethod
    def now(cls, step: str, arguments: Any, section: dict[str, Any]) -> "_State":
        reads, writes = _PLACES[step]
        places = {name for names in (reads, writes) for name, _ in names.values()}
        in_places = {name for name in places if _place(step, arguments, name) is not None}
        named = field_names(type(arguments), section)
        told = {name: value for name, value in named.items() if name not in in_places}
        states = (_states_of(names, step, arguments) for names in (reads, writes))
        return cls(*json.loads(json.dumps([told, *states])))

    def after(self, step: str, arguments: Any) -> "_State":
        """The state after the step has ended, with the input that it began with.

        Only two kinds of input are read again: hidden states, because a training with a server adds some, and models
        with a name on the hub, because their commit is known only once the step has downloaded them.
        """
        reads, writes = _PLACES[step]
        anew = {
            what: place
            for what, place in reads.items()
            if what == HIDDEN_STATES or any(part.startswith("name ") for part in self.read[what])
        }
        read, written = (_states_of(names, step, arguments) for names in (anew, writes))
        return replace(self, read=self.read | read, written=written)

    def differences(self, before: dict[str, Any]) -> list[str]:
        """Changes since the step was finished, as parts of a sentence."""
        changes = [f"{name} changed" for name in self.changed_arguments(before)]
        changes += [f"{what} changed" for what in self.changed_inputs(before)]
        missing, changed = self.changed_outputs(before)
        changes += [f"{_few(missing)} is missing"] if missing else []
        changes += [f"{_few(changed)} changed"] if changed else []
        return changes

    def changed_arguments(self, before: dict[str, Any]) -> list[str]:
        then = before["arguments"]
        return [name for name in sorted({*self.arguments, *then}) if self.arguments.get(name) != then.get(name)]

    def changed_inputs(self, before: dict[str, Any]) -> list[str]:
        then = before["read"]
        return [what for what in {**self.read, **then} if self.read.get(what, {}) != then.get(what, {})]

    def changed_outputs(self, before: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Names of parts that are missing, and of parts that differ."""
        now, then = (
            {name: part for parts in one.values() for name, part in parts.items()}
            for one in (self.written, before["written"])
        )
        changed = [name for name in then if name in now and now[name] != then[name]]
        return [name for name in then if name not in now], changed


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _require_fresh(step: str, arguments: Any, state: _State, before: dict[str, Any]) -> None:
    """Refuse to rerun a step whose output would not match its arguments and input afterwards.

    Raises:
        PeagleError: training would continue from checkpoints of other arguments or data, or a file that the command
            would keep as complete was changed.
    """
    if step not in ("train", "regenerate"):
        return
    _, changed = state.changed_outputs(before)
    changed = [name for name in changed if name != BEST]  # training itself moves this link
    if changed:
        raise PeagleError(
            f"{_few(changed)} changed since {step} was finished, by hand or by another program, and peagle-hf {step} "
            "does not replace a file that is complete. Put it back, or remove "
            f"{'its folder' if step == 'train' else 'it'} to have it made again."
        )
    reasons = [
        *(name for name in state.changed_arguments(before) if name not in LENGTHS),
        *state.changed_inputs(before),
    ]
    if step == "train" and arguments.resume and reasons and newest_checkpoint(arguments.output_dir):
        raise PeagleError(
            f"{', '.join(reasons)} changed since train was finished, but its checkpoints in {arguments.output_dir} "
            "would be kept. Remove that folder to train again, or name another one in the section train."
        )


def _place(step: str, arguments: Any, name: str) -> Any:
    """The path in a step's argument, or the default path if it isn't given; None for a configuration without a file."""
    value = getattr(arguments, "as_given", vars(arguments))[name]
    if (step, name) == ("train", "resume_from_checkpoint") and value is not None:
        # Training removes old checkpoints of its own folder, which the outputs include.
        is_own = Path(arguments.output_dir).resolve() in Path(value).resolve().parents
        return None if is_own else value
    if isinstance(value, dict) or (name in _CONFIGURATIONS and str(value).lstrip().startswith("{")):
        return None
    if value is not None:
        return value
    if (step, name) == ("extract", "output"):
        return str(cache_folder(arguments.preprocessed_data))
    if (step, name) == ("extract", "model"):
        return None if arguments.endpoint else read_prepare_record(arguments.preprocessed_data).get("model")
    if (step, name) == ("train", "hidden_states_path"):
        return str(cache_folder(arguments.data_path))
    return None


def _states_of(places: "_Places", step: str, arguments: Any) -> dict[str, dict[str, str]]:
    """The fingerprints of a step's inputs or outputs, by their names in messages."""
    states = {}
    for what, (name, state_of) in places.items():
        value = _place(step, arguments, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        states[what] = _parts(values, state_of)
    return states


def _parts(values: list[Any], state_of: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """The fingerprints of paths; for a name on the hub its commit, or the name itself."""
    parts: dict[str, str] = {}
    for number, value in enumerate(values):
        path = Path(str(value))
        is_there = path.exists() or (state_of is _data and is_local_file(str(value)))  # FOLDER:SPLIT is local too
        if not is_there:
            parts |= {} if os.path.isabs(str(value)) else {f"name {number}": weights_of(str(value)) or str(value)}
            continue
        try:
            parts |= {f"{number}/{name}" if number else name: part for name, part in state_of(path).items()}
        except (PeagleError, OSError) as error:
            parts[f"damage {number}"] = str(error)
    return parts


def _model(folder: Path) -> dict[str, str]:
    """Fingerprints of weights and tokenizer."""
    files = [path for path in sorted(folder.iterdir()) if path.name.startswith(_TOKENIZER_FILES)]
    return {"weights": str(weights_of(folder))} | {path.name: file_fingerprint(path) for path in files}


def _weights(folder: Path) -> dict[str, str]:
    return {"weights": str(weights_of(folder))}


def _file(path: Path) -> dict[str, str]:
    return {path.name: file_fingerprint(path)}


def _data(path: Path) -> dict[str, str]:
    return {"content": str(data_sha256(str(path)))}


def _prepared(folder: Path) -> dict[str, str]:
    if not (folder / DATASET_INFO).exists():
        return {}
    return {"rows": rows_fingerprint(folder)} | {
        name: file_fingerprint(folder / name)
        for name in (CHAT_TEMPLATE_FILE, "token_freq.pt")
        if (folder / name).exists()
    }


def _hidden_states(folder: Path) -> dict[str, str]:
    """A digest of the manifest, without the verifier's path, and of the sizes of all files."""
    with os.scandir(folder) as entries:
        sizes = sorted((entry.name, entry.stat().st_size) for entry in entries if STATES_FILE.fullmatch(entry.name))
    if not sizes:
        return {}
    manifest = Manifest.read(folder)
    described = None if manifest is None else asdict(replace(manifest, verifier=""))
    digest = hashlib.sha256(json.dumps([described, sizes]).encode()).hexdigest()[:16]
    return {f"{folder.name}/hs_*.safetensors": f"{len(sizes)} files, {digest}"}


def _checkpoints(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {
        str(path.relative_to(folder)): path for path in files if not path.relative_to(folder).parts[0].startswith(".")
    }
    kept = {name: path for name, path in sorted(names.items()) if _CHECKPOINT.match(name)}
    best = folder / BEST
    return {name: file_fingerprint(path) for name, path in kept.items()} | (
        {BEST: os.readlink(best)} if best.is_symlink() else {}
    )


def _files(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): file_fingerprint(path) for path in files}


def _report(folder: Path) -> dict[str, str]:
    return {path.name: file_fingerprint(path) for path in sorted(folder.glob("evaluation.*")) if path.suffix != ".yaml"}


HIDDEN_STATES = "the hidden states"
_CONFIGURATIONS = ("deepspeed", "fsdp_config", "accelerator_config")
"""Arguments of the Trainer that name a file, or hold what could stand in one."""
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")
_CHECKPOINT = re.compile(r"(\d+|checkpoint-\d+)/")
_Places = dict[str, tuple[str, Callable[[Path], dict[str, str]]]]
_PLACES: dict[str, tuple[_Places, _Places]] = {
    "regenerate": (
        {
            "the model": ("model", _model),
            "the file of prompts": ("prompts", _data),
            "the file of excluded prompts": ("exclude", _data),
            "the chat template": ("chat_template", _file),
        },
        {"the chats": ("output", _file)},
    ),
    "prepare": (
        {
            "the tokenizer": ("model", _model),
            "the data": ("data", _data),
            "the chat template": ("chat_template", _file),
        },
        {"the prepared dataset": ("output", _prepared), "the file of token counts": ("token_freq_path", _file)},
    ),
    "extract": (
        {"the verifier": ("model", _weights), "the prepared dataset": ("preprocessed_data", _prepared)},
        {HIDDEN_STATES: ("output", _hidden_states)},
    ),
    "train": (
        {
            "the verifier": ("verifier_name_or_path", _weights),
            "the prepared dataset": ("data_path", _prepared),
            HIDDEN_STATES: ("hidden_states_path", _hidden_states),
            "the file of token counts": ("token_freq_path", _file),
            "the drafter": ("from_pretrained", _weights),
            "the checkpoint to resume from": ("resume_from_checkpoint", _files),
            **{f"the file of {name}": (name, _file) for name in _CONFIGURATIONS},
        },
        {"the checkpoints": ("output_dir", _checkpoints)},
    ),
    "evaluate": (
        {
            "the drafter": ("model", _weights),
            "the drafters to compare with": ("compare", _weights),
            "the prompts": ("suite", _data),
            "the verifier": ("verifier", _model),
            "the chat template": ("chat_template", _file),
        },
        {"the report": ("output", _report)},
    ),
}
"""For each step its inputs and outputs: name in messages, argument with the path, and fingerprint function."""
