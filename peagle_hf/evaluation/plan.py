"""`peagle-hf plan`: what a drafter must reach to pay, measured with random weights before anything is trained."""

import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..arguments import (
    VLLM_ARGS_HELP,
    Arguments,
    check_ascending,
    check_ranges,
    command_text,
    config_path,
    flag_of,
    write_config,
)
from ..console import number_of
from ..errors import PeagleError
from ..files import ANOTHER_OUTPUT, locked_folder, write_json
from ..fingerprint import weights_of
from ..model.config import PeagleConfig
from ..model.drafter import PeagleForSpeculation
from ..model.served_checkpoint import speculative_config
from ..redaction import public_command
from ..serving.client import summarize
from ..serving.environment import installed_vllm, vllm_environment
from ..serving.installed import REQUEST_COUNTS, drafting_environment
from ..verifier.head import warn_if_untrainable
from ..verifier.loading import load_verifier_config
from .arguments import MAX_SEED, asks_for_random_weights, check_vllm_args
from .in_processes import engine_arguments, machine_settings
from .plan_report import draw, text
from .runs import BY_CATEGORY, BY_DRAFT, DRAFTED, NOT_DRAFTED, Condition, FinishedRuns, Run
from .speed_model import SpeedModel, fastest, median_break_even, median_speed_up
from .synthetic_acceptance import SYNTHETIC, check_synthetic_acceptance
from .vllm_process import Job, VllmProcess

logger = logging.getLogger(__name__)

LENGTHS = (1.5, 2.0, 3.0, 4.0)
"""The acceptance lengths for which the report has speed-ups."""
IF_MEMORY_RAN_OUT = "lower --concurrency, --prompt-tokens or --max-tokens"
FINISHED_RUNS = "plan.journal"
"""File of finished runs in the output folder, until the report is written."""


