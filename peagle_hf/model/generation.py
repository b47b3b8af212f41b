"""Draft and verify in plain transformers: the reference for what vLLM does with a drafter, greedy or sampling.

    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    verifier.generate(**inputs, custom_generate=draft_and_verify, drafter=drafter, max_new_tokens=128)

Each round the drafter proposes K tokens in one forward pass, from its distributions `q`, and the verifier reads them
in one of its own, which gives its distributions `p`. A token `x` is accepted with probability
`min(1, p(x) / q(x))`; the first one that isn't is drawn anew from `max(0, p - q)`, normalised, and after K
accepted ones another is drawn from `p` (arXiv 2211.17192). So the text is distributed as the verifier's own. Greedy
decoding is the same with all probability on the argmax.

Both models keep their keys and values in the same places: place s has the verifier's token x[s], and the drafter's
token x[s + 1] and states g[s]. What all sequences reject is cut off, what only some reject is masked out from then on.

Shape letters: B sequences, S places, K drafted tokens, V verifier vocabulary.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.utils import ModelOutput

from ..errors import PeagleError
from ..verifier.parts import recorded_streams, rotary_border
from .drafter import PeagleForSpeculation

# transformers 5.24 renamed a model's `past_key_values` to `cache`.
RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if RENAMED else "past_key_values"
ONCE_EACH_TOKEN = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
PREPARED_BY_GENERATE = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep"}
OF_IMAGES = "mm_encoder_outputs"
"""What `generate` passes to multimodal models from transformers 5.24 on, empty for a text alone."""


@dataclass
class DraftAndVerifyOutput(ModelOutput):
    """What `draft_and_verify` returns with `return_dict_in_generate=True`.

    The counts are vLLM's: a draft is one round of one sequence, and all that the verifier accepts of it counts, also
    behind the end of the text. The first token, which comes with the prompt, needs no draft.

    Args:
        sequences: int64 [B, T], prompts and answers, padded.
        num_drafts: rounds of all sequences together.
        accepted_by_position: of each of the K positions, in how many drafts it was accepted.
    """

    sequences: Tensor | None = None
    num_drafts: int | None = None
    accepted_by_position: list[int] | None = None

    @property
    def acceptance_length(self) -> float:
        """Tokens that a forward pass of the verifier yields: 1 + accepted tokens / drafts."""
        return 1 + sum(self.accepted_by_position or []) / max(self.num_drafts or 0, 1)


def draft_and_verify(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drafter: PeagleForSpeculation,
    num_speculative_tokens: int | None = None,
    draft_sample_method: str = "probabilistic",
    **model_kwargs: Any,
) -> DraftAndVerifyOutput | Tensor:
    """Generate with a drafter; pass it to the verifier's `generate` as `custom_generate`.

    `generate` prepares everything but the last two arguments, so its own mean what they always mean: sampling and its
    temperature, `max_new_tokens`, stop tokens, left-padded prompts, `return_dict_in_generate`. Only a `streamer`
    gets the prompt alone, as `generate` doesn't hand it on.

    Args:
        drafter: in evaluation mode; on any device.
        num_speculative_tokens: K, from 1 on; default: as many as the drafter was trained for.
        draft_sample_method: how tokens are drafted where the text is sampled, as of vLLM's `--speculative-config`:
            `probabilistic` draws them from the drafter's distribution, `greedy` takes its most likely ones. The text is
            distributed alike with both. What narrows or changes the verifier's distribution, such as `top_p`, does so
            with the drafter's too; vLLM heeds only the temperature there, and often accepts fewer.

    Raises:
        PeagleError: the drafter belongs to another verifier, or the verifier or an argument isn't supported.
    """
    num_tokens = drafter.config.num_depths if num_speculative_tokens is None else num_speculative_tokens
    _check(
        model,
        drafter,
        input_ids,
        logits_processor,
        generation_config,
        num_tokens,
        draft_sample_method,
        model_kwargs,
    )
    draws_drafts = generation_config.do_sample and draft_sample_method == "probabilistic"
    decoding = _Decoding(
        model, drafter, input_ids, logits_processor, generation_config, model_kwargs, num_tokens, draws_drafts
    )
    num_drafts, accepted_by_position = decoding.run(stopping_criteria)
    pad_token = generation_config._pad_token_tensor
    padding = 0 if pad_token is None else int(pad_token)
    sequences = pad_sequence(decoding.texts, batch_first=True, padding_value=padding)
    if not generation_config.return_dict_in_generate:
        return sequences
    return DraftAndVerifyOutput(sequences, num_drafts, accepted_by_position.tolist())


class _Decoding:
    """The texts of one call of `draft_and_verify`, and the caches of both models.

    Attributes:
        texts: B sequences, int64 [any], that grow.
        block: int64 [B, any], the tokens that the verifier reads next; its end are the `drafts`.
        mask: bool [B, S], which places of the caches and of the block are part of the texts.
        drafts: int64 [B, K], empty in the first round.
        chances: [B, K, V], the distributions that the drafts were drawn from.
        draws_drafts: whether drafts are drawn from the drafter's distributions, or its most likely tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: PeagleForSpeculation,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        num_tokens: int,
        draws_drafts: bool,
    ):
        self.model, self.drafter, self.num_tokens = model, drafter, num_tokens
        self.logits_processor, self.do_sample = logits_processor, generation_config.do_sample
        self.draws_drafts = draws_drafts
        self.takes_num_logits = "logits_to_keep" in model_kwargs
        self.layer_ids = drafter.config.eagle_aux_hidden_state_layer_ids
        self.verifier_cache, self.drafter_cache = DynamicCache(), DynamicCache()
        attention_mask = model_kwargs.get("attention_mask")
        self.texts = list(input_ids)
        self.block, self.drafts = input_ids, input_ids[:, :0]
        self.mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        self.chances = torch.zeros(len(input_ids), 0, drafter.config.vocab_size, device=input_ids.device)

    def run(self, stopping_criteria: StoppingCriteriaList) -> tuple[int, Tensor]:
        """Let the texts grow until all have ended.

        Returns:
            the number of drafts, and of each position the number of drafts in which it was accepted, int64 [K].
        """
        running = torch.ones(len(self.texts), dtype=torch.bool, device=self.block.device)
        num_drafts, accepted_by_position = 0, torch.zeros(self.num_tokens, dtype=torch.long)
        positions = torch.arange(self.num_tokens, device=running.device)
        with recorded_streams(self.model, self.layer_ids, self.drafter.dtype) as streams:
            while True:
                num_accepted, next_tokens = accept(self.drafts, self.chances, self.verify())
                num_accepted = torch.where(running, num_accepted, 0)
                if self.drafts.shape[1]:
                    num_drafts += int(running.sum())
                    accepted_by_position += (num_accepted[:, None] > positions).sum(0).cpu()
                self.grow(running, num_accepted, next_tokens, stopping_criteria)
                if not running.any():
                    return num_drafts, accepted_by_position
                shifted = self.drop_rejected(num_accepted, next_tokens)
                states = torch.cat([streams[id_].to(self.drafter.device) for id_ in self.layer_ids], dim=-1)
                self.drafts, self.chances = self.draft(shifted, states[:, : shifted.shape[1]])
                self.block = torch.cat([next_tokens[:, None], self.drafts], dim=1)
                self.mask = F.pad(self.mask, (0, self.block.shape[1]), value=True)

    def verify(self) -> Tensor:
        """The verifier's distributions [B, K + 1, V] at the drafts and after them; its states go to the streams."""
        num_logits = self.drafts.shape[1] + 1
        logits = self.model(
            input_ids=self.block,
            attention_mask=self.mask.long(),
            position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.block.shape[1] :],
            use_cache=True,
            **{CACHE: self.verifier_cache},
            **({"logits_to_keep": num_logits} if self.takes_num_logits else {}),
        ).logits[:, -num_logits:]
        logits = logits.to(self.block.device, torch.float32)
        texts = [append(self.texts, self.drafts[:, :k]) for k in range(num_logits)]
        each = [self.probabilities(texts[k], logits[:, k], self.do_sample) for k in range(num_logits)]
        return torch.stack(each, 1)

    def draft(self, block: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """K tokens [B, K] and their distributions [B, K, V], which are zero outside the draft vocabulary."""
        drafter, device, token_ids = self.drafter, self.drafter.device, self.drafter.draft_token_ids
        mask = self.mask.to(device)
        scores = drafter.draft(block.to(device), states, mask, self.num_tokens, self.drafter_cache)
        logits = scores.new_full((*scores.shape[:2], drafter.config.vocab_size), -torch.inf, dtype=torch.float32)
        logits[:, :, slice(None) if token_ids is None else token_ids] = scores.float()
        drafts, chances = block[:, :0], []
        for at_depth in logits.to(block.device).unbind(1):
            chances.append(self.probabilities(append(self.texts, drafts), at_depth, self.draws_drafts))
            drafts = torch.cat([drafts, chances[-1].multinomial(1)], dim=1)
        return drafts, torch.stack(chances, dim=1)

    def probabilities(self, texts: list[Tensor], logits: Tensor, is_drawn: bool) -> Tensor:
        """The distribution of the next token after each text, [B, V], from the logits there.

        Args:
            is_drawn: False if the most likely token is taken, which then has all probability.
        """
        logits = process(self.logits_processor, texts, logits)
        if is_drawn:
            # If a processor forbids the whole draft vocabulary, softmax gives NaN, and any distribution will do as a
            # proposal.
            return logits.softmax(-1).nan_to_num(1 / logits.shape[1])
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)

    def grow(
        self, running: Tensor, num_accepted: Tensor, next_tokens: Tensor, stopping_criteria: StoppingCriteriaList
    ) -> None:
        """Append the accepted drafts and the next token to the running texts; those that end stop running."""
        for number in running.nonzero().flatten().tolist():
            new = torch.cat([self.drafts[number, : num_accepted[number]], next_tokens[number, None]])
            for token in new:
                self.texts[number] = torch.cat([self.texts[number], token[None]])
                if stopping_criteria(self.texts[number][None], None).all():
                    running[number] = False
                    break

    def drop_rejected(self, num_accepted: Tensor, next_tokens: Tensor) -> Tensor:
        """Remove what all sequences reject from the cache, and mask what only some reject.

        Returns:
            int64 [B, places of the block that are left], the token that the drafter sees at each: the one after it.
        """
        num_rejected = self.drafts.shape[1] - int(num_accepted.max())
        if num_rejected:
            self.verifier_cache.crop(-num_rejected)
        start, stop = self.mask.shape[1] - self.block.shape[1], self.mask.shape[1] - num_rejected
        last = self.mask.shape[1] - self.drafts.shape[1] - 1 + num_accepted
        self.mask = self.mask[:, :stop] & (torch.arange(stop, device=self.mask.device) <= last[:, None])
        shifted = torch.cat([self.block[:, 1:], next_tokens[:, None]], dim=1)
        return shifted.scatter(1, last[:, None] - start, next_tokens[:, None])[:, : stop - start]


