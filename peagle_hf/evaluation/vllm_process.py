"""vLLM in a child process, which answers prompts and counts drafts.

The memory is free when the process ends, and a crash of vLLM becomes an error message of the parent. `python -m
peagle_hf.evaluation.vllm_process` is the child: it reads the engine's arguments and then its jobs as lines of JSON from
standard input, and answers in such lines.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..arguments import flag_of
from ..console import number_of, progress_bar
from ..data.chat_template import ChatRenderer
from ..data.chats import Unlearnable
from ..data.prompts import Prompt
from ..data.tokenizer import ChatOptions, load_tokenizer
from ..errors import PeagleError
from ..serving.client import DRAFT_COUNTERS, POSITION_COUNTER, Answer, drafting_counts, drafts_in_order
from ..serving.installed import MODEL_RUNNER, REQUEST_COUNTS
from ..serving.supervisor import supervised
from .runs import BY_CATEGORY, BY_DRAFT, Condition, Run, check_counts, grouped
from .synthetic_acceptance import SYNTHETIC, accept_synthetically_on_cpu, set_acceptance_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A job of a vLLM process.

    Args:
        prompts: in the order in which they are run.
        conditions: measured one after another.
        counts: `BY_DRAFT`, or `BY_CATEGORY`: then a second pass runs one category after another to count drafts.
        options: chat template and variables.
        answers: for each condition and prompt, the answers by turn that later turns follow; default: vLLM's own.
        token_ids: prompts that are given as token ids, in place of `prompts`; the answer to each has exactly
            `max_tokens` tokens, and its text isn't decoded.
        acceptance_length: for an engine with `SYNTHETIC` acceptance (see `synthetic_acceptance`).
    """

    prompts: list[Prompt]
    conditions: list[Condition]
    max_tokens: int
    counts: str = BY_DRAFT
    options: ChatOptions = field(default_factory=ChatOptions)
    answers: list[list[list[str]]] | None = None
    token_ids: list[list[int]] | None = None
    acceptance_length: float | None = None


