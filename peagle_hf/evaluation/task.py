"""The task of an evaluation, drafters with their K on the same prompts, and its results."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..data.prompts import Prompt
from ..data.tokenizer import ChatOptions
from ..errors import PeagleError
from ..fingerprint import weights_of
from ..model.config import PeagleConfig
from ..model.served_checkpoint import (
    check_checkpoint,
    check_verifier,
    drafter_folder,
    drafter_name,
    speculative_config,
)
from ..redaction import public_url
from .arguments import EvaluateArguments
from .figures import Trial
from .runs import Condition, FinishedRuns, Run

FINISHED_RUNS = "evaluation.journal"
"""File of finished runs in the output folder, until the report is written."""


@dataclass(frozen=True)
class Drafter:
    """A drafter to measure.

    Args:
        name: the folder as reports show it, or the name on the hub.
        link: the name that was given, if that is a link to the folder.
        folder: the real path.
        weights: see `fingerprint.weights_of`.
        config: its configuration.
    """

    name: str
    link: str | None
    folder: Path
    weights: str | None
    config: PeagleConfig

    def description(self) -> dict[str, Any]:
        return {"drafter": self.name, "drafter_link": self.link, "drafter_weights": self.weights}


@dataclass(frozen=True)
class Drafting:
    """A drafter with a K, as vLLM's `--speculative-config` (see `model.served_checkpoint.speculative_config`)."""

    drafter: Drafter
    config: dict[str, Any]

    @property
    def num_speculative_tokens(self) -> int:
        return int(self.config["num_speculative_tokens"])


@dataclass(frozen=True)
class Task:
    """The drafters to measure, the prompts, and the chat options by which these become text."""

    arguments: EvaluateArguments
    verifier: str
    drafting: list[Drafting]
    prompts: list[Prompt]
    options: ChatOptions

    @property
    def draft_sample_method(self) -> str:
        """Of all drafters, as `speculative_config` names it."""
        return str(self.drafting[0].config["draft_sample_method"])

    def finished_runs(self, measured_on: dict[str, Any]) -> FinishedRuns:
        """The runs that an interrupted evaluation of the same task has finished.

        Args:
            measured_on: other conditions of the figures, such as device and versions, as JSON values.
        """
        return FinishedRuns(Path(self.arguments.output) / FINISHED_RUNS, self._settings() | measured_on)

    def _settings(self) -> dict[str, Any]:
        """Everything but a run's name that determines its figures, without passwords.

        Concurrency and temperature of a run are in its name, so that other lists of them leave it as it is.
        """
        arguments = self.arguments
        names = ("max_tokens", "seed", "dtype")
        content = json.dumps([[prompt.id, prompt.category, prompt.digest] for prompt in self.prompts])
        return {
            "verifier": weights_of(self.verifier) or self.verifier,
            "drafters": [f"{tried.drafter.weights}, K {tried.num_speculative_tokens}" for tried in self.drafting],
            "prompts": f"{len(self.prompts)}, sha256 {hashlib.sha256(content.encode()).hexdigest()[:16]}",
            **self.options.description(),
            "draft_sample_method": self.draft_sample_method,
            **{name: getattr(arguments, name) for name in names},
            **{
                name: None if (url := getattr(arguments, name)) is None else public_url(url)
                for name in ("endpoint", "baseline_endpoint")
            },
        }


@dataclass(frozen=True)
class AtTemperature:
    """The runs at one temperature.

    Args:
        without: the runs without a drafter, by concurrency and round; None if no server without a drafter is named.
        trials: one for each `Drafting`, in the same order.
    """

    temperature: float
    without: list[list[Run]] | None
    trials: list[Trial]

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Measured:
    """The results of an evaluation.

    Args:
        by_temperature: in the order of `--temperature`.
        measured_on: `dtype`, `device` and `versions`.
        counts: how finely vLLM counts drafts: `runs.BY_DRAFT`, `BY_REQUEST` or `BY_CATEGORY`.
        finished: the file of finished runs, to be removed when the report is written.
    """

    by_temperature: list[AtTemperature]
    measured_on: dict[str, Any]
    counts: str
    finished: FinishedRuns


def name_of_run(number_of_round: int, condition: Condition, number: int) -> str:
    """Name a run in `FinishedRuns`; drafters are numbered from 1 on, and 0 is the run without one."""
    return (
        f"round {number_of_round}, temperature {condition.temperature:g}, {condition.concurrency} at a time, "
        f"{f'drafter {number}' if number else 'no drafter'}"
    )


def conditions(arguments: EvaluateArguments) -> list[Condition]:
    """All pairs of temperature and concurrency, temperature by temperature."""
    return [Condition(*pair) for pair in product(arguments.temperature, arguments.concurrency)]


def by_temperature(
    drafters: Sequence[tuple[str, int]],
    without: Mapping[Condition, list[Run]] | None,
    runs: Sequence[Mapping[Condition, list[Run]]],
) -> list[AtTemperature]:
    """The runs of all rounds, by temperature.

    Args:
        drafters: name and K of each.
        without: the runs without a drafter.
        runs: those of each drafter.
    """
    temperatures = dict.fromkeys(condition.temperature for condition in runs[0])

    def at(temperature: float, by_condition: Mapping[Condition, list[Run]]) -> list[list[Run]]:
        return [rounds for condition, rounds in by_condition.items() if condition.temperature == temperature]

    return [
        AtTemperature(
            temperature,
            None if without is None else at(temperature, without),
            [Trial(*named, at(temperature, one)) for named, one in zip(drafters, runs, strict=True)],
        )
        for temperature in temperatures
    ]


def follow_links(arguments: EvaluateArguments) -> list[Drafter]:
    """Resolve the drafters once, `--model` first: training may move `checkpoint_best` while it is measured.

    Raises:
        PeagleError: two names lead to the same folder, or vLLM would load a checkpoint wrongly.
    """
    drafters: list[Drafter] = []
    for given in (arguments.model, *arguments.compare):
        folder = drafter_folder(given)
        name, link = drafter_name(given, folder)
        earlier = next((drafter for drafter in drafters if drafter.folder == folder), None)
        if earlier is not None:
            raise PeagleError(
                f"--model and --compare name a drafter twice: {earlier.link or earlier.name} and {given} are both "
                f"{folder}. Name each once."
            )
        config = check_checkpoint(folder)
        drafters.append(Drafter(name, link, folder, weights_of(folder), config))
    return drafters


def drafting_of(arguments: EvaluateArguments, drafters: Sequence[Drafter], verifier: str) -> list[Drafting]:
    """All pairs of drafter and K to measure, drafter by drafter; those of `--model` first.

    Raises:
        PeagleError: a drafter is for another verifier.
    """
    drafting = []
    for drafter in drafters:
        check_verifier(drafter.folder, drafter.config, verifier, arguments.trust_remote_code)
        for number in arguments.num_speculative_tokens or [drafter.config.num_depths]:
            arguments_of_vllm = speculative_config(
                drafter.folder, drafter.config, number, arguments.draft_sample_method
            )
            drafting.append(Drafting(drafter, arguments_of_vllm))
    return drafting
