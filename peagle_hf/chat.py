"""A chat with a vLLM server that shows what the drafter was worth in each answer."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

from .arguments import Arguments
from .client import Answer, Client, Counters
from .data.endpoint import DEFAULT_URL
from .figures import summarize


@dataclass
class ChatArguments(Arguments):
    """Arguments of `peagle-hf chat`."""

    endpoint: str = field(default=DEFAULT_URL, metadata={"help": "The server, such as peagle-hf serve starts."})
    max_tokens: int = field(default=1024, metadata={"help": "Longest answer, in tokens."})
    temperature: float | None = field(
        default=None, metadata={"help": "0 is greedy. Default: what the server takes for the model."}
    )
    system: str | None = field(default=None, metadata={"help": "A system message."})

    GROUPS: ClassVar = {
        "Chat": ("endpoint", "max_tokens", "temperature", "system"),
    }
    TEXTS: ClassVar = ("system",)


def chat(arguments: ChatArguments) -> None:
    """Answer the lines of standard input until it ends, each knowing the ones before.

    Under each answer stands how much of what was drafted the verifier accepted, by the server's counters.

    Raises:
        PeagleError: the server can't be reached or fails.
    """
    client = Client(arguments.endpoint)
    messages = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    print(f"{client.model['id']} at {client.url}. Ctrl-D ends.")
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            said = input("\n> " if sys.stdin.isatty() else "")
            if not said.strip():
                continue
            messages.append({"role": "user", "content": said})
            before = client.counters()
            answer = client.ask(messages, arguments.max_tokens, arguments.temperature, on_text=_show)
            print(f"\n[{_acceptance(client.since(before, len(answer.token_ids)), answer)}; {_speed(answer)}]")
            messages.append({"role": "assistant", "content": answer.text})
    print()


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _acceptance(counted: Counters, answer: Answer) -> str:
    if not counted.drafting:
        return "no drafter is served"
    summary = summarize([counted.drafting])
    if not summary["num_drafts"]:
        return "nothing was drafted"
    rates = " ".join(f"{rate:.0%}" for rate in summary["per_position_acceptance"])
    others = ", other users' answers included" if counted.generated > len(answer.token_ids) else ""
    return f"acceptance length {summary['acceptance_length']:.2f}, by position {rates}{others}"


def _speed(answer: Answer) -> str:
    return f"{len(answer.token_ids)} tokens, {len(answer.token_ids) / answer.seconds:.1f} tokens/s"
