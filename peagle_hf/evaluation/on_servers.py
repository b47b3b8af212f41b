"""Measure running vLLM servers."""

import logging
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .. import __version__
from ..console import number_of, progress_bar
from ..data.endpoint import PLAIN_SAMPLING, concurrently
from ..data.prompts import Prompt
from ..data.tokenizer import ChatOptions
from ..errors import PeagleError
from ..files import canonical_path
from ..serving.client import DRAFT_COUNTERS, Answer, Client, Counters
from .arguments import EvaluateArguments
from .runs import BY_CATEGORY, BY_DRAFT, BY_REQUEST, Condition, Run, check_counts, coarse_counts, grouped
from .task import Measured, Task, by_temperature, conditions, name_of_run

logger = logging.getLogger(__name__)


def measure_servers(task: Task) -> Measured:
    """Measure the servers, under each condition first the one without a drafter (`--baseline-endpoint`).

    Raises:
        PeagleError: a server is dead, serves another model or no drafter, was restarted, or is used by others too.
    """
    arguments, prompts = task.arguments, task.prompts
    (tried,) = task.drafting
    client, baseline, number = _open_servers(task)
    measured_on = {
        "dtype": "a dtype not known" if arguments.dtype == "auto" else arguments.dtype,
        "device": "a vLLM server",
        "versions": {"peagle_hf": __version__, "vllm": client.version()},
    }
    fields = _request_fields(arguments, task.options)
    first = [{"role": "user", "content": prompts[0].turns[0]}]
    answer = client.ask(first, max_tokens=2, extra=fields)
    counts = BY_CATEGORY if answer.drafting is None else BY_REQUEST if answer.drafts is None else BY_DRAFT
    if counts == BY_CATEGORY:
        said = coarse_counts(counts, client.version(), is_server=True)
        logger.warning("Each category is run once more by itself, to count its drafts. %s", said)
    finished = task.finished_runs({"num_speculative_tokens": number, "counts": counts, **measured_on})
    wanted = conditions(arguments)
    without: dict[Condition, list[Run]] = {condition: [] for condition in wanted}
    drafted: dict[Condition, list[Run]] = {condition: [] for condition in wanted}
    total = arguments.rounds * len(wanted) * len(prompts) * (2 if baseline else 1)
    with progress_bar(total=total, unit="prompt") as progress:

        def run(server: Client, name: str, given: list[list[str]] | None, condition: Condition) -> Run:
            if name in finished:
                progress.update(len(prompts))
                return finished[name][0]
            measured = measure(
                server,
                prompts,
                given,
                arguments.max_tokens,
                condition,
                progress.update,
                counts,
                fields,
            )
            finished.add(name, measured, measured_on)
            return measured

        for number_of_round in range(1, arguments.rounds + 1):
            for condition in wanted:
                given = None
                if baseline:
                    name = name_of_run(number_of_round, condition, 0)
                    without[condition].append(run(baseline, name, None, condition))
                    given = without[condition][-1].texts
                name = name_of_run(number_of_round, condition, 1)
                drafted[condition].append(run(client, name, given, condition))
    results = by_temperature([(tried.drafter.name, number)], without if baseline else None, [drafted])
    return Measured(results, measured_on, counts, finished)


def _open_servers(task: Task) -> tuple[Client, Client | None, int]:
    """The server with the drafter, the one without (None if it isn't named), and K."""
    arguments = task.arguments
    assert arguments.endpoint is not None
    client = Client(arguments.endpoint)
    baseline = Client(arguments.baseline_endpoint) if arguments.baseline_endpoint else None
    # `vllm serve DRAFTER` serves the verifier under the name of the drafter.
    folder = str(task.drafting[0].drafter.folder)
    names = {canonical_path(name) for name in (task.verifier, arguments.model, folder)}
    for server in filter(None, (client, baseline)):
        if names.isdisjoint(canonical_path(name) for name in server.model.values()):
            raise PeagleError(
                f"The vLLM server {server.url} runs {server.model['root']}, but the drafter's verifier is "
                f"{task.verifier}. Start it with that model, or name the right endpoint."
            )
    counters = client.counters().drafting
    if not counters:
        command = f"peagle-hf serve {shlex.quote(arguments.model)}"
        raise PeagleError(f"{client.url} serves no drafter. Start it with {command}.")
    if baseline and baseline.counters().drafting:
        raise PeagleError(
            f"{baseline.url} has a drafter too, but --baseline-endpoint must be a server without one. Start it with "
            f"vllm serve {shlex.quote(task.verifier)}."
        )
    return client, baseline, len(counters) - len(DRAFT_COUNTERS)


