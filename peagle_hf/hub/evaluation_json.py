"""`evaluation.json` as `peagle-hf evaluate` wrote it, read for a card or a server of the drafter that it is about."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PeagleError
from ..fingerprint import has_weights

_EVALUATION = (
    *("drafter", "prompts", "num_prompts", "max_tokens", "temperature", "num_speculative_tokens", "concurrency"),
    *("dtype", "device", "versions", "acceptance_length", "acceptance_rate", "per_position_acceptance"),
    *("tokens_per_second", "tokens_per_second_without", "num_identical", "by_category"),
)
"""Fields of an evaluation's report that the card shows."""


def read_evaluation(path: str | os.PathLike[str], model: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of `peagle-hf evaluate` on the drafter `model`.

    Raises:
        PeagleError: there is no such file, it is something else, or it is about another drafter.
    """
    with damage_named(path):
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        weights, rates = report["drafter_weights"], report["per_position_acceptance"]
        of_parts = [*report["by_category"].values(), *(report.get("by_segment") or {}).values()]
        of_parts += (report.get("by_context") or {}).values()
        for figures in [{name: report[name] for name in _EVALUATION}, *of_parts]:
            for name in ("num_prompts", "acceptance_length", "acceptance_rate"):
                float(figures[name])
        is_of_drafter = weights is not None and has_weights(weights, model)
    if not rates:
        raise PeagleError(f"{path} has no acceptance, because vLLM drafted nothing. Run peagle-hf evaluate again.")
    if not is_of_drafter:
        raise PeagleError(
            f"{path} evaluates a different checkpoint than {model}: {report['drafter']}. Run peagle-hf evaluate "
            f"--model {shlex.quote(str(model))}."
        )
    return report


@contextmanager
def damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the block, which reads fields of a report, into a `PeagleError` about the report's file.

    Raises:
        PeagleError: the report can't be read, lacks a field, or has one of the wrong kind.
    """
    try:
        yield
    except PeagleError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PeagleError(
            f"{path} is not a report of peagle-hf evaluate, or is damaged ({type(error).__name__}: {error}). Name its "
            "evaluation.json, or run peagle-hf evaluate again."
        ) from error
