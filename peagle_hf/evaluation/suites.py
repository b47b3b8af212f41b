"""The prompts of an evaluation, read from one or several suites, with their categories interleaved."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from ..console import number_of
from ..data.prompts import Prompt, read_prompts
from ..data.sources import is_local_file, source_name
from ..errors import PeagleError
from .arguments import EvaluateArguments

logger = logging.getLogger(__name__)

TEXT_KINDS = (".txt", ".md")
"""Endings of files whose whole text is the question of one prompt."""


def load_prompts(arguments: EvaluateArguments, dropped: list[dict[str, str]]) -> list[Prompt]:
    """Read the prompts of all suites and interleave their categories, so that all run under the same conditions.

    With several suites, names of prompts and categories begin with that of their suite, and a prompt that an earlier
    suite has too is left out.

    A text file is one prompt: the model answers its text.

    Args:
        dropped: receives the prompts that are left out, with the reasons.

    Raises:
        PeagleError: a suite can't be read, or has no prompt that the suites before it don't have.
    """
    names = _suite_names(arguments.suite)
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    suite_of: dict[str, str] = {}
    for suite, name in zip(arguments.suite, names, strict=True):
        unusable: list[dict[str, str]] = []
        prompts = [_text_prompt(suite)] if Path(suite).suffix.lower() in TEXT_KINDS else read_prompts(suite, unusable)
        dropped += unusable
        for drop in unusable:
            logger.warning("%s is left out: %s.", drop.get("place", drop["id"]), drop["reason"])
        if not prompts:
            raise PeagleError(
                f"{source_name(suite)} has no prompt that can be run. Name a file whose prompts have user turns."
            )
        prefix, repeated = f"{name}/" if len(names) > 1 else "", Counter[str]()
        for prompt in prompts:
            first = suite_of.setdefault(prompt.digest, name)
            if first != name:
                repeated[first] += 1
                dropped.append(prompt.dropped(f"it is in {first} too"))
                continue
            category = prefix + prompt.category
            by_category[category].append(replace(prompt, id=prefix + prompt.id, category=category))
        for first, count in repeated.items():
            logger.warning("Left out, because they are in %s too: %s of %s.", first, number_of(count, "prompt"), suite)
        if repeated.total() == len(prompts):
            raise PeagleError(f"All prompts of {source_name(suite)} are in the suites before it. Leave it out.")
    if len(suite_of) < sum(map(len, by_category.values())):
        logger.warning(
            "%s more than once in the same suite. Intervals are too narrow for that: take repeated prompts out.",
            number_of(sum(map(len, by_category.values())) - len(suite_of), "prompt occurs", "prompts occur"),
        )
    in_turn = chain.from_iterable(zip_longest(*by_category.values()))
    return [prompt for prompt in in_turn if prompt is not None][: arguments.max_prompts]


def _text_prompt(path: str) -> Prompt:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PeagleError(f"{path} can't be read as UTF-8 text ({error}). Name another file.") from error
    if not text.strip():
        raise PeagleError(f"{path} is empty: it holds no text to answer. Leave it out.")
    return Prompt(Path(path).name, "text", system=[], turns=[text], place=Path(path).name)


def _suite_names(suites: Sequence[str]) -> list[str]:
    """Short, distinct names of suites: of a file its name, with its ending or parent folders where names are equal.

    Raises:
        PeagleError: a suite is named twice.
    """
    suites = [source_name(suite) for suite in suites]
    files = [Path(suite).resolve() if is_local_file(suite) else Path(suite) for suite in suites]
    if len({(path, is_local_file(suite)) for path, suite in zip(files, suites, strict=True)}) < len(suites):
        raise PeagleError(f"--suite names a suite twice: {', '.join(suites)}. Name each once.")
    paths = [path.with_suffix("") if is_local_file(suite) else path for path, suite in zip(files, suites, strict=True)]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        for named in (paths, files):
            names = [
                "/".join(path.parts[-length:]) if is_local_file(suite) else suite
                for path, suite in zip(named, suites, strict=True)
            ]
            if len(set(names)) == len(names):
                return names
    return list(suites)
