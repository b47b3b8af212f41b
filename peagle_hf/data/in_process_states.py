"""Hidden states of samples without a file, computed by the verifier in the process that trains, ahead of their step.

Loader workers can't run the verifier, so `HiddenStatesDataset` gives such samples without states, `CODDataCollator`
notes in the batch what is lacking, and `completed` computes it in the main process, in a thread and on a CUDA stream of
its own, while the drafter trains on the batches before.

Shape letters: T tokens, L layers (the auxiliary ones and the last), A auxiliary layers, H the verifier's hidden size, N
tokens that are a target.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..verifier.head import check_logits
from ..verifier.parts import residual_streams, rotary_border, verifier_parts
from .collator import TO_GENERATE, StatesRequest
from .extract_in_process import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, load_for_extraction, plan_batches

GPU_PADDING = 0.35
"""Largest share of padding in a sample on a GPU: to start the kernels of another pass of the verifier takes longer than
to compute so much padding."""

STATES = ("hidden_states", "target_states")
"""Keys of a batch for what a `StatesRequest` asks for."""

States = tuple[Tensor, Tensor]
"""The states of a sample's positions, [T - 2, A * H], and of its targets, [N, H]."""


Compute = Callable[[list[StatesRequest], torch.device], list[States]]
"""Gives the states of each requested sample on a device."""


class InProcessVerifier:
    """A verifier in this process, as a source of hidden states; it is loaded when it is first needed.

    It can be sent to loader workers, which only tell by it that states are computed elsewhere.

    Args:
        name_or_path: the verifier, a hub name or a folder.
        layer_ids: the auxiliary layers, by number of layers passed; the last one's states are always added.
        device: where it runs; also another GPU than the drafter's.
        revision: on the hub.
        trust_remote_code: let the verifier run code from its repository.
    """

    def __init__(
        self,
        name_or_path: str,
        layer_ids: Sequence[int],
        device: torch.device | str,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.name_or_path, self.layer_ids, self.device = name_or_path, tuple(layer_ids), torch.device(device)
        self._revision, self._trust_remote_code = revision, trust_remote_code
        self._model: PreTrainedModel | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None, "_pool": None, "_streams": {}}

    def load(self) -> PreTrainedModel:
        """Load the verifier without its head, unless it is there already.

        Raises:
            PeagleError: the verifier can't be loaded or run here, or its head doesn't give its own logits.
        """
        if self._model is None:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                model = load_for_extraction(
                    self.name_or_path, self.device, revision=self._revision, trust_remote_code=self._trust_remote_code
                )
                check_logits(model)
            # The verifier's head is not run here: the objective has its own copy.
            head = verifier_parts(model).head
            for parent in list(model.modules()):
                for name, child in parent.named_children():
                    if child is head:
                        setattr(parent, name, nn.Identity())
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._model = model
        return self._model

    # A backward pass can't use tensors that were made in inference mode.
    @torch.no_grad()
    def states(self, samples: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The residual streams [T, L, H] of samples, int64 [T] each, on the verifier's device."""
        model, lengths = self.load(), {index: len(token_ids) for index, token_ids in enumerate(samples)}
        found: dict[int, Tensor] = {}
        for batch in batches_of_a_step(lengths, self.device.type, rotary_border(model.config)):
            ids_BT = pad_sequence([samples[index] for index in batch], batch_first=True)
            for index, states_TLH in zip(batch, residual_streams(model, self.layer_ids, ids_BT, dtype), strict=True):
                found[index] = states_TLH[: lengths[index]]
        return [found[index] for index in range(len(samples))]

    def completed(
        self,
        batches: Iterable[dict[str, Any]],
        compute: Compute,
        ahead: int,
    ) -> Iterator[dict[str, Any]]:
        """Give batches with the states that they lack, which a thread computes for the `ahead` batches that follow.

        An error of `batches` is raised after the batches before it, as without fetching ahead.

        Args:
            compute: called in the thread.

        Raises:
            RowError: `compute` or `batches` raised this.
        """
        failures: list[Exception] = []

        def until_failure() -> Iterator[dict[str, Any]]:
            try:
                yield from batches
            except Exception as error:
                failures.append(error)

        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "verifier")
        # Starting the thread now makes sure that nothing runs in it while loader workers are forked.
        self._pool.submit(int).result()
        pending: deque[tuple[dict[str, Any], list[StatesRequest], Future[list[States]]]] = deque()
        try:
            for batch in until_failure():
                requests: list[StatesRequest] = batch.get(TO_GENERATE, [])
                future = self._pool.submit(self._beside, compute, requests, batch["input_ids"].device)
                pending.append((batch, requests, future))
                if len(pending) > ahead:
                    yield _complete(*pending.popleft())
            while pending:
                yield _complete(*pending.popleft())
            if failures:
                raise failures[0]
        finally:
            for _, _, unused in pending:
                unused.cancel()

    def _beside(self, compute: Compute, requests: list[StatesRequest], device: torch.device) -> list[States]:
        """Call `compute` on CUDA streams of this thread; when it returns, they are done."""
        if not requests:
            return []
        with ExitStack() as stack:
            # Triton's kernels run on the current device, so the verifier's own device comes last.
            for one in (device, self.device):
                if one.type == "cuda":
                    stream = self._streams[one] = self._streams.get(one) or torch.cuda.Stream(one)
                    stack.enter_context(torch.cuda.stream(stream))
                    stack.callback(stream.synchronize)
            return compute(requests, device)


def batches_of_a_step(lengths: dict[int, int], device: str, border: float = math.inf) -> list[list[int]]:
    """Group the samples of a step into batches for the verifier.

    Args:
        lengths: tokens of each sample.
        device: its kind, such as "cuda".
        border: see `plan_batches`.
    """
    if device == "cpu":
        return plan_batches(lengths, CPU_BATCH_TOKENS, border)
    return plan_batches(lengths, GPU_BATCH_TOKENS, border, GPU_PADDING)


def _complete(batch: dict[str, Any], requests: list[StatesRequest], future: Future[list[States]]) -> dict[str, Any]:
    """The batch with the requested states, as the collator makes it of samples that have all of theirs."""
    generated = future.result()
    if not requests:
        return batch
    for request, states in zip(requests, generated, strict=True):
        for name, tensor in zip(STATES, states, strict=True):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            batch[name][request.place] = tensor
    del batch[TO_GENERATE]
    return batch | {name: torch.cat(batch[name]).unsqueeze(0) for name in STATES}
