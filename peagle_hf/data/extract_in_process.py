"""Run the verifier over prepared samples in this process, batch by batch: `peagle-hf extract` without `--endpoint`.

Shape letters: B samples of a batch, T tokens, A auxiliary layers, H the verifier's hidden size.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..console import progress_bar
from ..cpu import keep_freed_memory, pack_linear_layers
from ..errors import PeagleError
from ..verifier.loading import load_verifier
from ..verifier.parts import residual_streams, rotary_border, verifier_parts
from .cache_storage import FP8_STORAGES, CachedStates, all_finite
from .errors import RowError

if TYPE_CHECKING:
    import datasets

    from .extract import ExtractArguments

logger = logging.getLogger(__name__)

MAX_PADDING = 0.05
"""Largest share of padding in a sample of a batch."""
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 8192
"""Tokens of a batch, its padding included, unless `--max-batch-tokens` says otherwise."""
CPU_BATCHES, GPU_BATCHES = 2, 4
"""Batches that are computed at the same time: one uses the device while another waits or is written to disk."""


def computing_dtype(device: str | torch.device | None, verifier_dtype: str) -> str | None:
    """What the verifier computes in (see `load_for_extraction`); None without a device: a server doesn't say it."""
    if device is None:
        return None
    if verifier_dtype != "auto":
        return verifier_dtype
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"


def load_for_extraction(
    name_or_path: str,
    device: str | torch.device,
    verifier_dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load the verifier for inference; on a CPU its linear layers are packed for oneDNN.

    Args:
        verifier_dtype: the name of a dtype; "auto": float32 on a CPU, else bfloat16.

    Raises:
        PeagleError: the verifier can't be loaded (see `load_verifier`), or its architecture isn't known.
    """
    dtype = getattr(torch, str(computing_dtype(device, verifier_dtype)))
    model = load_verifier(name_or_path, dtype, device, revision, trust_remote_code)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
        pack_linear_layers(verifier_parts(model).decoder)
    return model


def extract_in_process(
    arguments: "ExtractArguments",
    model: PreTrainedModel,
    aux_layer_ids: Sequence[int],
    data: "datasets.Dataset",
    lengths: dict[int, int],
    write: Callable[[int, CachedStates], None],
) -> float:
    """Run the verifier over samples and hand the states of each to `write`.

    Args:
        lengths: tokens of each sample to extract, by its row in `data`.
        write: called from several threads with a sample's row and its states, plain or, for float8 kinds, float8 ones.

    Returns:
        Seconds that this took.

    Raises:
        RowError: a sample's states aren't finite.
        PeagleError: a sample has ids outside the verifier's vocabulary, or `write` raised this.
    """
    num_tokens = sum(lengths.values())
    on_cpu = model.device.type == "cpu"
    max_tokens = arguments.max_batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    batches = plan_batches(lengths, max_tokens, rotary_border(model.config))
    num_cores = torch.get_num_threads()
    at_once = batches_at_once(model.device)
    own = threading.local()

    def begin() -> None:
        torch.set_num_threads(max(1, num_cores // at_once))
        use_device(model.device)
        own.model = replica(model)

    def extract_batch(rows: Sequence[int]) -> int:
        for row, states in _finite_states(arguments, own.model, aux_layer_ids, data, rows):
            write(row, states)
        return sum(lengths[row] for row in rows)

    start = time.perf_counter()
    try:
        with (
            progress_bar(total=num_tokens, desc="Extracting", unit="tok", unit_scale=True) as progress,
            ThreadPoolExecutor(at_once, initializer=begin) as pool,
        ):
            for num_done in pool.map(extract_batch, batches):
                progress.update(num_done)
    finally:
        torch.set_num_threads(num_cores)
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.1f s: %.0f tokens/s.", num_tokens, seconds, num_tokens / seconds)
    return seconds


def _finite_states(
    arguments: "ExtractArguments",
    model: PreTrainedModel,
    aux_layer_ids: Sequence[int],
    data: "datasets.Dataset",
    rows: Sequence[int],
) -> Iterator[tuple[int, CachedStates]]:
    """The states of each sample of a batch on the CPU, plain or, for float8 kinds, float8 ones.

    Raises:
        RowError: those of a sample aren't finite.
    """
    are_finite, computed = [], []
    for states in run_verifier(model, aux_layer_ids, data, rows, getattr(torch, arguments.dtype)):
        are_finite.append(all_finite(states.states))
        computed.append((states.stored_as("fp8") if arguments.storage in FP8_STORAGES else states).to_cpu())
    # This waits for the device only once. By then other threads have queued batches, and a second wait would wait for
    # those too.
    for row, is_finite, states in zip(rows, torch.stack(are_finite).tolist(), computed, strict=True):
        if not is_finite:
            raise RowError(
                row,
                arguments.preprocessed_data,
                reason=f"the verifier's hidden states are not finite as {arguments.dtype}; nothing of the row was "
                "written, the rows before it are kept",
                advice="try --verifier-dtype float32 or --dtype bfloat16, look at the row's text, or leave it out "
                f"with --skip-rows {row}",
            )
        yield row, states


def batches_at_once(device: torch.device) -> int:
    """How many batches are computed at the same time; on a GPU that doesn't depend on the threads of PyTorch.

    torchrun leaves each of several processes one such thread.
    """
    return min(CPU_BATCHES, torch.get_num_threads()) if device.type == "cpu" else GPU_BATCHES


def use_device(device: str | torch.device) -> None:
    """Make a GPU with a number the current one of this thread, on which Triton's kernels run."""
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)


