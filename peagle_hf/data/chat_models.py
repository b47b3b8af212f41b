"""Chat models that answer prompts: run by transformers in this process, or by vLLM servers.

An answer depends on the token ids before it, the sampling settings and the answer's seed, not on the other prompts of
its batch (up to the rounding of batched arithmetic).
"""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..cpu import pack_linear_layers
from ..errors import PeagleError
from ..verifier.loading import load_verifier
from .answer_markers import find_answer_markers
from .chat_template import ChatRenderer
from .chats import Unlearnable
from .endpoint import ask_any, concurrently, endpoint_urls, served_model
from .errors import EndpointError, RefusedEndpointError
from .tokenizer import ChatOptions, load_tokenizer, no_default_template

_PLACEHOLDER = "PLACEHOLDER"

Batch = list[int]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. `min_p`, `top_k` and `top_p` are applied in this order, as in vLLM.

    Args:
        temperature: 0 takes the likeliest token and ignores the other settings.
        top_p: keep the likeliest tokens that together have this probability.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        min_p: keep tokens with at least this share of the likeliest one's probability.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class ChatModel(ABC):
    """A model that answers prompts, with its tokenizer and chat template.

    Args:
        name: a folder or a hub name.
        max_new_tokens: longest answer.
        trust_remote_code: run code that comes with the model.
        options: a chat template instead of the model's own, and the template's variables.

    Raises:
        PeagleError: the model can't be loaded, or is no chat model.
    """

    batch_size: int
    """Number of chats that are answered together."""

    def __init__(self, name: str, max_new_tokens: int, trust_remote_code: bool, options: ChatOptions | None = None):
        self.name, self.max_new_tokens, self.options = name, max_new_tokens, options or ChatOptions()
        self.tokenizer = load_tokenizer(name, trust_remote_code)
        if self.options.template is not None:
            self.tokenizer.chat_template = self.options.template
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            ends = _generation_config(name, config).eos_token_id
        except (OSError, ValueError) as error:
            raise _not_loaded(name, error) from error
        template = self.tokenizer.chat_template
        if template is None or (isinstance(template, dict) and "default" not in template):
            raise no_default_template(self.tokenizer)
        self.renderer = ChatRenderer(self.tokenizer, self.options.kwargs)
        markers = find_answer_markers(self.tokenizer, self.options.kwargs).by_segment.values()
        shown = "".join(f"{marker.opening}{marker.closing or ''}" for marker in markers)
        added = self.tokenizer.added_tokens_decoder.items()
        self._hidden_ids = {id_ for id_, token in added if token.special and token.content not in shown}
        self.end_ids = {self.tokenizer.eos_token_id} if ends is None else {ends} if isinstance(ends, int) else set(ends)
        if None in self.end_ids:
            raise PeagleError(
                f"Neither the generation_config.json nor the tokenizer of {name} names a token that ends an answer, so "
                "none would end. Add eos_token_id to the generation_config.json."
            )
        self.max_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)

    @abstractmethod
    def complete(
        self, prompts: list[list[int]], end_ids: set[int], sampling: Sampling, seeds: list[int]
    ) -> list[list[int]]:
        """The answer to each prompt as token ids, up to and including the first id of `end_ids`.

        Args:
            prompts: token ids of each.
            seeds: of each answer, 0 .. 2^63 - 1.

        Raises:
            RefusedEndpointError: the servers refuse a prompt. The message names no server.
            EndpointError: the servers failed in another way.
        """

    @abstractmethod
    def run_batches(self, batches: Sequence[Batch], work: Callable[[Batch], None]) -> Iterator[Batch]:
        """Call `work` on each batch and yield the batches in completion order.

        Raises:
            PeagleError: some batches failed; all others were yielded before, unless too many failed in succession.
        """

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_after(self, end: str, text: str) -> list[int]:
        """The token ids of a text that follows a special token (empty at the beginning of a chat).

        The token may take in the white space after it, and some tokenizers put a space before a text that has none.
        """
        anchor = self.encode(end)
        ids = self.encode(end + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text)

    def content(self, ids: list[int]) -> str:
        """The text of an answer, of whose special tokens only those are left that enclose reasoning or a tool call."""
        return self.decode([id_ for id_ in ids if id_ not in self._hidden_ids], skip_special_tokens=False).strip()

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )

    def user_turn(self) -> tuple[list[int], set[int]]:
        """The token ids up to a user's first words, and the set of ids that end a user's turn.

        Raises:
            PeagleError: the chat template writes no tag before a user's words.
        """
        try:
            text = self.renderer.prompt([{"role": "user", "content": _PLACEHOLDER}], add_generation_prompt=False)
        except Unlearnable:
            text = ""
        before, placeholder, after = text.partition(_PLACEHOLDER)
        if not placeholder or not before:
            raise PeagleError(
                f"The chat template of {self.name} doesn't write what the user says after a tag, so no prompt can be "
                "invented. Give prompts with --prompts instead of --invent."
            )
        tags = [token_id for token_id in self.encode(after) if token_id in self.tokenizer.added_tokens_decoder]
        return self.encode(before), self.end_ids | set(tags[:1])