@dataclass
class PlanArguments(Arguments):
    """Arguments of `peagle-hf plan MODEL ... -- <vLLM's own flags>`."""

    model: str = field(
        metadata={
            "aliases": ["--verifier"],
            "help": "The verifier, a hub name or a folder; the flag may be left out. A folder with config.json alone "
            "is enough: vLLM then gives it random weights.",
        }
    )
    output: str = field(default="plan", metadata={"help": "Folder for plan.json, plan.png and vLLM's logs."})
    num_layers: list[int] = field(
        default_factory=lambda: [1, 2, 4],
        metadata={"help": "Decoder layers of the drafter, ascending; each number is measured (default: 1 2 4)."},
    )
    draft_vocab_size: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Tokens that the drafter can propose, ascending; each number is measured. Default: the verifier's "
            "whole vocabulary."
        },
    )
    draft_arch: Literal["llama", "qwen3"] | None = field(
        default=None, metadata={"help": "Kind of draft layers; default: qwen3, as in training."}
    )
    num_speculative_tokens: list[int] = field(
        default_factory=lambda: [2, 4, 7],
        metadata={"help": "K, the tokens to draft at a time, ascending; each number is measured (default: 2 4 7)."},
    )
    concurrency: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64],
        metadata={"help": "Chats at the same time, ascending; each number is measured (default: 1 4 16 64)."},
    )
    num_prompts: int = field(
        default=16, metadata={"help": "Prompts of each run; at least twice as many as chats at the same time are run."}
    )
    prompt_tokens: int = field(default=128, metadata={"help": "Length of each prompt, of random tokens."})
    max_tokens: int = field(default=128, metadata={"help": "Length of each answer, in tokens."})
    rounds: int = field(
        default=1,
        metadata={
            "help": "Number of times that everything is measured, each time in new processes. With 2 or more the "
            "report says how much the figures vary."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random weights and prompts, and of vLLM."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Precision of both models; auto is float32 on a CPU; on a GPU the verifier's own, or bfloat16 if "
            "that is float32."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the verifier."})
    vllm_args: list[str] = field(default_factory=list, metadata={"help": VLLM_ARGS_HELP})

    GROUPS: ClassVar = {
        "Input and output": ("model", "output", "trust_remote_code"),
        "Drafters": ("num_layers", "draft_vocab_size", "draft_arch", "num_speculative_tokens"),
        "What is measured": ("concurrency", "num_prompts", "prompt_tokens", "max_tokens", "rounds", "seed"),
        "vLLM": ("dtype", "vllm_args"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ascending(self, ("num_layers", "draft_vocab_size", "num_speculative_tokens", "concurrency"))
        for name in ("num_layers", "num_speculative_tokens", "concurrency"):
            if not getattr(self, name):
                raise PeagleError(f"{flag_of(name)} is empty. Give it a number or leave it out.")
        at_least_1 = ("num_prompts", "prompt_tokens", "rounds")
        check_ranges(self, {**dict.fromkeys(at_least_1, (1, math.inf)), "max_tokens": (8, math.inf)})
        check_ranges(self, {"seed": (0, MAX_SEED - self.rounds + 1)})
        check_vllm_args(self.vllm_args)


@dataclass(frozen=True)
class _Size:
    """A drafter that is planned."""

    num_layers: int
    draft_vocab_size: int

    @property
    def name(self) -> str:
        return f"{number_of(self.num_layers, 'layer')}, {self.draft_vocab_size} tokens"


def plan(arguments: PlanArguments) -> dict[str, Any]:
    """Measure vLLM without and with drafters of random weights; write, print and return the report.

    vLLM accepts drafted tokens at a set rate, whatever they are (synthetic acceptance), so only sizes count and nothing
    needs to be trained. Prompts are random tokens. Each drafter and K is measured at the acceptance lengths 1, 1 + K/2
    and K + 1, and a model of speed is fitted to these (see `speed_model`). `plan.json` has

    - `drafters`: for each size and K, `by_concurrency`: `tokens_per_second_without`; `measured`: acceptance lengths
      with their `tokens_per_second`; `break_even_length`, the acceptance length from which the drafter pays (1:
      always; null: none; above K + 1 it can't be reached), and `break_even_range`, its least and greatest value in the
      rounds; `speed_up` at the acceptance lengths 1.5, 2, 3 and 4 (null above K + 1); `model_error`, the greatest
      deviation of a measured time from the model, as a share.
    - `serve`: for each size and concurrency, `by_length`: the fastest K (`num_speculative_tokens`; null: no drafter) of
      a drafter that has this acceptance length with the largest K, with `acceptance_length` and `speed_up` at the
      fastest K. Every token is taken to be accepted at the same rate once all before it are.
    - how it was measured: `verifier`, `weights` ("random" or "its own"), `prompt_tokens`, `max_tokens`, `num_prompts`,
      `rounds`, `seed`, `command`, `dtype`, `device`, `versions`, and vLLM's `model_runner` without and with a drafter.

    Where there are several rounds, each figure is the median of them. Finished runs are kept in `plan.journal` until
    the report is written, so the same command goes on after an interruption.

    Raises:
        PeagleError: vLLM isn't installed, fails, or has no synthetic acceptance; the verifier's configuration can't be
            read; the journal is damaged.
    """
    config = load_verifier_config(arguments.model, trust_remote_code=arguments.trust_remote_code)
    warn_if_untrainable(arguments.model, arguments.trust_remote_code)
    sizes = [
        _Size(layers, vocabulary)
        for layers in arguments.num_layers
        for vocabulary in arguments.draft_vocab_size or [config.vocab_size]
    ]
    drafters = {size: _drafter_config(arguments, size) for size in sizes}
    with locked_folder(arguments.output, ANOTHER_OUTPUT, "plan"):
        output = Path(arguments.output)
        write_config(arguments, config_path(output, "plan"), "plan")
        measurement = _Measurement(arguments, drafters, config.vocab_size)
        report = measurement.report()
        write_json(output / "plan.json", report)
        print(text(report), flush=True)
        logger.info("\nWritten to %s.", output / "plan.json")
        picture = output / "plan.png"
        picture.unlink(missing_ok=True)  # that of an earlier plan
        draw(report, picture)
        measurement.finished.remove()
    return report


def _drafter_config(arguments: PlanArguments, size: _Size) -> PeagleConfig:
    return PeagleConfig.from_verifier(
        arguments.model,
        num_layers=size.num_layers,
        num_depths=arguments.num_speculative_tokens[-1],
        draft_arch=arguments.draft_arch,
        draft_vocab_size=size.draft_vocab_size,
        mask_token_id=0,  # any token will do, so no tokenizer is needed
        trust_remote_code=arguments.trust_remote_code,
    )


class _Measurement:
    """Runs vLLM without a drafter and with each drafter and K, as far as an interrupted plan has not done so."""

    def __init__(self, arguments: PlanArguments, drafters: dict[_Size, PeagleConfig], vocab_size: int):
        self.arguments, self.drafters, self.output = arguments, drafters, Path(arguments.output)
        self.is_dummy = asks_for_random_weights(arguments.vllm_args) or _has_no_weights(arguments.model)
        self.engine = self._engine()
        self.environment, self.installed = vllm_environment(), installed_vllm()
        check_synthetic_acceptance(self.installed)
        self.counts = BY_DRAFT if self.installed.takes(REQUEST_COUNTS) else BY_CATEGORY
        draw = np.random.default_rng(arguments.seed)
        most = max(self._num_prompts(concurrency) for concurrency in arguments.concurrency)
        # Ids in the middle of a vocabulary are those of ordinary tokens.
        shape, least, greatest = (most, arguments.prompt_tokens), vocab_size // 4, vocab_size // 2
        self.token_ids: list[list[int]] = draw.integers(least, max(greatest, least + 1), shape).tolist()
        names = ("draft_arch", "num_prompts", "prompt_tokens", "max_tokens", "seed")
        settings = {
            "verifier": weights_of(arguments.model) or arguments.model,
            **{name: getattr(arguments, name) for name in names},
            **{name: value for name, value in self.engine.items() if name != "model"},
            "vllm_args": public_command(arguments.vllm_args),
            **machine_settings(),
        }
        self.finished = FinishedRuns(self.output / FINISHED_RUNS, settings)
        for number in range(1, arguments.rounds + 1):
            self._measure(number)

    def report(self) -> dict[str, Any]:
        """See `plan`."""
        arguments = self.arguments
        models = {
            (size, tokens, concurrency): self._models(size, tokens, concurrency)
            for size in self.drafters
            for tokens in arguments.num_speculative_tokens
            for concurrency in arguments.concurrency
        }
        size, tokens = next(iter(self.drafters)), arguments.num_speculative_tokens[0]
        first = self._name(1, arguments.concurrency[0]), self._name(1, arguments.concurrency[0], size, tokens)
        (_, measured_on), (_, drafted_on) = self.finished[first[0]], self.finished[first[1]]
        runners = {NOT_DRAFTED: measured_on["model_runner"], DRAFTED: drafted_on["model_runner"]}
        return {
            "verifier": arguments.model,
            "weights": "random" if self.is_dummy else "its own",
            "drafters": [
                {
                    **vars(size),
                    "num_speculative_tokens": tokens,
                    "by_concurrency": [
                        self._entry(size, tokens, concurrency, models[size, tokens, concurrency])
                        for concurrency in arguments.concurrency
                    ],
                }
                for size in self.drafters
                for tokens in arguments.num_speculative_tokens
            ],
            "serve": [
                {
                    **vars(size),
                    "concurrency": concurrency,
                    "by_length": _fastest(
                        {tokens: models[size, tokens, concurrency] for tokens in arguments.num_speculative_tokens}
                    ),
                }
                for size in self.drafters
                for concurrency in arguments.concurrency
            ],
            **{name: getattr(arguments, name) for name in ("prompt_tokens", "max_tokens", "rounds", "seed")},
            "num_prompts": {str(number): self._num_prompts(number) for number in arguments.concurrency},
            "command": command_text(arguments, "plan"),
            **measured_on,
            "model_runner": runners,
        }

    def _engine(self) -> dict[str, Any]:
        arguments = self.arguments
        needed = arguments.prompt_tokens + arguments.max_tokens + arguments.num_speculative_tokens[-1] + 1
        config = load_verifier_config(arguments.model, trust_remote_code=arguments.trust_remote_code)
        limit = getattr(config, "max_position_embeddings", None) or needed
        if needed > limit:
            raise PeagleError(
                f"{arguments.model} has at most {limit} positions, but prompt, answer and one draft need {needed}. "
                "Lower --prompt-tokens or --max-tokens."
            )
        engine = engine_arguments(
            arguments.model,
            arguments.concurrency,
            arguments.dtype,
            needed,
            arguments.seed,
            arguments.trust_remote_code,
        )
        if not _has_tokenizer(arguments.model):
            engine["skip_tokenizer_init"] = True
        return engine | ({"load_format": "dummy"} if self.is_dummy else {})

    def _num_prompts(self, concurrency: int) -> int:
        return max(self.arguments.num_prompts, 2 * concurrency)

    @staticmethod
    def _lengths(tokens: int) -> tuple[float, ...]:
        """The acceptance lengths that are measured: both ends, and one in the middle that checks the model."""
        return 1.0, 1 + tokens / 2, 1.0 + tokens

    def _name(
        self, round_number: int, concurrency: int, size: _Size | None = None, tokens: int = 0, length: float = 1.0
    ) -> str:
        """Of a run in the journal."""
        drafter = "no drafter" if size is None else f"{size.name}, K {tokens}, length {length:g}"
        return f"round {round_number}, {concurrency} at a time, {drafter}"

    def _measure(self, round_number: int) -> None:
        """One round: first without a drafter, then with one after another."""
        concurrencies = self.arguments.concurrency
        missing = {self._name(round_number, number): self._job(number, None) for number in concurrencies}
        self._run(round_number, missing, "without a drafter", None)
        for size, config in self.drafters.items():
            with ExitStack() as stack:
                folder: str | None = None
                for tokens in self.arguments.num_speculative_tokens:
                    jobs = {
                        self._name(round_number, number, size, tokens, length): self._job(number, length)
                        for length in self._lengths(tokens)
                        for number in concurrencies
                    }
                    if folder is None and jobs.keys() - set(filter(self.finished.__contains__, jobs)):
                        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="peagle-hf-drafter-"))
                        self._write_drafter(config, folder)
                    drafting = speculative_config(folder or "", config, tokens) | SYNTHETIC
                    self._run(round_number, jobs, f"with a drafter of {size.name}, K {tokens}", drafting)

    def _write_drafter(self, config: PeagleConfig, folder: str) -> None:
        torch.manual_seed(self.arguments.seed)
        PeagleForSpeculation(config).bfloat16().save_pretrained(folder)

    def _job(self, concurrency: int, length: float | None) -> Job:
        prompts = self.token_ids[: self._num_prompts(concurrency)]
        tokens = self.arguments.max_tokens
        return Job([], [Condition(0.0, concurrency)], tokens, self.counts, token_ids=prompts, acceptance_length=length)

    def _run(self, round_number: int, jobs: dict[str, Job], what: str, drafting: dict[str, Any] | None) -> None:
        """Do the jobs that aren't finished in one process of vLLM."""
        missing = {name: job for name, job in jobs.items() if name not in self.finished}
        if not missing:
            return
        engine, environment = self.engine | {"seed": self.arguments.seed + round_number - 1}, self.environment
        if drafting is not None:
            engine |= {"speculative_config": drafting, REQUEST_COUNTS: "detailed"}
            environment = drafting_environment(environment)
        suffix = f"_round_{round_number}" if self.arguments.rounds > 1 else ""
        log = self.output / f"vllm_{what.replace(',', '').replace(' ', '_')}{suffix}.log"
        known, flags = self.installed.known(engine), self.arguments.vllm_args
        with VllmProcess(known, environment, log, what, flags, IF_MEMORY_RAN_OUT) as process:
            for name, job in missing.items():
                for run, measured_on in process.run(job):
                    self.finished.add(name, run, measured_on)

    def _models(self, size: _Size, tokens: int, concurrency: int) -> list[SpeedModel]:
        """The model of each round."""
        models = []
        for number in range(1, self.arguments.rounds + 1):
            without = _seconds_per_token(self.finished[self._name(number, concurrency)][0])
            runs = self._runs(number, size, tokens, concurrency)
            measured = [(_acceptance_length(run), _seconds_per_token(run)) for run in runs]
            models.append(SpeedModel.fit(without, measured))
        return models

    def _runs(self, round_number: int, size: _Size, tokens: int, concurrency: int) -> list[Run]:
        names = (self._name(round_number, concurrency, size, tokens, length) for length in self._lengths(tokens))
        return [self.finished[name][0] for name in names]

    def _entry(self, size: _Size, tokens: int, concurrency: int, models: list[SpeedModel]) -> dict[str, Any]:
        """One item of `by_concurrency`, see `plan`."""
        by_length = zip(
            *(self._runs(number, size, tokens, concurrency) for number in range(1, len(models) + 1)), strict=True
        )
        break_evens = [model.break_even_length for model in models]
        known = [length for length in break_evens if length is not None]
        return {
            "concurrency": concurrency,
            "tokens_per_second_without": float(np.median([1 / model.without for model in models])),
            "measured": [
                {
                    "acceptance_length": float(np.mean([_acceptance_length(run) for run in runs])),
                    "tokens_per_second": float(np.median([1 / _seconds_per_token(run) for run in runs])),
                }
                for runs in by_length
            ],
            "break_even_length": median_break_even(models),
            "break_even_range": [min(known), max(known)] if len(models) > 1 and len(known) == len(models) else None,
            "speed_up": {f"{length:g}": _speed_up(models, length, tokens) for length in LENGTHS},
            "model_error": max(model.error for model in models),
        }


def _fastest(models: dict[int, list[SpeedModel]]) -> list[dict[str, Any]]:
    """The items of `by_length`, see `plan`."""

    def items() -> Iterator[dict[str, Any]]:
        for length in LENGTHS:
            if length <= max(models) + 1:
                tokens, there, speed_up = fastest(models, length)
                yield {
                    "length_with_largest_k": length,
                    "num_speculative_tokens": tokens,
                    "acceptance_length": there,
                    "speed_up": speed_up,
                }

    return list(items())


def _speed_up(models: list[SpeedModel], length: float, tokens: int) -> float | None:
    return median_speed_up(models, length) if length <= tokens + 1 else None


def _seconds_per_token(run: Run) -> float:
    return run.seconds / sum(len(answer.token_ids) for chat in run.chats for answer in chat)


def _acceptance_length(run: Run) -> float:
    """By vLLM's counts per request, or by its totals where it has no others."""
    counts = run.drafting or list((run.counters or {}).values())
    return float(summarize(counts)["acceptance_length"])


def _has_no_weights(model: str) -> bool:
    """Whether the verifier is a folder with its configuration alone."""
    folder = Path(model)
    return folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _has_tokenizer(model: str) -> bool:
    """Whether a folder has a tokenizer; True for a hub name. vLLM starts without one, unless the model reads images."""
    folder = Path(model)
    return not folder.is_dir() or any(next(folder.glob(name), None) for name in _TOKENIZER_FILES)


_TOKENIZER_FILES = ("tokenizer*", "tekken.json", "vocab*", "*.tiktoken", "*.model")
