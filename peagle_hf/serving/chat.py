"""`peagle-hf chat`: chat with a vLLM server, with the acceptance of the drafts under each answer."""

import math
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

from ..arguments import Arguments, check_ranges
from ..console import number_of
from ..data.endpoint import DEFAULT_URL, endpoint_urls
from ..data.tokenizer import read_template_kwargs
from ..errors import PeagleError
from .client import Answer, Client, Counters, summarize


@dataclass
class ChatArguments(Arguments):
    """Arguments of `peagle-hf chat`."""

    endpoint: str = field(default=DEFAULT_URL, metadata={"help": "URL of the server, such as one of peagle-hf serve."})
    max_tokens: int = field(default=1024, metadata={"help": "Longest answer, in tokens."})
    temperature: float | None = field(
        default=None, metadata={"help": "0 is greedy. Default: the server's own for this model."}
    )
    system: str | None = field(default=None, metadata={"help": "A system message."})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Variables for the server's chat template, as a JSON object, for example "
            "'{\"enable_thinking\": false}'. Default: those that the server was started with."
        },
    )

    GROUPS: ClassVar = {
        "Chat": ("endpoint", "max_tokens", "temperature", "system", "chat_template_kwargs"),
    }
    TEXTS: ClassVar = ("system",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.endpoint = ",".join(endpoint_urls(self.endpoint))
        self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        check_ranges(self, {"max_tokens": (1, math.inf), "temperature": (0, math.inf)})
        if self.temperature == math.inf:
            raise PeagleError("--temperature is inf but must be a number.")


def chat(arguments: ChatArguments) -> None:
    """Send the lines of standard input, as messages of one conversation, to the server and print its answers.

    The acceptance of the drafts, from the server's counters, is printed under each answer. A message that gets no
    answer, because the server fails or the user interrupts it, is left out of the conversation.

    Raises:
        PeagleError: the server can't be reached at the start, or standard input isn't a terminal and a message got no
            answer.
    """
    client = Client(arguments.endpoint)
    conversation = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    extra = {"chat_template_kwargs": arguments.chat_template_kwargs} if arguments.chat_template_kwargs else {}
    num_asked = num_failed = 0
    is_terminal = sys.stdin.isatty()
    print(f"{client.model['id']} at {client.url}. Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            said = input("\n> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            break
        except UnicodeDecodeError as error:
            raise PeagleError(f"Standard input isn't text in {error.encoding}. Send it in that encoding.") from error
        if not said.strip():
            continue
        question = {"role": "user", "content": said}
        num_asked += 1
        try:
            before = _counters(client)
            answer = client.ask(
                [*conversation, question], arguments.max_tokens, arguments.temperature, extra, on_text=_show
            )
        except PeagleError as error:
            num_failed += 1
            print(f"\n[No answer; the conversation continues without this message: {error}]", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("\n[Stopped; the conversation continues without this message.]")
            continue
        conversation += [question, {"role": "assistant", "content": answer.text}]
        with suppress(KeyboardInterrupt):
            print(f"\n[{_acceptance(client, before, answer)}; {_speed(answer)}]")
    print(f"{chr(10) if is_terminal else ''}The chat has ended.")
    if num_failed and not is_terminal:
        raise PeagleError(f"{num_failed} of {number_of(num_asked, 'message')} got no answer; the reasons are above.")


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _counters(client: Client) -> Counters | None:
    """The server's counters; None if it has none."""
    try:
        return client.counters()
    except PeagleError:
        return None


def _acceptance(client: Client, before: Counters | None, answer: Answer) -> str:
    """The acceptance of an answer's drafts, in words."""
    if before is None:
        return "the server doesn't count drafts"
    try:
        counted = client.since(before, len(answer.token_ids))
    except PeagleError as error:
        return f"acceptance isn't known: {error}"
    if not counted.drafting:
        return "no drafter is served"
    summary = summarize([counted.drafting])
    if not summary["num_drafts"]:
        return "nothing was drafted"
    rates = " ".join(f"{rate:.0%}" for rate in summary["per_position_acceptance"])
    others = ", other users' answers included" if counted.generated > len(answer.token_ids) else ""
    return f"acceptance length {summary['acceptance_length']:.2f}, by position {rates}{others}"


def _speed(answer: Answer) -> str:
    return f"{number_of(len(answer.token_ids), 'token')}, {len(answer.token_ids) / answer.seconds:.1f} tokens/s"
