"""Acceptance and speed of a drafter in real vLLM, and whether the text stays the same with it.

vLLM runs twice on the same prompts, without and with the drafter, each time in a fresh child process: memory is given
back in between, and a crash in there is a message here. `python -m peagle_hf.evaluation` is that child: it reads its
job as JSON from standard input and answers in lines of JSON.
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

from .data.regenerate import Prompt, read_prompts
from .errors import PeagleError
from .files import atomic_path, write_json
from .serving import check_checkpoint, speculative_config, vllm_environment
from .target import load_verifier_config

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 4096
"""Longest prompt and answer together, in tokens, unless the verifier is shorter or the user says otherwise."""

_COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
_PER_POSITION = "num_accepted_tokens_per_pos"


@dataclass
class EvaluateArguments:
    """Arguments of `peagle-hf evaluate`."""

    model: str = field(metadata={"help": "The drafter: a checkpoint folder, such as checkpoints/checkpoint_best."})
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
        default="auto", metadata={"help": "Of both models; auto is float32 on CPU, the verifier's own on GPU."}
    )
    max_model_len: int | None = field(
        default=None,
        metadata={"help": f"Longest prompt and answer, in tokens; default: {MAX_MODEL_LEN} or the verifier's limit."},
    )
    concurrency: int = field(default=16, metadata={"help": "Requests that vLLM answers at the same time."})


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

    Raises:
        PeagleError: vLLM isn't installed or fails, it would load the checkpoint wrongly, or the prompts are malformed.
    """
    environment = vllm_environment()
    stored_verifier = check_checkpoint(arguments.model).verifier_name_or_path
    verifier = arguments.verifier or stored_verifier
    assert verifier is not None  # checked just above
    config = check_checkpoint(arguments.model, verifier)
    prompts = _load_prompts(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    engine = _engine_arguments(arguments, verifier)
    job = {
        "engine": engine,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "prompts": [asdict(prompt) for prompt in prompts],
    }
    without = _run(job, environment, output / "vllm_without_drafter.log")
    drafting = speculative_config(arguments.model, config, arguments.num_speculative_tokens)
    job |= {"engine": engine | {"speculative_config": drafting}, "answers": without["texts"]}
    drafted = _run(job, environment, output / "vllm_with_drafter.log")

    report = {
        "drafter": str(arguments.model),
        "verifier": verifier,
        "num_speculative_tokens": drafting["num_speculative_tokens"],
        "prompts": arguments.prompts,
        "num_prompts": len(prompts),
        **summarize(drafted["counters"].values()),
        "tokens_per_second": drafted["num_tokens"] / drafted["seconds"],
        "tokens_per_second_without": without["num_tokens"] / without["seconds"],
        **_compare(prompts, without, drafted, greedy=arguments.temperature == 0),
        "by_category": {
            category: {"num_prompts": sum(prompt.category == category for prompt in prompts), **summarize([counters])}
            for category, counters in drafted["counters"].items()
        },
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "concurrency": arguments.concurrency,
        "dtype": drafted["dtype"],
        "device": drafted["device"],
        "versions": drafted["versions"],
    }
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

    names, values = ("Without drafter", "With drafter"), ("tokens_per_second_without", "tokens_per_second")
    bars = speed.bar(names, [report[value] for value in values], color=["#9aa5b1", "#3b6ea8"], width=0.6)
    speed.bar_label(bars, fmt="%.1f", padding=2)
    speed.set(ylabel="Tokens a second", ylim=(0, max(report[value] for value in values) * 1.15))
    for axes in (acceptance, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def _speed_sentence(report: dict[str, Any]) -> str:
    speed, speed_without = report["tokens_per_second"], report["tokens_per_second_without"]
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
        return "Text: sampled, so it isn't compared."
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


def _compare(prompts: list[Prompt], without: dict[str, Any], drafted: dict[str, Any], greedy: bool) -> dict[str, Any]:
    """Where each prompt's tokens differ for the first time; turns and tokens count from 0."""
    if not greedy:
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


def _engine_arguments(arguments: EvaluateArguments, verifier: str) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    limit = getattr(load_verifier_config(verifier), "max_position_embeddings", MAX_MODEL_LEN)
    return {
        "model": verifier,
        "dtype": "float32" if arguments.dtype == "auto" and not on_gpu else arguments.dtype,
        "seed": arguments.seed,
        "max_model_len": arguments.max_model_len or min(MAX_MODEL_LEN, limit),
        "max_num_seqs": arguments.concurrency,
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

    from . import __version__

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
    """Drafts, draft tokens, accepted tokens, accepted tokens by position; nothing of it without a drafter."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if f"vllm:spec_decode_{_COUNTERS[0]}" not in metrics:
        return []
    counts = [metrics[f"vllm:spec_decode_{name}"].value for name in _COUNTERS]
    return counts + metrics[f"vllm:spec_decode_{_PER_POSITION}"].values


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
