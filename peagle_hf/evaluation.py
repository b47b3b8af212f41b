"""Acceptance and speed of a drafter in real vLLM, and whether the text stays the same with it.

The prompts are given to servers that run already, or vLLM is run on them twice, without and with the drafter, each time
in a fresh child process: memory is given back in between, and a crash in there is a message here.
`python -m peagle_hf.evaluation` is that child: it reads its job as JSON from standard input and answers in lines of
JSON.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

import torch
from tqdm import tqdm

from . import __version__
from .client import DRAFT_COUNTERS, POSITION_COUNTER, Client, measure
from .data.cache import place
from .data.prompts import Prompt, read_prompts
from .errors import PeagleError
from .files import atomic_path, write_json
from .serving import check_checkpoint, drafter_folder, speculative_config, vllm_environment
from .target import load_verifier_config

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 4096
"""Longest prompt and answer together, in tokens, unless the verifier is shorter or the user says otherwise."""


@dataclass
class EvaluateArguments:
    """Arguments of `peagle-hf evaluate`."""

    model: str = field(
        metadata={"help": "The drafter: a checkpoint folder, such as checkpoints/checkpoint_best, or a hub name."}
    )
    prompts: str = field(
        metadata={
            "help": "Prompts that the drafter has not seen: a .jsonl or .json file or a hub dataset with `turns` "
            "(Spec-Bench's shape), `messages` or `conversations`; `category` groups them in the table."
        }
    )
    output: str = field(metadata={"help": "Folder for evaluation.json, evaluation.png and vLLM's logs."})
    verifier: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the target; default: the one in the checkpoint."}
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Take at most this many of the prompts."})
    max_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens; answers end at EOS."})
    num_speculative_tokens: int | None = field(
        default=None, metadata={"help": "Tokens to draft at a time; default: as many as it was trained for."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; only then are texts compared."})
    seed: int = field(default=0, metadata={"help": "Seed of vLLM."})
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
            "help": "Requests that vLLM answers at the same time (default: 16). With --endpoint also several such "
            "numbers, each measured in turn; the report's own figures are those of the last."
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

    def __post_init__(self) -> None:
        if min(self.concurrency, default=0) < 1:
            raise PeagleError("--concurrency takes numbers from 1.")
        if self.endpoint is None and (self.baseline_endpoint or len(self.concurrency) > 1):
            raise PeagleError(
                "--baseline-endpoint and several numbers of --concurrency are for servers. Name one with --endpoint."
            )
        if self.endpoint and (self.num_speculative_tokens or self.max_model_len):
            raise PeagleError(
                "--num-speculative-tokens and --max-model-len are the server's own: leave them out beside --endpoint, "
                "and start the server with them."
            )


@dataclass(frozen=True)
class Run:
    """What was measured at one number of requests at a time (see `_measure`); `without` is None if it wasn't."""

    concurrency: int
    drafted: dict[str, Any]
    without: dict[str, Any] | None


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Run the prompts in vLLM without and with the drafter; write, log and return the report.

    The prompts of one category run together. Of a prompt with several turns, each turn follows the answers of the run
    without the drafter, so that both runs read the same text. `evaluation.json` holds the report:

    - `acceptance_length`: tokens per forward pass of the verifier, 1 + accepted tokens / drafts; `acceptance_rate`:
      accepted / drafted tokens; `per_position_acceptance`: accepted at position k / drafts; and the counts behind them.
    - `by_category`: the same for each kind of prompt.
    - `tokens_per_second`, `tokens_per_second_without`: generated tokens over wall time, warmed up.
    - `text_identical`, `num_identical`, `differences` (prompt, turn, first token that differs); null if sampled.
    - how it was measured: `num_prompts`, `max_tokens`, `seed`, `dtype`, `device`, `versions` and so on.
    - of servers `by_concurrency`: acceptance and speed at each, and `latency_seconds`, `latency_seconds_without`: mean,
      median and p99 from a request to its last token (`request`), to its first (`first_token`), and between two later
      ones on average (`output_token`). Without a server of the verifier alone all that is compared is null.

    Raises:
        PeagleError: vLLM isn't installed or fails, it would load the checkpoint wrongly, or the prompts are malformed;
            a server is dead, serves another model or no drafter, was started anew, or is used by others too.
    """
    folder = drafter_folder(arguments.model)
    verifier = arguments.verifier or str(check_checkpoint(folder).verifier_name_or_path)
    config = check_checkpoint(folder, verifier)
    prompts = _load_prompts(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.endpoint is None:
        drafting = speculative_config(folder, config, arguments.num_speculative_tokens)
        runs = [_run_here(arguments, verifier, drafting, prompts)]
    else:
        runs = _run_on_servers(arguments, verifier, folder, prompts)

    last = runs[-1]
    figures = _figures(last)
    report = {
        "drafter": str(arguments.model),
        "verifier": verifier,
        "num_speculative_tokens": len(figures["per_position_acceptance"]),
        "prompts": arguments.prompts,
        "num_prompts": len(prompts),
        **figures,
        **_compare(prompts, last.without, last.drafted, greedy=arguments.temperature == 0),
        "by_category": {
            category: {"num_prompts": sum(prompt.category == category for prompt in prompts), **summarize([counters])}
            for category, counters in last.drafted["counters"].items()
        },
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed if arguments.endpoint is None else None,
        "concurrency": last.concurrency,
        "dtype": last.drafted["dtype"],
        "device": last.drafted["device"],
        "versions": last.drafted["versions"],
    }
    if arguments.endpoint is not None:
        report["by_concurrency"] = [
            {
                "concurrency": run.concurrency,
                **_figures(run),
                "latency_seconds": run.drafted["latency_seconds"],
                "latency_seconds_without": run.without and run.without["latency_seconds"],
            }
            for run in runs
        ]
    write_json(output / "evaluation.json", report)
    with atomic_path(output / "evaluation.png") as temporary:
        draw(report, temporary)
    logger.info("%s\n\nWritten to %s and evaluation.png beside it.", table(report), output / "evaluation.json")
    return report


def summarize(counters: Sequence[list[int]]) -> dict[str, Any]:
    """Turn vLLM's counters, summed over the runs, into acceptance.

    Args:
        counters: of each run, drafts, draft tokens, accepted tokens, then accepted tokens by position.
    """
    drafts, drafted, accepted, *by_position = (sum(values) for values in zip(*counters, strict=True))
    return {
        "acceptance_length": 1 + accepted / max(drafts, 1),
        "acceptance_rate": accepted / max(drafted, 1),
        "per_position_acceptance": [count / max(drafts, 1) for count in by_position],
        "num_drafts": drafts,
        "num_draft_tokens": drafted,
        "num_accepted_tokens": accepted,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    positions = " ".join(f"{rate:6.1%}" for rate in report["per_position_acceptance"])
    lines = [
        f"Drafter            {report['drafter']}, {report['num_speculative_tokens']} tokens at a time",
        f"Verifier           {report['verifier']}, {report['dtype']} on {report['device']}",
        f"Measured           {report['num_prompts']} prompts, at most {report['max_tokens']} tokens each; {versions}",
        "",
        f"Acceptance length  {report['acceptance_length']:6.3f}",
        f"Acceptance rate    {report['acceptance_rate']:6.1%}",
        f"By position        {positions}",
        "",
        f"{'Category':<20} Prompts  Acceptance length  Acceptance rate",
        *(
            f"{name:<20} {row['num_prompts']:>7}  {row['acceptance_length']:>17.3f}  {row['acceptance_rate']:>15.1%}"
            for name, row in report["by_category"].items()
        ),
        "",
        *_latency_lines(report),
        _speed_sentence(report),
        _text_sentence(report),
    ]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the report as a PNG: acceptance by position, and tokens a second with and without the drafter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(f"{Path(report['verifier']).name}: acceptance length {report['acceptance_length']:.2f}")
    acceptance, speed = figure.subplots(1, 2, width_ratios=(3, 2))

    rates = [100 * rate for rate in report["per_position_acceptance"]]
    bars = acceptance.bar([str(position + 1) for position in range(len(rates))], rates, color="#3b6ea8")
    acceptance.bar_label(bars, fmt="%.1f%%", padding=2)
    acceptance.set(xlabel="Draft position", ylabel="Accepted, % of drafts", ylim=(0, max(*rates, 1) * 1.15))

    rows = report.get("by_concurrency", [report])
    kinds = [
        ("Without drafter", "tokens_per_second_without", "#9aa5b1"),
        ("With drafter", "tokens_per_second", "#3b6ea8"),
    ]
    kinds = [kind for kind in kinds if report[kind[1]] is not None]
    for number, (label, name, colour) in enumerate(kinds):
        places = [place + (number - (len(kinds) - 1) / 2) * 0.4 for place in range(len(rows))]
        bars = speed.bar(places, [row[name] for row in rows], color=colour, width=0.4, label=label)
        speed.bar_label(bars, fmt="%.1f", padding=2)
    speed.set_xticks(range(len(rows)), [str(row["concurrency"]) for row in rows])
    speed.set(xlabel="Requests at a time", ylabel="Tokens a second")
    speed.margins(y=0.15)
    speed.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in (acceptance, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def _latency_lines(report: dict[str, Any]) -> list[str]:
    """Speed by the number of requests at a time, where servers were measured."""
    if "by_concurrency" not in report:
        return []

    def line(row: dict[str, Any], drafter: str, suffix: str) -> str:
        times = row[f"latency_seconds{suffix}"]
        cells = [_three(times["request"], 1), _three(times["first_token"], 1), _three(times["output_token"], 1000)]
        speed = row[f"tokens_per_second{suffix}"]
        return f"{row['concurrency']:>9}  {drafter:<7}  {speed:>8.1f}  {'  '.join(cells)}"

    return [
        f"{'Requests':>9}  {'':<7}  {'':>8}  {'Request, s':<23}  {'To first token, s':<23}  {'Between tokens, ms':<23}",
        f"at a time  Drafter  Tokens/s  {'  '.join(['   mean  median     p99'] * 3)}",
        *(
            line(row, drafter, suffix)
            for row in report["by_concurrency"]
            for drafter, suffix in (("without", "_without"), ("with", ""))
            if row[f"tokens_per_second{suffix}"] is not None
        ),
        "",
    ]


def _three(times: dict[str, float] | None, scale: float) -> str:
    if times is None:
        return " " * 23
    return f"{scale * times['mean']:7.3f} {scale * times['median']:7.3f} {scale * times['p99']:7.3f}"


def _speed_sentence(report: dict[str, Any]) -> str:
    speed, speed_without = report["tokens_per_second"], report["tokens_per_second_without"]
    if speed_without is None:
        return f"Speed: {speed:.1f} tokens/s with the drafter; without it wasn't measured."
    sentence = (
        f"Speed: {speed:.1f} tokens/s with the drafter, {speed_without:.1f} without: {speed / speed_without:.2f}x."
    )
    if speed < speed_without:
        sentence += (
            " The drafter slows vLLM down here: drafting and verifying "
            f"{report['num_speculative_tokens']} tokens costs time, on a CPU most of all, and too few are accepted."
        )
    return sentence


def _text_sentence(report: dict[str, Any]) -> str:
    if report["text_identical"] is None:
        return "Text: not compared, because it is sampled or was only generated with the drafter."
    if report["text_identical"]:
        return f"Text: identical with and without the drafter for all {report['num_prompts']} prompts."
    places = [f"{place['id']} (turn {place['turn']}, token {place['token']})" for place in report["differences"]]
    hint = (
        "" if report["dtype"] == "float32" else f" Near-ties fall either way in {report['dtype']}: try --dtype float32."
    )
    return (
        f"Text: DIFFERENT with the drafter for {report['num_prompts'] - report['num_identical']} of "
        f"{report['num_prompts']} prompts: {', '.join(places)}.{hint}"
    )


def _figures(run: Run) -> dict[str, Any]:
    return {
        **summarize(run.drafted["counters"].values()),
        "tokens_per_second": run.drafted["num_tokens"] / run.drafted["seconds"],
        "tokens_per_second_without": run.without and run.without["num_tokens"] / run.without["seconds"],
    }


def _compare(
    prompts: list[Prompt], without: dict[str, Any] | None, drafted: dict[str, Any], greedy: bool
) -> dict[str, Any]:
    """Where each prompt's tokens differ for the first time; turns and tokens count from 0."""
    if not greedy or without is None:
        return {"text_identical": None, "num_identical": None, "differences": None}
    differences = []
    for prompt, answers, others in zip(prompts, without["token_ids"], drafted["token_ids"], strict=True):
        turn = next((turn for turn, answer in enumerate(answers) if answer != others[turn]), None)
        if turn is not None:
            pairs = enumerate(zip(answers[turn], others[turn], strict=False))
            shorter = min(len(answers[turn]), len(others[turn]))
            token = next((place for place, (one, other) in pairs if one != other), shorter)
            differences.append({"id": prompt.id, "turn": turn, "token": token})
    return {
        "text_identical": not differences,
        "num_identical": len(prompts) - len(differences),
        "differences": differences,
    }


