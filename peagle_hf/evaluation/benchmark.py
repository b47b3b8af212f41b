"""Measure acceptance and speed of drafters in real vLLM, and check that the text stays the same with them.

The prompts are sent to running servers, or vLLM runs them in child processes: once without a drafter, and once for each
drafter and K.
"""

import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..arguments import command_text, config_path, write_config
from ..console import number_of
from ..data.prompts import Prompt
from ..data.sources import source_name
from ..data.tokenizer import ChatOptions
from ..files import ANOTHER_OUTPUT, atomic_path, locked_folder, write_json
from ..hub.training_json import chosen_chat_options, recorded_chat_options
from ..model.served_checkpoint import verifier_of
from ..serving.environment import installed_vllm
from ..serving.tokens_by_load import RECOMMENDED, recommend
from .arguments import EvaluateArguments
from .figures import difference, entry
from .in_processes import measure_processes
from .intervals import CONFIDENCE, METHOD
from .on_servers import measure_servers
from .report import draw, html, text
from .segments import Segmenter
from .suites import load_prompts
from .task import AtTemperature, Drafter, Drafting, Measured, Task, drafting_of, follow_links

logger = logging.getLogger(__name__)


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Run the prompts in vLLM without and with the drafters; write, log and return the report.

    In a prompt with several turns, each turn follows the answers of the run without a drafter, so that all runs read
    the same text. `evaluation.json` holds the report:

    - `acceptance_length`: tokens per forward pass of the verifier, 1 + accepted tokens / drafts; `acceptance_rate`:
      accepted / drafted tokens; `per_position_acceptance`: accepted at position k / drafts;
      `conditional_acceptance`: accepted at position k / drafts that reach it, null where none does; and their
      counts; with a temperature above 0 those of all rounds together (greedy rounds draft the same).
    - `tokens_per_second`, `tokens_per_second_without`, `speed_up`: generated tokens over wall time, warmed up, the
      median of the rounds. `is_speed_up_or_down`: whether the speeds differ; null after one round.
      `break_even_length`: the acceptance length from which the drafter pays at this load (1: always; null: unknown).
    - `intervals` of all these, [low, high]: see `intervals`. Speed intervals are the union over rounds. There are none
      with fewer than six prompts, and none for acceptance if vLLM doesn't count per request.
    - `by_category`: the same for each kind of prompt; a prompt's share in the wall time is its share in the seconds of
      all answers, which run side by side.
    - `by_segment`, if the chat template marks reasoning or tool calls: acceptance within the `reasoning`, within each
      `tool_call` and in the rest of the `text`. A draft counts where its first token lies, so the counts of all
      segments sum to the whole; `num_prompts` have a draft there. Null if vLLM doesn't say where drafts began.
      `segment_markers` has the text with which a segment opens and closes (null: at the end of the answer),
      `answers_begin_in` the segment that the generation prompt opens, or `text`.
    - `by_context`: the same by position in the context, the number of tokens before a draft's first one, prompt
      included: "0-1K", "1K-4K", "4K-16K", "16K-32K" and "32K-", K being 1,024. Null for the same reason.
    - `by_concurrency`: acceptance and speed at each number of chats at a time (`chats_at_a_time`, at most the prompts),
      and `latency_seconds`, `latency_seconds_without`: mean, median and p99 from a request to its last token
      (`request`), to its first (`first_token`), and between two later ones on average, over all rounds.
    - `by_temperature`, with several: all this at each, with `temperature`. The main figures are those of the first.
      `draft_sample_method`: how tokens were drafted at temperatures above 0; null for a server, which doesn't say it.
    - `recommended_num_speculative_tokens`: for each concurrency that was reached, the K with which `--model` was
      fastest, 0 if the verifier alone was (see `recommend`). `peagle-hf serve --num-speculative-tokens auto` reads it.
    - `text_identical`, `num_identical`, `differences` (prompt, turn, first token that differs); null if sampled.
    - `drafter`: the folder, `drafter_link`: the name that was given if it is a link (such as `checkpoint_best`, which
      is resolved once, at the start), `drafter_weights`: the fingerprint of its weights.
    - `others`: all this for each other K and each drafter of `--compare`, with `difference`: another K is compared with
      the main figures, another drafter with `--model` at the same K. A difference has `value`, `interval` and
      `is_difference`, which is false if the interval contains 0 (for the ratio of speeds: 1).
    - `dropped_prompts`: what was left out of the suites, and why.
    - `counts`: how finely vLLM counts drafts: `by draft`, `by request`, or `by category`: its totals (before
      vLLM 0.29), read after each category in a second pass that isn't timed.
    - how it was measured: `command`, `seed`, `dtype`, `device`, `versions`, vLLM's `model_runner` and so on.

    Without `--baseline-endpoint` every figure that compares with the verifier alone is null.

    Each finished run is kept in `evaluation.journal` until the report is written, so an evaluation that was interrupted
    goes on with the same command. Rounds, concurrencies (except the highest) and temperatures may change; with other
    settings, prompts or weights everything is measured again, and the log says why.

    Raises:
        PeagleError: vLLM isn't installed or fails, it would load a checkpoint wrongly, the prompts are malformed, or
            the journal is damaged; a server is dead, serves another model or no drafter, was restarted, or is used by
            others too.
    """
    drafters = follow_links(arguments)
    verifier = verifier_of(drafters[0].folder, drafters[0].config, arguments.verifier)
    drafting = drafting_of(arguments, drafters, verifier)
    dropped: list[dict[str, str]] = []
    prompts = load_prompts(arguments, dropped)
    with locked_folder(arguments.output, ANOTHER_OUTPUT, "evaluate"):
        return _evaluate(arguments, drafters, verifier, drafting, prompts, dropped)


def _evaluate(
    arguments: EvaluateArguments,
    drafters: list[Drafter],
    verifier: str,
    drafting: list[Drafting],
    prompts: list[Prompt],
    dropped: list[dict[str, str]],
) -> dict[str, Any]:
    output = Path(arguments.output)
    write_config(arguments, config_path(output, "evaluate"), "evaluate")
    _warn_of_few_prompts(arguments.concurrency, len(prompts))
    options = chosen_chat_options(
        drafters[0].folder,
        verifier,
        arguments.trust_remote_code,
        arguments.chat_template,
        arguments.chat_template_kwargs,
    )
    _warn_of_other_options(drafters, options)
    segmenter = Segmenter.of(verifier, arguments.trust_remote_code, options)
    task = Task(arguments, verifier, drafting, prompts, options)
    measured = measure_processes(task) if arguments.endpoint is None else measure_servers(task)
    report = _report(task, measured, len(drafters), segmenter) | {"dropped_prompts": dropped}
    write_json(output / "evaluation.json", report)
    print(text(report), flush=True)
    logger.info("\nWritten to %s.", output / "evaluation.json")
    _illustrate(report, output)
    measured.finished.remove()
    return report


def _report(task: Task, measured: Measured, num_drafters: int, segmenter: Segmenter | None) -> dict[str, Any]:
    """The report (see `evaluate`) without `dropped_prompts`."""
    arguments = task.arguments
    results = [_entries(task, runs, num_drafters, segmenter) for runs in measured.by_temperature]
    entries = results[0]
    if len(results) > 1:
        for number, first in enumerate(entries):
            first["by_temperature"] = [
                {"temperature": runs.temperature, **entries_there[number]}
                for runs, entries_there in zip(measured.by_temperature, deepcopy(results), strict=True)
            ]
    own = len(entries) // num_drafters - 1
    recommended = recommend(entries[: own + 1])
    return {
        "verifier": task.verifier,
        "prompts": ", ".join(map(source_name, arguments.suite)),
        **entries.pop(own),
        "others": entries,
        RECOMMENDED: recommended,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature[0],
        "draft_sample_method": _draft_sample_method(task),
        **task.options.description(),
        **(segmenter.description() if segmenter else {}),
        "seed": arguments.seed if arguments.endpoint is None else None,
        "rounds": arguments.rounds,
        "interval_method": {"confidence": CONFIDENCE, "name": METHOD},
        "concurrency": min(arguments.concurrency[-1], len(task.prompts)),
        "counts": measured.counts,
        "command": command_text(arguments, "evaluate"),
        **measured.measured_on,
    }


def _draft_sample_method(task: Task) -> str | None:
    """How this vLLM drafts at temperatures above 0: greedily if it has no choice; None for a server."""
    if task.arguments.endpoint is not None:
        return None
    return task.draft_sample_method if installed_vllm().takes("draft_sample_method") else "greedy"


def _entries(task: Task, runs: AtTemperature, num_drafters: int, segmenter: Segmenter | None) -> list[dict[str, Any]]:
    """The entries of all drafters and K at one temperature; all but the main one with their `difference`."""
    trials, prompts = runs.trials, task.prompts
    entries = [
        {**tried.drafter.description(), **entry(trial, runs.without, prompts, runs.is_greedy, segmenter)}
        for tried, trial in zip(task.drafting, trials, strict=True)
    ]
    per_drafter = len(trials) // num_drafters
    own = per_drafter - 1
    for number, trial in enumerate(trials):
        other = own if number < per_drafter else number % per_drafter
        if number != own:
            reference = {name: entries[other][name] for name in ("drafter", "num_speculative_tokens")}
            entries[number]["difference"] = {
                "from": reference,
                **difference(trial, trials[other], prompts, runs.is_greedy),
            }
    return entries


def _illustrate(report: dict[str, Any], output: Path) -> None:
    """Write evaluation.html and evaluation.png; what can't be drawn is said, and the figures are in the JSON file."""
    with atomic_path(output / "evaluation.html") as temporary:
        temporary.write_text(html(report), encoding="utf-8")
    picture = output / "evaluation.png"
    picture.unlink(missing_ok=True)  # that of an earlier evaluation
    draw(report, picture)


def _warn_of_few_prompts(concurrency: Sequence[int], num_prompts: int) -> None:
    """Warn of numbers of chats at a time that can't be reached."""
    loads = [str(number) for number in concurrency if number > num_prompts]
    if loads:
        logger.warning(
            "--concurrency is %s, but the suite has only %s, so no more than %s at a time can run there. The report "
            "says so and recommends no K for it. To measure it, give at least as many prompts, better several times as "
            "many.",
            " ".join(loads),
            number_of(num_prompts, "prompt"),
            number_of(num_prompts, "chat"),
        )


def _warn_of_other_options(drafters: Sequence[Drafter], options: ChatOptions) -> None:
    """Warn of drafters whose training used another chat template or other variables of it."""
    for drafter in drafters:
        trained = recorded_chat_options(drafter.folder)
        if trained not in (None, options):
            logger.warning(
                "%s was trained with another chat template or other variables (%s) than it is measured with (%s).",
                drafter.name,
                trained and trained.fingerprint(),
                options.fingerprint(),
            )
