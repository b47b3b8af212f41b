"""Acceptance and speed of drafters in real vLLM, and whether the text stays the same with them.

The prompts are given to servers that run already, or vLLM is run on them in child processes, once without a drafter and
once for each drafter and number of tokens to draft.
"""

import logging
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from . import __version__
from .arguments import Arguments
from .bootstrap import CONFIDENCE, MIN_PROMPTS, RESAMPLES, interval, is_difference, resample
from .client import DRAFT_COUNTERS, Client, Run, measure
from .data.cache import place
from .data.chats import is_local_file
from .data.prompts import Prompt, read_prompts
from .errors import PeagleError
from .files import atomic_path, write_json
from .report import draw, html, text
from .serving import check_checkpoint, drafter_folder, speculative_config, vllm_environment
from .target import load_verifier_config, weights_of
from .vllm_process import Job, run_vllm

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 4096
"""Longest prompt and answer together, in tokens, unless the verifier is shorter or the user says otherwise."""


SPEEDS = ("tokens_per_second", "tokens_per_second_without", "speed_up")


@dataclass
class EvaluateArguments(Arguments):
    """Arguments of `peagle-hf evaluate`."""

    model: str = field(
        metadata={
            "aliases": ["--drafter"],
            "help": "The drafter: a checkpoint folder, such as checkpoints/checkpoint_best, or a hub name.",
        }
    )
    suite: list[str] = field(
        metadata={
            "help": "One or more suites of prompts that the drafter has not seen: .jsonl or .json files or hub "
            "datasets with `turns` (Spec-Bench's shape), `messages` or `conversations`; `category` groups them in "
            "the tables.",
            "aliases": ["--prompts"],
        }
    )
    output: str = field(
        metadata={"help": "Folder for evaluation.json, evaluation.html, evaluation.png and vLLM's logs."}
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={"help": "More drafters for the same verifier, run on the same prompts and compared with --model."},
    )
    verifier: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the target; default: the one in the checkpoint."}
    )
    max_prompts: int | None = field(
        default=None, metadata={"help": "Take at most this many of the prompts, evenly from their categories."}
    )
    max_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens; answers end at EOS."})
    num_speculative_tokens: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Tokens to draft at a time, or several such numbers, each measured; the report's own figures are "
            "those of the last. Default: as many as each drafter was trained for."
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; only then are texts compared."})
    seed: int = field(default=0, metadata={"help": "Seed of vLLM and of the bootstrap."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Of both models; auto is float32 on CPU, the verifier's own on GPU. With --endpoint it only tells "
            "the report what the servers run in."
        },
    )
    max_model_len: int | None = field(
        default=None,
        metadata={"help": f"Longest prompt and answer, in tokens; default: {MAX_MODEL_LEN} or the verifier's limit."},
    )
    concurrency: list[int] = field(
        default_factory=lambda: [16],
        metadata={
            "help": "Chats at the same time (default: 16), or several such numbers, each measured in turn; the "
            "report's own figures are those of the last."
        },
    )
    rounds: int = field(
        default=1,
        metadata={
            "help": "How often all is run, in processes of its own each time, without and with the drafters by turns. "
            "Only from 2 rounds on can speeds be called different: the machine's load varies too."
        },
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "A server with the drafter, such as peagle-hf serve starts, to measure instead of vLLM in "
            "processes of its own. Nobody else may use it meanwhile."
        },
    )
    baseline_endpoint: str | None = field(
        default=None,
        metadata={"help": "With --endpoint, a server of the verifier alone to compare with. Default: no comparison."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the verifier."})

    GROUPS: ClassVar = {
        "Input and output": ("model", "compare", "suite", "output", "verifier", "trust_remote_code"),
        "What is measured": (
            "max_prompts",
            "max_tokens",
            "num_speculative_tokens",
            "temperature",
            "concurrency",
            "rounds",
            "seed",
        ),
        "vLLM": ("dtype", "max_model_len", "endpoint", "baseline_endpoint"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.suite:
            raise PeagleError("--suite names no prompts. Name a .jsonl file or a hub dataset.")
        for name in ("concurrency", "num_speculative_tokens"):
            numbers = getattr(self, name)
            if min(numbers, default=1) < 1 or len(set(numbers)) < len(numbers):
                raise PeagleError(f"--{name.replace('_', '-')} takes numbers from 1, each once.")
        if len({self.model, *self.compare}) <= len(self.compare):
            raise PeagleError("--model and --compare name a drafter twice. Name each once.")
        if not self.concurrency:
            raise PeagleError("--concurrency takes numbers from 1, each once.")
        for name in ("rounds", "max_tokens", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PeagleError(f"--{name.replace('_', '-')} takes a number from 1.")
        if self.endpoint is None and self.baseline_endpoint:
            raise PeagleError("--baseline-endpoint is for servers. Name the one with the drafter with --endpoint.")
        if self.endpoint and (self.num_speculative_tokens or self.max_model_len or self.compare):
            raise PeagleError(
                "A server has one drafter, and --num-speculative-tokens and --max-model-len of its own: leave these "
                "and --compare out beside --endpoint, or let peagle-hf evaluate run vLLM itself."
            )

    def command(self) -> str:
        """The command line that says the same."""
        words = ["peagle-hf", "evaluate"]
        for argument in fields(self):
            value, default = getattr(self, argument.name), argument.default
            if argument.default_factory is not MISSING:
                default = argument.default_factory()
            if value != default:
                words.append(f"--{argument.name.replace('_', '-')}")
                words += map(str, value) if isinstance(value, list) else [str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Trial:
    """A drafter that drafts so many tokens at a time, and what came of it.

    Args:
        runs: for each number of chats at a time, by round.
    """

    drafter: str
    num_speculative_tokens: int
    runs: list[list[Run]]


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Run the prompts in vLLM without and with the drafters; write, log and return the report.

    Of a prompt with several turns, each turn follows the answers of the run without a drafter, so that all runs read
    the same text. `evaluation.json` holds the report:

    - `acceptance_length`: tokens per forward pass of the verifier, 1 + accepted tokens / drafts; `acceptance_rate`:
      accepted / drafted tokens; `per_position_acceptance`: accepted at position k / drafts; and the counts behind them.
    - `tokens_per_second`, `tokens_per_second_without`, `speed_up`: generated tokens over wall time, warmed up, the
      median of the rounds. `is_speed_up_or_down`: whether that is a difference; null after one round.
    - `intervals` of all these, [low, high]: see `bootstrap`. Those of speeds hold the intervals of all rounds. Fewer
      than six prompts have none, and acceptance has none where a server doesn't count by request.
    - `by_category`: the same for each kind of prompt; a prompt's share in the wall time is that in the time that all
      prompts together were being answered.
    - `by_concurrency`: acceptance and speed at each number of chats at a time, and `latency_seconds`,
      `latency_seconds_without`: mean, median and p99 from a request to its last token (`request`), to its first
      (`first_token`), and between two later ones on average (`output_token`).
    - `text_identical`, `num_identical`, `differences` (prompt, turn, first token that differs); null if sampled.
    - `others`: all this for each other number of tokens at a time and drafter of `--compare`, with `difference` from
      the report's own figures, or for another drafter from those of `--model` with as many tokens: its `value`,
      `interval` and whether it `is_difference`, which it isn't if the interval holds 0 (for the ratio of speeds: 1).
    - how it was measured: `command`, `num_prompts`, `max_tokens`, `seed`, `dtype`, `device`, `versions` and so on.

    Without a server of the verifier alone all that is compared with it is null.

    Raises:
        PeagleError: vLLM isn't installed or fails, it would load a checkpoint wrongly, or the prompts are malformed;
            a server is dead, serves another model or no drafter, was started anew, or is used by others too.
    """
    verifier = arguments.verifier or str(check_checkpoint(drafter_folder(arguments.model)).verifier_name_or_path)
    drafting = _drafting(arguments, verifier)
    prompts = _load_prompts(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    without: list[list[Run]] | None
    if arguments.endpoint is None:
        without, trials, about = _run_here(arguments, verifier, drafting, prompts)
    else:
        without, trials, about = _run_on_servers(arguments, verifier, drafting, prompts)

    entries = [_entry(trial, without, prompts, arguments) for trial in trials]
    per_drafter = len(trials) // (1 + len(arguments.compare))
    own = per_drafter - 1
    for number, (trial, entry) in enumerate(zip(trials, entries, strict=True)):
        other = own if number < per_drafter else number % per_drafter
        if number != own:
            entry["difference"] = _difference(trial, trials[other], prompts, arguments.seed)
    report = {
        "verifier": verifier,
        "prompts": ", ".join(arguments.suite),
        **entries.pop(own),
        "others": entries,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed if arguments.endpoint is None else None,
        "rounds": arguments.rounds,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": arguments.seed},
        "concurrency": arguments.concurrency[-1],
        "command": arguments.command(),
        **about,
    }
    write_json(output / "evaluation.json", report)
    with atomic_path(output / "evaluation.png") as temporary:
        draw(report, temporary)
    with atomic_path(output / "evaluation.html") as temporary:
        temporary.write_text(html(report), encoding="utf-8")
    logger.info("%s\n\nWritten to %s, with evaluation.html beside it.", text(report), output / "evaluation.json")
    return report


def summarize(counters: Sequence[list[int]]) -> dict[str, Any]:
    """Turn vLLM's counters, summed over the runs, into acceptance.

    Args:
        counters: of each run, drafts, draft tokens, accepted tokens, then accepted tokens by position.
    """
    counts = np.sum(list(counters), axis=0)
    return {
        **{name: values.tolist() for name, values in _rates(counts).items()},
        **dict(zip(("num_drafts", "num_draft_tokens", "num_accepted_tokens"), counts[:3].tolist(), strict=True)),
    }


def _rates(counts: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Acceptance by counts [..., 3 + K]."""
    drafts, drafted, accepted = np.moveaxis(counts[..., :3], -1, 0)
    return {
        "acceptance_length": 1 + accepted / np.maximum(drafts, 1),
        "acceptance_rate": accepted / np.maximum(drafted, 1),
        "per_position_acceptance": counts[..., 3:] / np.maximum(drafts, 1)[..., None],
    }


def _speed(run: Run, indices: list[int], weights_BP: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens a second [B] of these prompts, each as often as a row of weights says.

    A prompt has the share in the wall time that it has in the seconds of all answers, many of which ran side by side.
    """
    tokens = np.array([sum(len(answer.token_ids) for answer in chat) for chat in run.chats])
    in_flight = np.array([sum(answer.seconds for answer in chat) for chat in run.chats])
    seconds = in_flight * (run.seconds / in_flight.sum())
    return (weights_BP @ tokens[indices]) / (weights_BP @ seconds[indices])


def _statistics(
    run: Run, without: Run | None, indices: list[int], weights_BP: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """All that is measured of these prompts, each as often as a row of weights says: [B], by position [B, K]."""
    speed = _speed(run, indices, weights_BP)
    statistics = {"tokens_per_second": speed}
    if run.drafting is not None:
        statistics |= _rates(weights_BP @ np.array(run.drafting)[indices])
    if without is not None:
        baseline = _speed(without, indices, weights_BP)
        statistics |= {"tokens_per_second_without": baseline, "speed_up": speed / baseline}
    return statistics


def _figures(
    runs: list[Run], without: list[Run] | None, prompts: list[Prompt], category: str | None, seed: int
) -> dict[str, Any]:
    """What was measured of a category, or of all prompts, with intervals.

    Args:
        runs: by round; acceptance is that of the first.
        without: the same without a drafter.
    """
    indices, first = _indices(prompts, category), runs[0]
    if first.drafting is not None:
        counters = [first.drafting[index] for index in indices]
    else:
        counters = [counted for name, counted in (first.counters or {}).items() if category in (None, name)]
    pairs: list[tuple[Run, Run | None]]
    pairs = list(zip(runs, without, strict=True)) if without else [(run, None) for run in runs]
    once = np.ones((1, len(indices)), np.int64)
    measured = [_statistics(run, baseline, indices, once) for run, baseline in pairs]
    intervals = {}
    if len(indices) >= MIN_PROMPTS:
        resamples = resample(len(indices), seed)
        spread = [_statistics(run, baseline, indices, resamples) for run, baseline in pairs]
        intervals = {name: interval(values) for name, values in spread[0].items()}
        intervals |= {name: _over_rounds([each[name] for each in spread]) for name in SPEEDS if name in intervals}
    return {
        "num_prompts": len(indices),
        **summarize(counters),
        **{
            name: float(np.median([each[name] for each in measured])) if name in measured[0] else None
            for name in SPEEDS
        },
        "is_speed_up_or_down": is_difference(intervals.get("speed_up"), 1) if len(runs) > 1 else None,
        "intervals": intervals,
    }


def _over_rounds(values: list[NDArray[np.float64]]) -> list[float]:
    """The interval that holds those of all rounds."""
    lows, highs = zip(*map(interval, values), strict=True)
    return [min(lows), max(highs)]


def _entry(
    trial: Trial, without: list[list[Run]] | None, prompts: list[Prompt], arguments: EvaluateArguments
) -> dict[str, Any]:
    """What the report says of a trial."""
    pairs: list[tuple[list[Run], list[Run] | None]]
    pairs = list(zip(trial.runs, without, strict=True)) if without else [(runs, None) for runs in trial.runs]
    last, baseline = pairs[-1]
    categories = sorted({prompt.category for prompt in prompts})
    return {
        "drafter": trial.drafter,
        "drafter_weights": weights_of(drafter_folder(trial.drafter)),
        "num_speculative_tokens": trial.num_speculative_tokens,
        **_figures(last, baseline, prompts, None, arguments.seed),
        **_compare(prompts, baseline[0] if baseline else None, last[0], greedy=arguments.temperature == 0),
        "by_category": {name: _figures(last, baseline, prompts, name, arguments.seed) for name in categories},
        "by_concurrency": [
            {
                "concurrency": runs[0].concurrency,
                **_figures(runs, others, prompts, None, arguments.seed),
                "latency_seconds": runs[0].latency(),
                "latency_seconds_without": others and others[0].latency(),
            }
            for runs, others in pairs
        ],
    }


def _difference(trial: Trial, other: Trial, prompts: list[Prompt], seed: int) -> dict[str, Any]:
    """How much more a trial accepts than another, and how many times as fast it is, by the same resamples."""

    def acceptance_length(category: str | None) -> dict[str, Any]:
        indices = _indices(prompts, category)
        one, reference = (np.array(each.runs[-1][0].drafting)[indices] for each in (trial, other))

        def difference(weights_BP: NDArray[np.int64]) -> NDArray[np.float64]:
            return _rates(weights_BP @ one)["acceptance_length"] - _rates(weights_BP @ reference)["acceptance_length"]

        spread = interval(difference(resample(len(indices), seed))) if len(indices) >= MIN_PROMPTS else None
        value = difference(np.ones((1, len(indices)), np.int64)).item()
        return {"value": value, "interval": spread, "is_difference": is_difference(spread, 0)}

    def speed_ratio(runs: list[Run], references: list[Run]) -> dict[str, Any]:
        indices = _indices(prompts, None)

        def ratios(weights_BP: NDArray[np.int64]) -> list[NDArray[np.float64]]:
            pairs = zip(runs, references, strict=True)
            return [
                _speed(run, indices, weights_BP) / _speed(reference, indices, weights_BP) for run, reference in pairs
            ]

        spread = _over_rounds(ratios(resample(len(indices), seed))) if len(indices) >= MIN_PROMPTS else None
        value = float(np.median(ratios(np.ones((1, len(indices)), np.int64))))
        known = is_difference(spread, 1) if len(runs) > 1 else None
        return {"value": value, "interval": spread, "is_difference": known}

    return {
        "from": {"drafter": other.drafter, "num_speculative_tokens": other.num_speculative_tokens},
        "acceptance_length": acceptance_length(None),
        "by_category": {
            category: acceptance_length(category) for category in sorted({prompt.category for prompt in prompts})
        },
        "by_concurrency": [
            {"concurrency": runs[0].concurrency, "tokens_per_second_ratio": speed_ratio(runs, references)}
            for runs, references in zip(trial.runs, other.runs, strict=True)
        ],
    }


def _indices(prompts: list[Prompt], category: str | None) -> list[int]:
    return [index for index, prompt in enumerate(prompts) if category in (None, prompt.category)]


def _compare(prompts: list[Prompt], without: Run | None, drafted: Run, greedy: bool) -> dict[str, Any]:
    """Where each prompt's tokens differ for the first time; turns and tokens count from 0."""
    if not greedy or without is None:
        return {"text_identical": None, "num_identical": None, "differences": None}
    differences = []
    for prompt, chat, other in zip(prompts, without.chats, drafted.chats, strict=True):
        for turn, (answer, drafted_answer) in enumerate(zip(chat, other, strict=True)):
            one, two = answer.token_ids, drafted_answer.token_ids
            if one != two:
                pairs = enumerate(zip(one, two, strict=False))
                token = next((place for place, (here, there) in pairs if here != there), min(len(one), len(two)))
                differences.append({"id": prompt.id, "turn": turn, "token": token})
                break
    return {
        "text_identical": not differences,
        "num_identical": len(prompts) - len(differences),
        "differences": differences,
    }


def _load_prompts(arguments: EvaluateArguments) -> list[Prompt]:
    """The prompts of all suites, one of each category in turn, so that no category has a time of its own.

    Where there are several suites, prompts and categories are named after theirs.
    """
    names = [Path(suite).stem if is_local_file(suite) else suite for suite in arguments.suite]
    if len(set(names)) < len(names):
        raise PeagleError(f"Two suites go by one name: {', '.join(arguments.suite)}. Rename a file.")
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    for suite, name in zip(arguments.suite, names, strict=True):
        dropped: list[dict[str, str]] = []
        prompts = read_prompts(suite, dropped)
        for drop in dropped:
            logger.warning("%s is left out: %s.", drop["place"], drop["reason"])
        if not prompts:
            raise PeagleError(f"{suite} holds no prompt that can be run. Name a file with user turns.")
        prefix = f"{name}/" if len(names) > 1 else ""
        for prompt in prompts:
            category = prefix + prompt.category
            by_category[category].append(replace(prompt, id=prefix + prompt.id, category=category))
    in_turn = chain.from_iterable(zip_longest(*by_category.values()))
    return [prompt for prompt in in_turn if prompt is not None][: arguments.max_prompts]


@dataclass(frozen=True)
class Drafting:
    """A drafter and what vLLM must be told of it (see `serving.speculative_config`)."""

    drafter: str
    folder: Path
    config: dict[str, Any]


def _drafting(arguments: EvaluateArguments, verifier: str) -> list[Drafting]:
    """All that is to be tried, drafter by drafter; those of `--model` first."""
    drafting = []
    for drafter in (arguments.model, *arguments.compare):
        folder = drafter_folder(drafter)
        config = check_checkpoint(folder, verifier, arguments.trust_remote_code)
        for number in arguments.num_speculative_tokens or [config.num_depths]:
            drafting.append(Drafting(drafter, folder, speculative_config(folder, config, number)))
    return drafting


def _run_on_servers(
    arguments: EvaluateArguments, verifier: str, drafting: list[Drafting], prompts: list[Prompt]
) -> tuple[list[list[Run]] | None, list[Trial], dict[str, Any]]:
    """Measure servers that run already, at each number of chats at a time first that without the drafter."""
    assert arguments.endpoint is not None
    client = Client(arguments.endpoint)
    baseline = Client(arguments.baseline_endpoint) if arguments.baseline_endpoint else None
    # vLLM that is started with a drafter alone goes by the drafter's name.
    names = {place(name) for name in (verifier, arguments.model, str(drafting[0].folder))}
    for server in filter(None, (client, baseline)):
        if names.isdisjoint(place(name) for name in server.model.values()):
            raise PeagleError(
                f"The vLLM server {server.url} runs {server.model['root']}, wanted is {verifier}. Start it with that "
                "model, or name the right endpoint."
            )
    counters = client.counters().drafting
    if not counters:
        raise PeagleError(f"{client.url} serves no drafter. Start it with peagle-hf serve {arguments.model}.")
    if baseline and baseline.counters().drafting:
        raise PeagleError(
            f"{baseline.url} drafts too, so there is nothing to compare with. Start one for --baseline-endpoint with "
            f"vllm serve {verifier}."
        )
    about = {
        "dtype": "a dtype not known" if arguments.dtype == "auto" else arguments.dtype,
        "device": "a vLLM server",
        "versions": {"peagle_hf": __version__, "vllm": client.version()},
    }
    by_category = client.ask([{"role": "user", "content": prompts[0].turns[0]}], max_tokens=2).drafting is None
    if by_category:
        logger.warning(
            "%s doesn't count by request, so acceptance gets no intervals, and the categories are run one by one. "
            "Start it with peagle-hf serve, or with --per-request-spec-decode-metrics summary.",
            client.url,
        )
    drafted: list[list[Run]] = [[] for _ in arguments.concurrency]
    without: list[list[Run]] = [[] for _ in arguments.concurrency]
    number = arguments.rounds * len(arguments.concurrency) * len(prompts) * (2 if baseline else 1)
    with tqdm(total=number, unit="prompt") as progress:

        def ask(server: Client, given: list[list[str]] | None, concurrency: int) -> Run:
            return measure(
                server,
                prompts,
                given,
                arguments.max_tokens,
                arguments.temperature,
                concurrency,
                progress.update,
                by_category,
            )

        for _ in range(arguments.rounds):
            for index, concurrency in enumerate(arguments.concurrency):
                given = None
                if baseline:
                    without[index].append(ask(baseline, None, concurrency))
                    given = without[index][-1].texts
                drafted[index].append(ask(client, given, concurrency))
    trial = Trial(arguments.model, len(counters) - len(DRAFT_COUNTERS), drafted)
    return without if baseline else None, [trial], about


def _run_here(
    arguments: EvaluateArguments, verifier: str, drafting: list[Drafting], prompts: list[Prompt]
) -> tuple[list[list[Run]], list[Trial], dict[str, Any]]:
    """Run vLLM in processes of its own, first without a drafter."""
    environment, output = vllm_environment(), Path(arguments.output)
    job = Job(
        _engine_arguments(arguments, verifier),
        prompts,
        arguments.concurrency,
        arguments.max_tokens,
        arguments.temperature,
    )
    without: list[list[Run]] = [[] for _ in job.concurrency]
    trials = [
        Trial(tried.drafter, tried.config["num_speculative_tokens"], [[] for _ in job.concurrency])
        for tried in drafting
    ]
    for number_of_round in range(1, arguments.rounds + 1):
        suffix = f"_round_{number_of_round}.log" if arguments.rounds > 1 else ".log"
        baseline, about = run_vllm(job, environment, output / f"vllm_without_drafter{suffix}", "without the drafter")
        _append(without, baseline)
        for number, (tried, trial) in enumerate(zip(drafting, trials, strict=True), start=1):
            drafts = replace(
                job, engine=job.engine | {"speculative_config": tried.config}, answers=[run.texts for run in baseline]
            )
            log = "vllm_with_drafter" if len(drafting) == 1 else f"vllm_with_drafter_{number}"
            runs, about = run_vllm(drafts, environment, output / f"{log}{suffix}", "with the drafter")
            _append(trial.runs, runs)
    return without, trials, about


def _append(rounds: list[list[Run]], runs: list[Run]) -> None:
    """Add a round to the runs at each number of chats at a time."""
    for so_far, run in zip(rounds, runs, strict=True):
        so_far.append(run)


def _engine_arguments(arguments: EvaluateArguments, verifier: str) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    config = load_verifier_config(verifier, trust_remote_code=arguments.trust_remote_code)
    limit = getattr(config, "max_position_embeddings", MAX_MODEL_LEN)
    return {
        "model": verifier,
        "trust_remote_code": arguments.trust_remote_code,
        "dtype": "float32" if arguments.dtype == "auto" and not on_gpu else arguments.dtype,
        "seed": arguments.seed,
        "max_model_len": arguments.max_model_len or min(MAX_MODEL_LEN, limit),
        "max_num_seqs": max(arguments.concurrency),
        "enforce_eager": not on_gpu,  # compiling for a CPU takes longer than it saves
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