def measure(
    client: Client,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]] | None,
    max_tokens: int,
    condition: Condition,
    report_progress: Callable[[int], object],
    counts: str = BY_DRAFT,
    extra: dict[str, Any] | None = None,
) -> Run:
    """Run all prompts under a condition, without the server's prefix cache.

    Args:
        answers: for each prompt the answers by turn that later turns follow; default: the server's own.
        counts: with `BY_CATEGORY` and a drafter a second pass, which isn't timed, runs one category after another, and
            the server's counters are read in between.
        extra: more fields of each request.

    Raises:
        PeagleError: the server fails, or it generates more than was requested here, because others use it too.
    """
    temperature, concurrency = condition
    _warm_up(client, prompts[0], min(concurrency, len(prompts)), temperature, extra)

    def ask(
        indices: Sequence[int], given: Sequence[Sequence[str]] | None, report: Callable[[int], object]
    ) -> tuple[Run, list[int]]:
        """The run of these prompts, and the server's counts of its drafts."""

        def converse(index: int) -> list[Answer]:
            turns = None if given is None else given[index]
            return _converse(client, prompts[index], turns, max_tokens, temperature, extra)

        before, chats = client.counters(), {}
        started = time.perf_counter()
        for index, result in concurrently(converse, indices, min(concurrency, len(indices))):
            if isinstance(result, BaseException):
                raise result
            chats[index] = result
            report(1)
        run = Run(concurrency, [chats[index] for index in indices], time.perf_counter() - started)
        return run, _counted(client, before, run)

    run, counted = ask(range(len(prompts)), answers, report_progress)
    if not counted:  # the server drafts nothing
        return run
    if counts != BY_CATEGORY:
        check_counts([answer for chat in run.chats for answer in chat], counted)
        return run
    groups = grouped(prompts)
    if len(groups) == 1:
        return replace(run, counters=dict.fromkeys(groups, counted))
    said = answers or run.texts
    return replace(run, counters={name: ask(indices, said, lambda count: None)[1] for name, indices in groups.items()})


def _warm_up(client: Client, prompt: Prompt, num_chats: int, temperature: float, extra: dict[str, Any] | None) -> None:
    """Begin as many chats as will run at a time: vLLM compiles kernels when it first has so many."""

    def begin(_: int) -> Answer:
        return client.ask([{"role": "user", "content": prompt.turns[0]}], 8, temperature, _fields(prompt, extra))

    before, generated = client.counters(), 0
    for _, answer in concurrently(begin, range(num_chats), num_chats):
        if isinstance(answer, BaseException):
            raise answer
        generated += len(answer.token_ids)
    client.since(before, generated)


def _fields(prompt: Prompt, extra: dict[str, Any] | None) -> dict[str, Any]:
    """More fields of a request: the server's own sampling and its prefix cache are kept out."""
    fields = {**PLAIN_SAMPLING, "cache_salt": secrets.token_hex(8), **(extra or {})}
    # The model sees the tools, and its calls stay part of the answer's text.
    return fields | ({"tools": prompt.tools, "tool_choice": "none"} if prompt.tools else {})


def _counted(client: Client, before: Counters, run: Run) -> list[int]:
    """The server's counts of drafts since `before`.

    Raises:
        PeagleError: the server has generated other tokens than those of the run.
    """
    asked = sum(len(answer.token_ids) for chat in run.chats for answer in chat)
    counted = client.since(before, asked)
    if counted.generated > asked:
        raise PeagleError(
            f"{client.url} generated {number_of(counted.generated, 'token')}, but this evaluation asked for {asked} "
            "only: others use it too, and its counters don't tell whose tokens they count. Run it when "
            "nobody else uses it."
        )
    return counted.drafting


def _converse(
    client: Client,
    prompt: Prompt,
    given: Sequence[str] | None,
    max_tokens: int,
    temperature: float,
    extra: dict[str, Any] | None,
) -> list[Answer]:
    """Run a prompt turn by turn; later turns follow the given answers, or else the server's own."""
    messages, said = list(prompt.system), []
    for turn, question in enumerate(prompt.turns):
        messages.append({"role": "user", "content": question})
        try:
            answer = client.ask(messages, max_tokens, temperature, _fields(prompt, extra))
        except PeagleError as error:
            raise PeagleError(f"Turn {turn} of prompt {prompt.id} got no answer. {error}") from error
        if answer.finish_reason == "length" and len(answer.token_ids) < max_tokens:
            raise PeagleError(
                f"{client.url} cut the answer to turn {turn} of prompt {prompt.id} after {len(answer.token_ids)} "
                f"of {max_tokens} tokens: prompt and answer are longer than its --max-model-len. Start it with a "
                "larger one, lower --max-tokens, or take the prompt out."
            )
        said.append(answer)
        messages.append({"role": "assistant", "content": answer.text if given is None else given[turn]})
    return said


def _request_fields(arguments: EvaluateArguments, options: ChatOptions) -> dict[str, Any]:
    """The fields of each request to a server that carry the chat options.

    The template is among them only if `--chat-template` names it, because a server accepts it only if it was started
    with --trust-request-chat-template. The template of the drafter's training must be known to the server.
    """
    fields: dict[str, Any] = {"chat_template_kwargs": options.kwargs} if options.kwargs else {}
    if arguments.chat_template is not None:
        fields["chat_template"] = options.template
    elif options.template is not None:
        logger.warning(
            "Make sure that the servers were started with the chat template of the drafter's training: peagle-hf serve "
            "does that, and the server of --baseline-endpoint needs vLLM's --chat-template. To send a template with "
            "each request instead, start the servers with --trust-request-chat-template and pass --chat-template."
        )
    return fields