def accept(drafts: Tensor, chances: Tensor, target_chances: Tensor) -> tuple[Tensor, Tensor]:
    """Rejection sampling (see the module).

    Args:
        drafts: int64 [B, K], drawn from `chances`.
        chances: q, [B, K, V].
        target_chances: p, [B, K + 1, V], of the drafts and of the token after them.

    Returns:
        How many drafts are accepted, and the token that follows them, int64 [B] each.
    """
    q, p = (each.gather(2, drafts[..., None]).squeeze(2) for each in (chances, target_chances[:, :-1]))
    num_accepted = (torch.rand_like(p) < p / q).long().cumprod(1).sum(1)
    place = num_accepted[:, None, None].expand(-1, 1, target_chances.shape[2])
    target = target_chances.gather(1, place).squeeze(1)
    left = (target - F.pad(chances, (0, 0, 0, 1)).gather(1, place).squeeze(1)).clamp(min=0)
    # If both distributions are equal, rounding may leave nothing of their difference.
    left = torch.where(left.sum(1, keepdim=True) > 0, left, target)
    return num_accepted, left.multinomial(1).squeeze(1)


def process(processors: LogitsProcessorList, texts: list[Tensor], logits: Tensor) -> Tensor:
    """Apply the logits processors to the logits [B, V] that follow B texts of different lengths.

    A processor may keep something of each sequence of the batch, as the repetition penalty does from transformers 5.23
    on. So it is called with all B sequences, once for each length that occurs. In each call only the logits of the
    texts that have this length are taken from its answer; the other texts are cut or filled up to the length.
    """
    processed = logits.clone()
    for length in {len(text) for text in texts} if processors else ():
        fitted = [torch.cat([text[:1].expand(max(length - len(text), 0)), text[:length]]) for text in texts]
        chosen = torch.tensor([len(text) == length for text in texts], device=logits.device)
        given = processors(torch.stack(fitted), logits.clone())  # type: ignore[arg-type]
        processed[chosen] = given[chosen]
    return processed