class VllmProcess:
    """vLLM in a child process: it loads its models when the block begins, and `run` gives it a job.

    Args:
        engine: arguments of `vllm.LLM`.
        log: file for vLLM's output.
        what: the end of "vLLM failed …" in messages, such as "with the drafter".
        flags: vLLM's own flags, as on its command line; they have precedence over `engine`.
        if_memory_ran_out: what the user of this command can do then.
    """

    def __init__(
        self,
        engine: dict[str, Any],
        environment: dict[str, str],
        log: Path,
        what: str,
        flags: Sequence[str] = (),
        if_memory_ran_out: str = "lower --concurrency or --max-model-len",
    ):
        self.engine, self.environment, self.log, self.what, self.flags = engine, environment, log, what, flags
        self.if_memory_ran_out = if_memory_ran_out
        self._measured_on: dict[str, Any] | None = None
        self._process: subprocess.Popen | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "VllmProcess":
        if self._process is not None:  # the process was started before the block
            return self
        log = self._stack.enter_context(open(self.log, "w", encoding="utf-8", errors="replace"))
        environment = self.environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        command = [sys.executable, "-m", __name__]
        self._process = self._stack.enter_context(supervised(command, environment, **pipes))
        self._send({"engine": self.engine, "flags": list(self.flags)})
        return self

    def __exit__(self, *error: Any) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._stack.close()

    def wait_until_ready(self) -> None:
        """Wait until the models are loaded.

        Raises:
            PeagleError: vLLM fails.
        """
        while self._measured_on is None:
            self._measured_on = self._receive().get("measured_on")

    def run(self, job: Job) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Do a job.

        Yields:
            the run of each condition, in order, as soon as it is finished, with its `dtype`, `device`, `model_runner`
            and `versions`.

        Raises:
            PeagleError: vLLM fails, or a prompt is too long.
        """
        self.wait_until_ready()
        assert self._measured_on is not None
        self._send(asdict(job))
        total = len(job.token_ids or job.prompts) * len(job.conditions)
        with progress_bar(total=total, desc=f"vLLM {self.what}", unit="prompt") as progress:
            for _ in job.conditions:
                while "run" not in (message := self._receive()):
                    progress.update(message.get("done", 0))
                yield Run.of(message["run"]), self._measured_on

    def _send(self, content: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # vLLM has failed, and `_receive` raises the error
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            logger.error("%s", "\n".join(lines[-30:]))
            said = next((one[:500] for one in reversed(lines) if re.match(r"[\w.]*(Error|Exception): ", one)), "")
            reason = said and f"It said: {said.rstrip('.')}. "
            raise PeagleError(
                f"vLLM failed {self.what} (exit status {status}); the end of its output is above, all of it is in "
                f"{self.log}. {reason}If memory ran out, {self.if_memory_ran_out}; if other "
                "programs use the GPU too, give vLLM a smaller share with -- --gpu-memory-utilization."
            )
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise PeagleError(message["error"])
        return message


def _work(receive: Callable[[], dict[str, Any]], send: Callable[..., object]) -> None:
    """Load models and do jobs until the parent has no more.

    `send` gets `measured_on`, then in each job `done` for each prompt and the `run` of each condition.
    """
    import transformers
    import vllm

    engine = _with_flags(**receive())
    drafting = engine.get("speculative_config") or {}
    if SYNTHETIC.keys() <= drafting.keys():
        accept_synthetically_on_cpu()  # vLLM already tries its sampler when it compiles (`--no-enforce-eager`)
    llm = vllm.LLM(**engine)
    is_second = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False)
    if drafting and is_second:
        raise PeagleError(
            "vLLM uses its second model runner, but drafts for P-EAGLE in the first one only. Set "
            f"{MODEL_RUNNER}=0, and leave out what needs the second one."
        )
    send(
        measured_on={
            "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "device": _device(llm),
            "model_runner": "second" if is_second else "first",
            "versions": {
                "peagle_hf": __version__,
                "vllm": vllm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    )
    tokenizer = None
    while True:
        content = receive()
        prompts = [Prompt(**prompt) for prompt in content.pop("prompts")]
        conditions = [Condition(*condition) for condition in content.pop("conditions")]
        job = Job(prompts=prompts, conditions=conditions, options=ChatOptions(**content.pop("options")), **content)
        if job.acceptance_length is not None:
            set_acceptance_length(llm, job.acceptance_length)
        if tokenizer is None and job.token_ids is None:
            # vLLM's own tokenizer of a Mistral model takes neither a template nor variables.
            tokenizer = load_tokenizer(engine["model"], engine["trust_remote_code"])
        _do(job, llm, tokenizer, bool(drafting), send)


def _device(llm: Any) -> str:
    """The device, or all GPUs among which vLLM shares the models (`--tensor-parallel-size`)."""
    if not torch.cuda.is_available():
        return f"CPU, {number_of(torch.get_num_threads(), 'thread')}"
    number, name = llm.llm_engine.vllm_config.parallel_config.world_size, torch.cuda.get_device_name()
    return name if number == 1 else f"{number} x {name}"


def _do(
    job: Job, llm: Any, tokenizer: PreTrainedTokenizerBase | None, drafts: bool, send: Callable[..., object]
) -> None:
    """Do one job of a process."""
    for number, (temperature, concurrency) in enumerate(job.conditions):
        _warm_up(job, llm, tokenizer, temperature, concurrency)
        given = job.answers[number] if job.answers else None
        conversations = _Conversations(llm, tokenizer, job, temperature, given)
        before, started = read_counters(llm), time.perf_counter()
        conversations.hold(range(len(conversations.chats)), concurrency, lambda count: send(done=count))
        run = Run(concurrency, conversations.chats, time.perf_counter() - started)
        counted = _since(before, llm)
        if drafts and job.counts == BY_CATEGORY:
            again = _Conversations(llm, tokenizer, job, temperature, conversations.answers or run.texts)
            run = replace(run, counters=_count_categories(again, llm, concurrency, counted))
        elif drafts:
            check_counts([answer for chat in run.chats for answer in chat], counted)
        send(run=asdict(run))


def _warm_up(
    job: Job, llm: Any, tokenizer: PreTrainedTokenizerBase | None, temperature: float, concurrency: int
) -> None:
    """Begin as many chats as will run at a time: vLLM compiles kernels when it first has so many.

    With a drafter that took vLLM 0.26 on an H200 two seconds.
    """
    from vllm import SamplingParams

    first = _Conversations(llm, tokenizer, job, temperature, None)
    max_tokens = 8 if job.token_ids is None else 32
    llm.generate(
        [first.inputs(index) for index in range(min(concurrency, len(first.chats)))],
        SamplingParams(temperature=temperature, max_tokens=max_tokens, detokenize=job.token_ids is None),
        use_tqdm=False,
    )


def _count_categories(
    conversations: "_Conversations", llm: Any, concurrency: int, counted: list[int]
) -> dict[str, list[int]]:
    """See `Run.counters`: from a pass that isn't timed, in which one category is run after another.

    Args:
        conversations: not begun yet.
        counted: vLLM's counts of the timed run, which serve if there is one category only.
    """
    groups, counters = grouped(conversations.job.prompts), {}
    if len(groups) < 2:
        return dict.fromkeys(groups or ("",), counted)
    for category, indices in groups.items():
        before = read_counters(llm)
        conversations.hold(indices, concurrency, lambda count: None)
        counters[category] = _since(before, llm)
    return counters


def _with_flags(engine: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """The engine's arguments with those of vLLM's own flags.

    Raises:
        PeagleError: vLLM doesn't know a flag or refuses its value, or the flag would change what is measured.
    """
    if not flags:
        return engine
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise PeagleError(f"vLLM doesn't take the flags after --: {message}.")

    parser = EngineArgs.add_cli_args(Parser())
    # This object stays where a flag isn't given. Otherwise argparse would set the flag's default.
    not_given = object()
    parsed = parser.parse_args(flags, Namespace(**dict.fromkeys(vars(parser.parse_args([])), not_given)))
    names = {one.name for one in fields(EngineArgs)}
    given = {name: value for name, value in vars(parsed).items() if name in names and value is not not_given}
    check_flags(engine, given)
    return engine | given


def check_flags(engine: dict[str, Any], given: dict[str, Any]) -> None:
    """Make sure that vLLM's own flags leave what is measured as it is.

    Args:
        engine: the arguments that a command of this package sets.
        given: those of the flags, by their names in vLLM's `EngineArgs`.

    Raises:
        PeagleError: a flag would change the models, the seed, the number of requests at a time or what vLLM counts, or
            let vLLM read a repeated prompt from its cache.
    """
    for name, value in given.items():
        flag = flag_of(name)
        if name in _SET_HERE or name.startswith("spec_"):
            raise PeagleError(
                f"{flag} stands after --, but this command itself sets the verifier, the drafter, the seed and what is "
                "counted. Leave it out; the command's own arguments describe the verifier and the drafters."
            )
        if name == "enable_prefix_caching" and value:
            raise PeagleError(f"{flag} stands after --, but each prompt must be read whole to be timed. Leave it out.")
        if name in _AT_LEAST and (value is None or value < engine[name]):
            raise PeagleError(f"{flag} after -- is {value} but must be at least {engine[name]}: {_AT_LEAST[name]}.")
        if name == "load_format" and value == "dummy" != engine.get(name):
            raise PeagleError(
                "The flags after -- ask for random weights, but not as --load-format dummy. Write it like that."
            )


_SET_HERE = ("model", "speculative_config", "seed", REQUEST_COUNTS, "disable_log_stats")
_AT_LEAST = {
    "max_num_seqs": "so many chats run at the same time",
    "max_model_len": "so long are a prompt, its answer and a draft",
}
"""Arguments of vLLM that a flag may raise only, with what needs the least value."""


class _Conversations:
    """All chats of a job, `concurrency` at a time: when one ends, the next begins."""

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        job: Job,
        temperature: float,
        answers: Sequence[Sequence[str]] | None,
    ):
        self.job, self.temperature, self.answers = job, temperature, answers
        self.max_model_len = llm.llm_engine.model_config.max_model_len
        self.chats: list[list[Answer]] = [[] for _ in job.token_ids or job.prompts]
        self._engine, self._renderer = llm.llm_engine, llm.renderer
        self._tokenizer = tokenizer
        self._chats: ChatRenderer | None = None
        if tokenizer is not None:
            self._chats = ChatRenderer(tokenizer, job.options.kwargs, job.options.template)
        self._asked: dict[str, tuple[int, float]] = {}

    def hold(self, indices: Sequence[int], concurrency: int, report_progress: Callable[[int], object]) -> None:
        waiting = deque(indices)
        while waiting or self._asked:
            while waiting and len(self._asked) < concurrency:
                self._ask(waiting.popleft())
            for output in self._engine.step():
                index, asked = self._asked.pop(output.request_id)
                self._take(index, output, time.perf_counter() - asked)
                if not self.job.token_ids and len(self.chats[index]) < len(self.job.prompts[index].turns):
                    self._ask(index)
                else:
                    report_progress(1)

    def inputs(self, index: int) -> dict[str, list[int]]:
        """The prompt of a chat's next turn.

        Raises:
            PeagleError: prompt and answer don't fit into the engine's context, or the chat template refuses the prompt.
        """
        if self.job.token_ids:
            return {"prompt_token_ids": self.job.token_ids[index]}
        assert self._tokenizer is not None
        assert self._chats is not None
        prompt, chat = self.job.prompts[index], self.chats[index]
        said = [answer.text for answer in chat] if self.answers is None else self.answers[index]
        messages = list(prompt.system)
        for question, answer in zip(prompt.turns, said[: len(chat)], strict=False):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": prompt.turns[len(chat)]})
        try:
            text = self._chats.prompt(messages, prompt.tools)
        except Unlearnable as error:
            raise PeagleError(
                f"Turn {len(chat)} of prompt {prompt.id} can't be asked: {error}. Take the prompt out, or name another "
                "template with --chat-template."
            ) from error
        ids: Any = self._tokenizer.encode(text, add_special_tokens=False)
        if len(ids) + self.job.max_tokens > self.max_model_len:
            raise PeagleError(
                f"Turn {len(chat)} of prompt {prompt.id} has {number_of(len(ids), 'token')}; with an answer of "
                f"{self.job.max_tokens} that is more than --max-model-len {self.max_model_len}. Raise it, or take the "
                "prompt out."
            )
        return {"prompt_token_ids": ids}

    def _ask(self, index: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=self.temperature,
            max_tokens=self.job.max_tokens,
            ignore_eos=self.job.token_ids is not None,
            detokenize=self.job.token_ids is None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = f"{index} {len(self.chats[index])}"
        self._asked[request] = index, time.perf_counter()
        (rendered,) = self._renderer.render_cmpl([self.inputs(index)])
        self._engine.add_request(request, rendered, sampling)

    def _take(self, index: int, output: Any, seconds: float) -> None:
        (answer,) = output.outputs
        counted = getattr(answer, "spec_decode_metrics", None)  # vLLM before 0.29 has no such field
        drafting = drafts = None
        if counted is not None:
            drafting = drafting_counts(counted.histogram, counted.num_draft_tokens)
            drafts = drafts_in_order(counted.histogram, counted.per_step_accepted, counted.per_step_drafted)
        self.chats[index].append(
            Answer(
                text=self._text(index, answer),
                token_ids=list(answer.token_ids),
                finish_reason=answer.finish_reason,
                first_token_seconds=output.metrics.first_token_latency,
                seconds=seconds,
                drafting=drafting,
                drafts=drafts,
                num_prompt_tokens=len(output.prompt_token_ids),
            )
        )

    def _text(self, index: int, answer: Any) -> str:
        """An answer's text as later turns follow it, and as a server would give it: without what stands before it."""
        if self.job.token_ids or self._tokenizer is None or self._chats is None:
            return str(answer.text)
        ids = list(answer.token_ids)
        whole = str(self._tokenizer.decode(ids[:-1] if answer.finish_reason == "stop" else ids))
        text = self._chats.content_of(whole, bool(self.job.prompts[index].tools))
        return str(answer.text) if text is None else text


def _since(before: list[int], llm: Any) -> list[int]:
    return [after - earlier for after, earlier in zip(read_counters(llm), before, strict=True)]


def read_counters(llm: Any) -> list[int]:
    """See `client.Counters.drafting`."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if f"vllm:{DRAFT_COUNTERS[0]}" not in metrics:
        return []
    counts = [metrics[f"vllm:{name}"].value for name in DRAFT_COUNTERS]
    return counts + metrics[f"vllm:{POSITION_COUNTER}"].values


def _main() -> None:
    # What libraries print goes to standard error, so that standard output has only messages.
    channel: IO[str] = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(**message: Any) -> None:
        print(json.dumps(message), file=channel, flush=True)

    def receive() -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit  # the parent has closed the pipe
        return dict(json.loads(line))

    try:
        _work(receive, send)
    except PeagleError as error:
        send(error=str(error))


if __name__ == "__main__":
    _main()
