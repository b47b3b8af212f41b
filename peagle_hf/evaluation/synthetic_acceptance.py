"""vLLM's synthetic acceptance: it accepts as many drafted tokens as it is told to, whatever they are.

`check_synthetic_acceptance` needs no vLLM; the other functions run in a process of it.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import PeagleError
from ..serving.installed import InstalledVllm

SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 1.0}
"""Fields of vLLM's `--speculative-config` with which `set_acceptance_length` works."""


def check_synthetic_acceptance(installed: InstalledVllm) -> None:
    """Make sure that a vLLM has synthetic acceptance.

    Raises:
        PeagleError: this vLLM has no synthetic acceptance.
    """
    lacking = [name for name in SYNTHETIC if not installed.takes(name)]
    if lacking:
        raise PeagleError(
            f"vLLM {installed.version} has no synthetic acceptance ({' and '.join(lacking)} in its speculative "
            "configuration), without which a drafter can't be timed before it is trained. Install vLLM 0.26 to 0.33, "
            "or train a drafter and measure it with peagle-hf evaluate."
        )


def accept_synthetically_on_cpu() -> None:
    """Without a GPU, give this process's vLLM a sampling function with synthetic acceptance: its own refuses it."""
    from vllm.v1.sample import rejection_sampler

    if not torch.cuda.is_available():
        rejection_sampler.rejection_sample = _rejection_sample


def set_acceptance_length(llm: Any, length: float) -> None:
    """Let a running engine that was started with `SYNTHETIC` accept `length` - 1 tokens of each draft on average.

    Every draft has the whole part of these accepted, and some drafts one more, as with vLLM's own
    `synthetic_acceptance_length`.

    Args:
        llm: a `vllm.LLM`.
        length: from 1 to K + 1.

    Raises:
        PeagleError: this version of vLLM keeps the rates elsewhere.
    """
    if not any(llm.collective_rpc(_set_rates, args=(length,))):
        import vllm

        raise PeagleError(
            f"The acceptance of vLLM {vllm.__version__} can't be set while it runs. Install vLLM 0.26 to 0.33, whose "
            "first model runner can (VLLM_USE_V2_MODEL_RUNNER=0)."
        )


def _set_rates(worker: Any, length: float) -> bool:
    """Set the rates in one process of vLLM; false if it has none, such as the early stages of a pipeline."""
    accept_synthetically_on_cpu()  # with `--tensor-parallel-size` this is another process than the one that began
    sampler = getattr(worker.model_runner, "rejection_sampler", None)
    rates_K = getattr(sampler, "synthetic_conditional_rates", None)
    if rates_K is None:
        return False
    positions_K = torch.arange(len(rates_K), device=rates_K.device)
    rates_K.copy_((length - 1 - positions_K).clamp(0, 1))
    return True


def _rejection_sample(
    draft_token_ids: Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    bonus_token_ids: Tensor,
    sampling_metadata: Any,
    *,
    synthetic_conditional_rates: Tensor,
    **options: Any,
) -> Tensor:
    """vLLM's function of this name, for greedy requests and synthetic acceptance, which its CPU kernels refuse.

    Args:
        draft_token_ids: int64 [T], the drafts of all requests, one after another; negative ones are padding.
        num_draft_tokens: for each of the B requests.
        target_logits: [T, V].
        bonus_token_ids: [B, 1], the token after a draft of which all are accepted.
        synthetic_conditional_rates: float32 [K], acceptance by position if all before it are accepted.

    Returns:
        int32 [B, `max_spec_len` + 1], the tokens of each request, then -1.
    """
    drafted, chosen = draft_token_ids.tolist(), target_logits.argmax(-1).tolist()
    rates, draws = synthetic_conditional_rates.tolist(), torch.rand(len(drafted)).tolist()
    rows, start = [], 0
    for number, bonus in zip(num_draft_tokens, bonus_token_ids.flatten().tolist(), strict=True):
        places = range(start, start + number)
        accepts = [draws[place] < rates[place - start] and drafted[place] >= 0 for place in places]
        accepted = accepts.index(False) if False in accepts else number
        last = bonus if accepted == number else chosen[start + accepted]
        row = [*drafted[start : start + accepted], last]
        rows.append(row + [-1] * (max_spec_len + 1 - len(row)))
        start += number
    return torch.tensor(rows, dtype=torch.int32)