def append(texts: list[Tensor], drafts: Tensor) -> list[Tensor]:
    """The texts, each with its drafts [B, any] behind it."""
    return [torch.cat(pair) for pair in zip(texts, drafts, strict=True)]


def _check(
    model: PreTrainedModel,
    drafter: PeagleForSpeculation,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    num_tokens: int,
    draft_sample_method: str,
    model_kwargs: dict[str, Any],
) -> None:
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    superfluous = sorted(model_kwargs.keys() - PREPARED_BY_GENERATE)
    if not model_kwargs.get(OF_IMAGES):
        superfluous = [name for name in superfluous if name != OF_IMAGES]
    border, longest = rotary_border(config), generation_config.max_length + num_tokens
    if generation_config.return_dict_in_generate:
        superfluous += [name for name in ("output_scores", "output_logits") if getattr(generation_config, name)]
    attention_mask = model_kwargs.get("attention_mask")
    ours = (drafter.config.hidden_size, drafter.config.vocab_size)
    wrong = []
    if ours != (config.hidden_size, config.vocab_size):
        wrong.append(
            f"the drafter was made for hidden size {ours[0]} and vocabulary {ours[1]}, the verifier has "
            f"{config.hidden_size} and {config.vocab_size}"
        )
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        wrong.append("the verifier keeps more than keys and values, so rejected tokens can't be removed from its cache")
    if input_ids.shape[1] <= border < longest:
        wrong.append(
            f"the verifier's rotary embedding is another one for texts of more than {border} tokens, which prompt, "
            f"answer and {num_tokens} drafted tokens may reach ({longest}); set a smaller max_new_tokens"
        )
    if DynamicSlidingWindowLayer in kinds and len(input_ids) > 1:
        wrong.append("the verifier has a sliding window, so prompts must come one at a time")
    if superfluous:
        wrong.append(f"arguments are not supported: {', '.join(superfluous)}")
    if attention_mask is not None and not attention_mask[:, -1].all():
        wrong.append("prompts are padded on the right, where the text would go on; pad them on the left")
    if not isinstance(num_tokens, int) or num_tokens < 1:
        wrong.append(f"num_speculative_tokens is {num_tokens} but must be a whole number from 1 on")
    if draft_sample_method not in ("probabilistic", "greedy"):
        wrong.append(f"draft_sample_method is {draft_sample_method!r} but must be 'probabilistic' or 'greedy'")
    if generation_config.num_beams != 1:
        wrong.append("beam search is not supported")
    if any(isinstance(processor, ONCE_EACH_TOKEN) for processor in logits_processor):
        wrong.append("guidance_scale and SynthID watermarks are not supported: they must see each token once, in order")
    if wrong:
        raise PeagleError(f"draft_and_verify can't run: {'; '.join(wrong)}.")