class LocalChatModel(ChatModel):
    """A model that transformers runs in this process.

    Args:
        dtype: auto is float32 on CPU, the checkpoint's own on GPU.
    """

    def __init__(
        self,
        name: str,
        max_new_tokens: int,
        trust_remote_code: bool,
        batch_size: int,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        options: ChatOptions | None = None,
    ):
        super().__init__(name, max_new_tokens, trust_remote_code, options)
        self.batch_size = batch_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        own = "float32" if dtype == "auto" and device == "cpu" else dtype
        self.model: Any = load_verifier(name, own, device, trust_remote_code=trust_remote_code)
        pack_linear_layers(self.model)
        # The checkpoint's recommendations for sampling, such as a repetition penalty, would change the model's own
        # text.
        self.model.generation_config = GenerationConfig()

    @torch.inference_mode()
    def complete(
        self, prompts: list[list[int]], end_ids: set[int], sampling: Sampling, seeds: list[int]
    ) -> list[list[int]]:
        width = max(map(len, prompts))
        pad_id = min(end_ids)
        input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        drawing = [_Draw(sampling, seeds, self.model.device)] if sampling.temperature > 0 else []
        sequences = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList(drawing),
            eos_token_id=sorted(end_ids),
            pad_token_id=pad_id,
        )
        return [_up_to_end(ids, end_ids) for ids in sequences[:, width:].tolist()]

    def run_batches(self, batches: Sequence[Batch], work: Callable[[Batch], None]) -> Iterator[Batch]:
        for batch in batches:
            work(batch)
            yield batch


class _Draw(LogitsProcessor):
    """Samples by the Gumbel trick: adds noise to the logits so that greedy search draws tokens at random.

    The noise is -log e with e exponentially distributed, so the largest sum is at token i with the probability
    softmax(logits)_i. Each answer has a random generator of its own.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.min_p > 0:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        logits: Tensor = self.warpers(input_ids, scores.float())
        return logits - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


class ServedChatModel(ChatModel):
    """A model that is run by vLLM servers; any of them can answer any prompt.

    Args:
        endpoint: URL[,URL...]
        concurrency: chats that are answered at the same time.
        request_timeout: seconds to wait for an answer.
        max_retries: how often a request that fails is repeated at each server.
    """

    batch_size = 1

    def __init__(
        self,
        name: str,
        max_new_tokens: int,
        trust_remote_code: bool,
        endpoint: str,
        concurrency: int,
        request_timeout: float,
        max_retries: int,
        options: ChatOptions | None = None,
    ):
        self.urls = endpoint_urls(endpoint)
        served_model(self.urls, name, request_timeout, f"vllm serve {shlex.quote(name)}")
        super().__init__(name, max_new_tokens, trust_remote_code, options)
        self.concurrency, self.request_timeout, self.max_retries = concurrency, request_timeout, max_retries
        limits = [
            ask_any([url], request_timeout, max_retries, lambda server: server.max_model_len) for url in self.urls
        ]
        self.max_length = min((limit for limit in [self.max_length, *limits] if limit is not None), default=None)

    def complete(
        self, prompts: list[list[int]], end_ids: set[int], sampling: Sampling, seeds: list[int]
    ) -> list[list[int]]:
        def answer(prompt: list[int], seed: int) -> list[int]:
            fields = {**asdict(sampling), "seed": seed} if sampling.temperature > 0 else {"temperature": 0}
            try:
                return ask_any(
                    self.urls,
                    self.request_timeout,
                    self.max_retries,
                    lambda server: server.complete(prompt, self.max_new_tokens, end_ids, fields),
                )
            except RefusedEndpointError as error:
                raise RefusedEndpointError(error.reason) from error

        return [answer(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def run_batches(self, batches: Sequence[Batch], work: Callable[[Batch], None]) -> Iterator[Batch]:
        reasons: list[str] = []
        in_turn = 0
        for batch, result in concurrently(work, batches, min(self.concurrency, len(batches))):
            if isinstance(result, EndpointError):
                reasons.append(str(result))
                in_turn += 1
            elif isinstance(result, BaseException):
                raise result
            else:
                in_turn = 0
                yield batch
            if in_turn == self.concurrency:
                break
        if reasons:
            raise PeagleError(
                f"{len(reasons)} of {len(batches)} requests to the servers failed, the first with: {reasons[0]}. What "
                f"is finished is kept. Make sure that the servers are up and run {self.name}, and that VLLM_API_KEY is "
                "their key if they have one, and run the same command again: it asks for the rest. A prompt that fails "
                "every time can be taken out of its file; the other answers stay."
            )


def _generation_config(name: str, config: Any) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # the checkpoint has no generation_config.json
        return GenerationConfig.from_model_config(config)


def _not_loaded(name: str, error: Exception) -> PeagleError:
    return PeagleError(f"The model {name} can't be loaded: {error} Check the folder, or the hub name and the network.")


def _up_to_end(ids: list[int], end_ids: set[int]) -> list[int]:
    return ids[: next((index + 1 for index, token_id in enumerate(ids) if token_id in end_ids), len(ids))]
