"""vLLM in a process of its own, which answers prompts and counts drafts.

Memory is given back with the process, and a crash in there is a message here. `python -m peagle_hf.vllm_process` is
that process: it reads its job as JSON from standard input and answers in lines of JSON.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from . import __version__
from .client import DRAFT_COUNTERS, POSITION_COUNTER, Answer, Run, check_counts, drafting_counts
from .console import progress_bar
from .data.prompts import Prompt
from .errors import PeagleError
from .supervisor import supervised

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What vLLM is to do.

    Args:
        engine: arguments of `vllm.LLM`.
        prompts: in the order in which they are asked.
        concurrency: how many chats at a time, each in turn.
        answers: for each of these, of each prompt by turn, what later turns follow; default: vLLM's own.
    """

    engine: dict[str, Any]
    prompts: list[Prompt]
    concurrency: list[int]
    max_tokens: int
    temperature: float
    answers: list[list[list[str]]] | None = None


def run_vllm(
    job: Job, environment: dict[str, str], log: Path, what: str, keep: Callable[[Run, dict[str, Any]], object]
) -> None:
    """Run vLLM on a job in a child process.

    Args:
        log: where all that vLLM says goes.
        what: is measured, for messages, such as "with the drafter".
        keep: called with the answers at each number of chats at a time, as soon as these are there, and with what they
            were measured on: `dtype`, `device`, `versions`.

    Raises:
        PeagleError: vLLM fails, or a prompt is too long.
    """
    measured_on: dict[str, Any] = {}
    num_runs, num_prompts = 0, len(job.prompts) * len(job.concurrency)
    with (
        open(log, "w+", encoding="utf-8", errors="replace") as log_file,
        tempfile.TemporaryFile("w+", encoding="utf-8") as job_file,
        progress_bar(total=num_prompts, desc=f"vLLM {what}", unit="prompt") as progress,
    ):
        json.dump(asdict(job), job_file)
        job_file.seek(0)
        with supervised(
            [sys.executable, "-m", __name__],
            environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=job_file,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise PeagleError(message["error"])
                progress.update(message.get("done", 0))
                measured_on = message.get("measured_on", measured_on)
                if "run" in message:
                    num_runs += 1
                    keep(Run.of(message["run"]), measured_on)
            status = process.wait()
        if num_runs < len(job.concurrency):
            log_file.seek(0)
            logger.error("%s", "".join(log_file.readlines()[-30:]))
            raise PeagleError(
                f"vLLM failed {what} (exit status {status}); the end of what it said is above, all of it "
                f"in {log}. Where memory ran out, lower --concurrency or --max-model-len."
            )


def _work(job: Job, send: Callable[..., object]) -> None:
    """Do a job; `send` gets `measured_on`, then `done` for each finished prompt and a `run` for each concurrency."""
    import transformers
    import vllm

    drafts = "speculative_config" in job.engine
    llm = vllm.LLM(**job.engine, per_request_spec_decode_metrics="summary" if drafts else "none")
    llm.generate(
        _Conversations(llm, job, None).inputs(0),
        vllm.SamplingParams(temperature=job.temperature, max_tokens=8),
        use_tqdm=False,
    )
    on_gpu = torch.cuda.is_available()
    send(
        measured_on={
            "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "versions": {
                "peagle_hf": __version__,
                "vllm": vllm.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    )
    for number, concurrency in enumerate(job.concurrency):
        conversations = _Conversations(llm, job, job.answers[number] if job.answers else None)
        before, started = _read_counters(llm), time.perf_counter()
        conversations.hold(concurrency, lambda count: send(done=count))
        seconds = time.perf_counter() - started
        if drafts:
            counted = [after - earlier for after, earlier in zip(_read_counters(llm), before, strict=True)]
            check_counts([answer for chat in conversations.chats for answer in chat], counted)
        send(run=asdict(Run(concurrency, conversations.chats, seconds)))


class _Conversations:
    """All chats of a job, held so many at a time: as one ends, the next begins."""

    def __init__(self, llm: Any, job: Job, answers: Sequence[Sequence[str]] | None):
        self.job, self.answers = job, answers
        self.chats: list[list[Answer]] = [[] for _ in job.prompts]
        self._engine, self._renderer, self._tokenizer = llm.llm_engine, llm.renderer, llm.get_tokenizer()
        self._asked: dict[str, tuple[int, float]] = {}

    def hold(self, concurrency: int, report_progress: Callable[[int], object]) -> None:
        waiting = deque(range(len(self.chats)))
        while waiting or self._asked:
            while waiting and len(self._asked) < concurrency:
                self._ask(waiting.popleft())
            for output in self._engine.step():
                index, asked = self._asked.pop(output.request_id)
                self._take(index, output, time.perf_counter() - asked)
                if len(self.chats[index]) < len(self.job.prompts[index].turns):
                    self._ask(index)
                else:
                    report_progress(1)

    def inputs(self, index: int) -> dict[str, list[int]]:
        """The prompt of a chat's next turn.

        Raises:
            PeagleError: with the answer it would be longer than the engine takes.
        """
        prompt, chat = self.job.prompts[index], self.chats[index]
        said = [answer.text for answer in chat] if self.answers is None else self.answers[index]
        messages = list(prompt.system)
        for question, answer in zip(prompt.turns, said[: len(chat)], strict=False):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": prompt.turns[len(chat)]})
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(ids) + self.job.max_tokens > self.job.engine["max_model_len"]:
            raise PeagleError(
                f"Turn {len(chat)} of prompt {prompt.id} has {len(ids)} tokens; with an answer of "
                f"{self.job.max_tokens} that is more than --max-model-len {self.job.engine['max_model_len']}. Raise "
                "it, or take the prompt out."
            )
        return {"prompt_token_ids": ids}

    def _ask(self, index: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=self.job.temperature,
            max_tokens=self.job.max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = f"{index} {len(self.chats[index])}"
        self._asked[request] = index, time.perf_counter()
        (rendered,) = self._renderer.render_cmpl([self.inputs(index)])
        self._engine.add_request(request, rendered, sampling)

    def _take(self, index: int, output: Any, seconds: float) -> None:
        (answer,) = output.outputs
        drafted = answer.spec_decode_metrics
        self.chats[index].append(
            Answer(
                text=answer.text,
                token_ids=list(answer.token_ids),
                finish_reason=answer.finish_reason,
                first_token_seconds=output.metrics.first_token_latency,
                seconds=seconds,
                drafting=drafted and drafting_counts(drafted.histogram, drafted.num_draft_tokens),
            )
        )


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
        job = json.load(sys.stdin)
        prompts = [Prompt(**prompt) for prompt in job.pop("prompts")]
        _work(Job(prompts=prompts, **job), send)
    except PeagleError as error:
        send(error=str(error))


if __name__ == "__main__":
    _main()