def _load_prompts(arguments: EvaluateArguments) -> list[Prompt]:
    dropped: list[dict[str, str]] = []
    prompts = read_prompts(arguments.prompts, dropped)[: arguments.max_prompts]
    for drop in dropped:
        logger.warning("%s is left out: %s.", drop["id"], drop["reason"])
    if not prompts:
        raise PeagleError(f"{arguments.prompts} holds no prompt that can be run. Name a file with user turns.")
    return sorted(prompts, key=lambda prompt: prompt.category)


def _run_on_servers(arguments: EvaluateArguments, verifier: str, folder: Path, prompts: list[Prompt]) -> list[Run]:
    """Measure servers that run already, at each number of requests at a time; first that without the drafter."""
    assert arguments.endpoint is not None
    client = Client(arguments.endpoint)
    baseline = Client(arguments.baseline_endpoint) if arguments.baseline_endpoint else None
    # vLLM that is started with a drafter alone goes by the drafter's name.
    names = {place(name) for name in (verifier, arguments.model, str(folder))}
    for server in filter(None, (client, baseline)):
        if names.isdisjoint(place(name) for name in server.model.values()):
            raise PeagleError(
                f"The vLLM server {server.url} runs {server.model['root']}, wanted is {verifier}. Start it with that "
                "model, or name the right endpoint."
            )
    if not client.counters().drafting:
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
    runs = []
    with tqdm(total=len(arguments.concurrency) * len(prompts) * (2 if baseline else 1), unit="prompt") as progress:

        def answers_of(server: Client, given: list[list[str]] | None, concurrency: int) -> dict[str, Any]:
            return about | measure(
                server, prompts, given, arguments.max_tokens, arguments.temperature, concurrency, progress.update
            )

        for concurrency in arguments.concurrency:
            without = answers_of(baseline, None, concurrency) if baseline else None
            drafted = answers_of(client, without["texts"] if without else None, concurrency)
            runs.append(Run(concurrency, drafted, without))
    return runs