def plan_batches(
    lengths: dict[int, int], max_tokens: int, border: float = math.inf, max_padding: float = MAX_PADDING
) -> list[list[int]]:
    """Group samples of similar length, longest first, into batches of at most `max_tokens` tokens, padding included.

    The longest come first so that a lack of memory shows at once. A sample longer than `max_tokens` is a batch of its
    own.

    Args:
        lengths: tokens of each sample, by row.
        border: samples of more tokens than this are in no batch with shorter ones, see `rotary_border`.
        max_padding: largest share of padding in a sample of a batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        fits = batches and (len(batches[-1]) + 1) * longest <= max_tokens
        is_apart = lengths[row] <= border < longest
        if fits and not is_apart and lengths[row] >= (1 - max_padding) * longest:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = lengths[row]
    return batches


@torch.inference_mode()
def run_verifier(
    model: PreTrainedModel,
    layer_ids: Sequence[int],
    data: "datasets.Dataset",
    rows: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[CachedStates]:
    """Run transformers' decoder, without its head, on one batch.

    Yields:
        Of each sample its states [T, A+1, H] on the verifier's device, and its token ids on the CPU.

    Raises:
        PeagleError: a sample has ids outside the verifier's vocabulary, or the architecture isn't known.
    """
    samples = [torch.tensor(token_ids) for token_ids in data.select(rows)["input_ids"]]
    for row, token_ids in zip(rows, samples, strict=True):
        check_vocabulary(model, row, token_ids)
    # A causal model doesn't see padding on the right, so no attention mask is needed.
    states_BTAH = residual_streams(model, layer_ids, pad_sequence(samples, batch_first=True), dtype)
    for token_ids, states_TAH in zip(samples, states_BTAH, strict=True):
        yield CachedStates(token_ids, states_TAH[: len(token_ids)])


def check_vocabulary(model: PreTrainedModel, row: int, token_ids: Tensor) -> None:
    """Make sure that a verifier knows all tokens of a sample.

    Raises:
        PeagleError: ids are outside its vocabulary.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    if not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        raise PeagleError(
            f"Row {row} has token ids {int(token_ids.min())} to {int(token_ids.max())}, but the verifier's "
            f"vocabulary has {vocab_size} tokens: the data was prepared with another tokenizer. Run peagle-hf "
            "prepare with this verifier."
        )


def replica(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares the weights, for another thread: forward hooks belong to modules."""
    return deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
