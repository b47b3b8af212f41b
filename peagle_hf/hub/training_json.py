"""`training.json` beside a drafter's weights: how it was trained, with which chat template and variables.

`PeagleTrainer` writes it; the model card, `serve` and `evaluate` read it.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from ..data.prepared_dataset import CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_KWARGS_FILE
from ..data.tokenizer import ChatOptions
from ..errors import PeagleError
from ..files import read_json

logger = logging.getLogger(__name__)

RECORD = "training.json"
"""How a drafter was trained, beside its weights: see `PeagleTrainer.record`."""


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of the training that wrote a checkpoint; None where there is none.

    Raises:
        PeagleError: the file is damaged.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        return None
    remedy = (
        "Copy it from another checkpoint of the same training, or remove it; without it the card says that the "
        "training was not recorded."
    )
    record = read_json(path, remedy)
    for name, kind in (("chat_template", str), ("chat_template_kwargs", dict), ("seed", int)):
        if not isinstance(record.get(name), kind | None):
            raise PeagleError(f"{path} is damaged: {name} is {record[name]!r}. {remedy}")
    return record


def recorded_chat_options(folder: str | os.PathLike[str]) -> ChatOptions | None:
    """The chat template and variables of a drafter's training, from its record or from the files that `push` uploaded.

    None if they aren't known.

    Raises:
        PeagleError: a file is damaged.
    """
    folder = Path(folder)
    if (record := read_record(folder)) is not None:
        return chat_options_of(record)
    template, kwargs = folder / CHAT_TEMPLATE_FILE, folder / CHAT_TEMPLATE_KWARGS_FILE
    remedy = "Download the drafter again."
    try:
        text = template.read_text(encoding="utf-8") if template.exists() else None
    except (OSError, ValueError) as error:
        raise PeagleError(f"{template} can't be read ({error}). {remedy}") from error
    options = ChatOptions(text, read_json(kwargs, remedy) if kwargs.exists() else {})
    return None if options == ChatOptions() else options


def chosen_chat_options(
    folder: str | os.PathLike[str],
    verifier: str,
    trust_remote_code: bool,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | str | None,
) -> ChatOptions:
    """The chat template and variables to use with a drafter: those of its training, unless others are named.

    What is taken from the record is logged.

    Raises:
        PeagleError: the record is damaged, there is no such template, or the variables are no JSON object.
    """
    recorded = recorded_chat_options(folder)
    options = ChatOptions.chosen(verifier, trust_remote_code, chat_template, chat_template_kwargs, recorded)
    taken = []
    recorded = recorded or ChatOptions()
    if chat_template is None and recorded.template is not None:
        taken.append("the chat template")
    if chat_template_kwargs is None and recorded.kwargs:
        taken.append(f"the chat template's variables {json.dumps(recorded.kwargs, ensure_ascii=False)}")
    if taken:
        logger.info(
            "From the training of %s: %s. Others are chosen with --chat-template and --chat-template-kwargs.",
            folder,
            " and ".join(taken),
        )
    return options


def chat_option_files(options: ChatOptions | None) -> dict[str, bytes]:
    """Name and content of the files that record chat options beside a drafter on the hub; none for the defaults."""
    files: dict[str, bytes] = {}
    options = options or ChatOptions()
    if options.template is not None:
        files[CHAT_TEMPLATE_FILE] = options.template.encode()
    if options.kwargs:
        files[CHAT_TEMPLATE_KWARGS_FILE] = (json.dumps(options.kwargs, indent=2) + "\n").encode()
    return files


def chat_options_of(record: dict[str, Any]) -> ChatOptions | None:
    """The chat template and variables in a record of `read_record`; None if an earlier version wrote none."""
    kwargs = record.get("chat_template_kwargs")
    return None if kwargs is None else ChatOptions(record.get("chat_template"), kwargs)