def _run_here(arguments: EvaluateArguments, verifier: str, drafting: dict[str, Any], prompts: list[Prompt]) -> Run:
    """Run vLLM in processes of its own, first without the drafter."""
    environment, engine = vllm_environment(), _engine_arguments(arguments, verifier)
    job = {
        "engine": engine,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "prompts": [asdict(prompt) for prompt in prompts],
    }
    without = _run(job, environment, Path(arguments.output) / "vllm_without_drafter.log")
    job |= {"engine": engine | {"speculative_config": drafting}, "answers": without["texts"]}
    return Run(
        arguments.concurrency[0], _run(job, environment, Path(arguments.output) / "vllm_with_drafter.log"), without
    )


def _engine_arguments(arguments: EvaluateArguments, verifier: str) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    limit = getattr(load_verifier_config(verifier), "max_position_embeddings", MAX_MODEL_LEN)
    return {
        "model": verifier,
        "dtype": "float32" if arguments.dtype == "auto" and not on_gpu else arguments.dtype,
        "seed": arguments.seed,
        "max_model_len": arguments.max_model_len or min(MAX_MODEL_LEN, limit),
        "max_num_seqs": arguments.concurrency[0],
        "enforce_eager": not on_gpu,  # compiling for a CPU takes longer than it saves
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }


def _run(job: dict[str, Any], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run vLLM on a job in a child process (see `_measure`); what vLLM says goes into `log`."""
    command = [sys.executable, "-m", __name__]
    what = "with" if "speculative_config" in job["engine"] else "without"
    result = None
    with (
        open(log, "w+", encoding="utf-8", errors="replace") as log_file,
        tempfile.TemporaryFile("w+", encoding="utf-8") as job_file,
        tqdm(total=len(job["prompts"]), desc=f"vLLM {what} the drafter", unit="prompt") as progress,
    ):
        json.dump(job, job_file)
        job_file.seek(0)
        environment = environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with subprocess.Popen(
            command, env=environment, stdin=job_file, stdout=subprocess.PIPE, stderr=log_file, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    message = json.loads(line)
                    if "error" in message:
                        raise PeagleError(message["error"])
                    progress.update(message.get("done", 0))
                    result = message.get("result")
            finally:
                process.kill()
        if result is None:
            log_file.seek(0)
            logger.error("%s", "".join(log_file.readlines()[-30:]))
            raise PeagleError(
                f"vLLM failed {what} the drafter (exit status {process.returncode}); the end of what it said is above, "
                f"all of it in {log}. Where memory ran out, lower --concurrency or --max-model-len."
            )
    return result


def _measure(job: dict[str, Any], report_progress: Callable[[int], None]) -> dict[str, Any]:
    """Run vLLM in this process on all prompts, category by category and in each turn by turn.

    Gives `texts` and `token_ids` of each prompt's answers by turn, `counters` by category (see `summarize`),
    `num_tokens` and `seconds` of generation, and what it ran on.
    """
    import transformers
    import vllm

    llm = vllm.LLM(**job["engine"])
    tokenizer = llm.get_tokenizer()
    sampling = vllm.SamplingParams(temperature=job["temperature"], max_tokens=job["max_tokens"])
    prompts = [Prompt(**prompt) for prompt in job["prompts"]]
    answers_given = job.get("answers")
    texts: list[list[str]] = [[] for _ in prompts]
    token_ids: list[list[list[int]]] = [[] for _ in prompts]

    def inputs(index: int, turn: int) -> dict[str, list[int]]:
        prompt, answers = prompts[index], texts[index] if answers_given is None else answers_given[index]
        messages = list(prompt.system)
        for said, answer in zip(prompt.turns[:turn], answers[:turn], strict=True):
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": prompt.turns[turn]})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) + job["max_tokens"] > job["engine"]["max_model_len"]:
            raise PeagleError(
                f"Turn {turn} of prompt {prompt.id} has {len(ids)} tokens; with an answer of {job['max_tokens']} that "
                f"is more than --max-model-len {job['engine']['max_model_len']}. Raise it, or take the prompt out."
            )
        return {"prompt_token_ids": ids}

    llm.generate(inputs(0, 0), vllm.SamplingParams(temperature=job["temperature"], max_tokens=8), use_tqdm=False)
    counters, num_tokens, seconds = {}, 0, 0.0
    for category, group in groupby(range(len(prompts)), key=lambda index: prompts[index].category):
        indices = list(group)
        before = _read_counters(llm)
        for turn in range(max(len(prompts[index].turns) for index in indices)):
            asked = [index for index in indices if turn < len(prompts[index].turns)]
            batch = [inputs(index, turn) for index in asked]
            started = time.perf_counter()
            outputs = llm.generate(batch, sampling, use_tqdm=False)
            seconds += time.perf_counter() - started
            for index, output in zip(asked, outputs, strict=True):
                texts[index].append(output.outputs[0].text)
                token_ids[index].append(list(output.outputs[0].token_ids))
                num_tokens += len(output.outputs[0].token_ids)
        counters[category] = [after - earlier for after, earlier in zip(_read_counters(llm), before, strict=True)]
        report_progress(len(indices))

    on_gpu = torch.cuda.is_available()
    return {
        "texts": texts,
        "token_ids": token_ids,
        "counters": counters,
        "num_tokens": num_tokens,
        "seconds": seconds,
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "peagle_hf": __version__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _read_counters(llm: Any) -> list[int]:
    """See `client.Counters.drafting`."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if f"vllm:{DRAFT_COUNTERS[0]}" not in metrics:
        return []
    counts = [metrics[f"vllm:{name}"].value for name in DRAFT_COUNTERS]
    return counts + metrics[f"vllm:{POSITION_COUNTER}"].values


def _main() -> None:
    # Whatever libraries print goes to standard error, so that standard output carries nothing but messages.
    channel: IO[str] = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(**message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    try:
        send(result=_measure(json.load(sys.stdin), lambda count: send(done=count)))
    except PeagleError as error:
        send(error=str(error))


if __name__ == "__main__":
    _main()
