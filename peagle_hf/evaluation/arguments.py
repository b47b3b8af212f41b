"""`EvaluateArguments`: the arguments of `peagle-hf evaluate`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

from ..arguments import VLLM_ARGS_HELP, Arguments, check_ascending, check_ranges
from ..data.tokenizer import CHAT_KWARGS_OF_DRAFTER_HELP, CHAT_TEMPLATE_OF_DRAFTER_HELP, read_template_kwargs
from ..errors import PeagleError
from ..model.served_checkpoint import DRAFT_SAMPLE_METHOD_HELP, DRAFTER_HELP, VERIFIER_HELP

MAX_MODEL_LEN = 4096
"""Default limit of prompt and answer together, in tokens; the verifier's own limit if that is lower."""
MAX_SEED = 2**32 - 1


def check_vllm_args(vllm_args: Sequence[str]) -> None:
    """Make sure that vLLM's flags stand in the command itself; the rest is checked by `vllm_process.check_flags`.

    Raises:
        PeagleError: they name a file of flags.
    """
    if any(word.partition("=")[0] == "--config" for word in vllm_args):
        raise PeagleError(
            "--config stands after --, but the report would name the file without what is in it. Write its flags "
            "after -- instead."
        )


def asks_for_random_weights(vllm_args: Sequence[str]) -> bool:
    """Whether vLLM's flags have `--load-format dummy`."""
    words = [one for word in vllm_args for one in word.split("=", 1)]
    formats = [value for name, value in pairwise(words) if name.replace("_", "-") == "--load-format"]
    return formats[-1:] == ["dummy"]


@dataclass
class EvaluateArguments(Arguments):
    """Arguments of `peagle-hf evaluate`."""

    model: str = field(metadata={"aliases": ["--drafter"], "help": DRAFTER_HELP})
    suite: list[str] = field(
        metadata={
            "help": "One or more suites of prompts that the drafter has not seen: .jsonl or .json files or hub "
            "datasets with `turns` (Spec-Bench's shape), `messages` or `conversations`; `category` groups them in "
            "the tables. A .txt or .md file is one prompt.",
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
    verifier: str | None = field(default=None, metadata={"help": VERIFIER_HELP})
    max_prompts: int | None = field(
        default=None, metadata={"help": "Take at most this many of the prompts, evenly from their categories."}
    )
    max_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens; answers end at EOS."})
    num_speculative_tokens: list[int] = field(
        default_factory=list,
        metadata={
            "help": "K, the tokens to draft at a time, or several such numbers, ascending; each is measured, and the "
            "main figures of the report are those of the last. Default: the K that each drafter was trained with."
        },
    )
    temperature: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={
            "help": "0 (the default) is greedy decoding; texts are compared only then. Or several such numbers, "
            "ascending; each is measured, and the main figures of the report are those of the first."
        },
    )
    draft_sample_method: Literal["probabilistic", "greedy"] | None = field(
        default=None, metadata={"help": DRAFT_SAMPLE_METHOD_HELP}
    )
    seed: int = field(default=0, metadata={"help": "Seed of vLLM in the first round; each later round adds 1."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Precision of both models; auto is float32 on a CPU; on a GPU the verifier's own, or bfloat16 if "
            "that is float32. With --endpoint it is only written into the report: the precision of the servers."
        },
    )
    max_model_len: int | None = field(
        default=None,
        metadata={"help": f"Longest prompt and answer, in tokens; default: {MAX_MODEL_LEN} or the verifier's limit."},
    )
    concurrency: list[int] = field(
        default_factory=lambda: [16],
        metadata={
            "help": "Chats at the same time (default: 16), or several such numbers, ascending; each is measured, and "
            "the main figures of the report are those of the last."
        },
    )
    rounds: int = field(
        default=1,
        metadata={
            "help": "Number of times that everything is measured, each time in new processes, alternating without and "
            "with the drafters. Speeds can be called different only with 2 or more: the machine's load varies too."
        },
    )
    endpoint: str | None = field(
        default=None,
        metadata={
            "help": "URL of a running server with the drafter, such as one of peagle-hf serve, to measure instead of "
            "starting vLLM. Nobody else may use it meanwhile."
        },
    )
    baseline_endpoint: str | None = field(
        default=None,
        metadata={"help": "With --endpoint, URL of a server without drafter to compare with. Default: no comparison."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the verifier."})
    chat_template: str | None = field(default=None, metadata={"help": CHAT_TEMPLATE_OF_DRAFTER_HELP})
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": CHAT_KWARGS_OF_DRAFTER_HELP})
    vllm_args: list[str] = field(default_factory=list, metadata={"help": VLLM_ARGS_HELP})

    GROUPS: ClassVar = {
        "Input and output": ("model", "compare", "suite", "output", "verifier", "trust_remote_code"),
        "What is measured": (
            "max_prompts",
            "max_tokens",
            "num_speculative_tokens",
            "temperature",
            "draft_sample_method",
            "concurrency",
            "rounds",
            "seed",
        ),
        "Chat template": ("chat_template", "chat_template_kwargs"),
        "vLLM": ("dtype", "max_model_len", "vllm_args", "endpoint", "baseline_endpoint"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template_kwargs is not None:
            self.chat_template_kwargs = read_template_kwargs(self.chat_template_kwargs)
        if not self.suite:
            raise PeagleError("--suite names no prompts. Name a .jsonl file or a hub dataset.")
        check_ascending(self, ("concurrency", "num_speculative_tokens"))
        if not self.concurrency:
            raise PeagleError("--concurrency is empty but needs numbers of chats at a time, for example 1 4 16.")
        for one in self.temperature:
            if not 0 <= one < math.inf:
                raise PeagleError(f"--temperature is {one} but must be at least 0; 0 is greedy.")
        self.temperature = [float(one) for one in self.temperature]
        if not self.temperature or self.temperature != sorted(set(self.temperature)):
            raise PeagleError(
                f"--temperature is {' '.join(map(str, self.temperature)) or 'empty'} but needs distinct and ascending "
                "numbers, for example 0 1."
            )
        at_least_1 = ("rounds", "max_tokens", "max_prompts", "max_model_len")
        check_ranges(self, dict.fromkeys(at_least_1, (1, math.inf)))
        if not 0 <= self.seed <= MAX_SEED - self.rounds + 1:
            raise PeagleError(
                f"--seed is {self.seed} but must be from 0 to {MAX_SEED - self.rounds + 1}: each later round adds 1."
            )
        if len({self.model, *self.compare}) <= len(self.compare):
            raise PeagleError("--model and --compare name a drafter twice. Name each once.")
        if self.endpoint is None and self.baseline_endpoint:
            raise PeagleError("--baseline-endpoint needs --endpoint, the server with the drafter. Add it.")
        if self.endpoint and self.vllm_args:
            raise PeagleError(
                "A running server has its own flags, so none can be given after -- with --endpoint. Start the server "
                "with them, or leave --endpoint out."
            )
        check_vllm_args(self.vllm_args)
        if asks_for_random_weights(self.vllm_args):
            raise PeagleError(
                "--load-format dummy stands after --, but a verifier of random weights accepts no drafter's tokens. "
                "Leave it out; peagle-hf plan measures speed with random weights."
            )
        of_the_server = (self.num_speculative_tokens, self.draft_sample_method, self.max_model_len, self.compare)
        if self.endpoint and any(of_the_server):
            raise PeagleError(
                "A running server has one drafter and its own --num-speculative-tokens, --draft-sample-method and "
                "--max-model-len. Leave these and --compare out with --endpoint, or leave --endpoint out, so that "
                "peagle-hf evaluate starts vLLM itself."
            )
