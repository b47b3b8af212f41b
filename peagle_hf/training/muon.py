"""Muon over stacks of equal shapes; several processes share the work, with whole weights (DDP) or shards (FSDP2)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import PeagleError
from .newton_schulz import multiplications, orthogonalize, orthogonalize_elements, working_dtype

STACK_ELEMENTS = 1 << 28
"""The most elements of one stack; more matrices of its shape make another."""
ROUNDED = {torch.float16: torch.bfloat16, torch.float32: torch.float32}
"""The dtype in which momenta are stacked and sent, by that of the work: bfloat16 holds gradients of any size."""


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with Nesterov's momentum and the rates of `match_rms_adamw`, by the steps in `newton_schulz`.

    Settings and states have the names of PyTorch's, so that either goes on from the other's; `ns_coefficients`,
    `ns_steps` and `eps` among them aren't read.

    Args:
        process_group: processes that all have the same weights and gradients, and share the work; None for one process.
            Weights that are shards (DTensor) bring their own.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        process_group: Any = None,
    ):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.process_group = process_group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            for one in parameters:
                if "momentum_buffer" not in self.state[one]:
                    self.state[one]["momentum_buffer"] = torch.zeros_like(one.grad)
            if parameters:
                buffers = [self.state[one]["momentum_buffer"] for one in parameters]
                self._spread(_Matrices(parameters, buffers, group))

    def _spread(self, matrices: "_Matrices") -> None:
        """Take the step, on this process alone or with others."""
        if isinstance(matrices.parameters[0], DTensor):
            _step_with_shards(matrices)
        elif self.process_group is not None and distributed.get_world_size(self.process_group) > 1:
            _step_with_copies(matrices, self.process_group)
        else:
            for numbers in stacks(range(len(matrices.shapes)), matrices.shapes):
                matrices.take(numbers, matrices.orthogonal(numbers))


class _Matrices:
    """The matrices of a parameter group in one step, by their numbers; of shards the rows that this process has."""

    def __init__(self, parameters: list[nn.Parameter], buffers: list[Tensor], group: dict[str, Any]):
        self.parameters, self.shapes = parameters, [tuple(one.shape) for one in parameters]
        self.weights = [local(one) for one in parameters]
        self.gradients = [local(one.grad) for one in parameters if one.grad is not None]
        self.buffers = [local(one) for one in buffers]
        self.device = self.weights[0].device
        self.dtype = working_dtype(self.device)
        self.lr, self.momentum = float(group["lr"]), group["momentum"]
        torch._foreach_lerp_(self.buffers, self.gradients, 1 - self.momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(self.weights, 1 - self.lr * group["weight_decay"])

    def write(self, number: int, into: Tensor) -> None:
        """Nesterov's momentum, divided by `momentum`, which leaves its orthogonal factor as it is."""
        if self.momentum:
            share = (1 - self.momentum) / self.momentum
            torch.add(self.buffers[number], self.gradients[number], alpha=share, out=into)
        else:
            into.copy_(self.gradients[number])

    def empty(self, numbers: list[int], dtype: torch.dtype) -> Tensor:
        return torch.empty((len(numbers), *self.shapes[numbers[0]]), dtype=dtype, device=self.device)

    def orthogonal(self, numbers: list[int]) -> Tensor:
        stack = self.empty(numbers, ROUNDED[self.dtype])
        for place, number in enumerate(numbers):
            self.write(number, stack[place])
        return orthogonalize(stack, self.dtype)

    def take(self, numbers: Iterable[int], updates: Iterable[Tensor]) -> None:
        for number, update in zip(numbers, updates, strict=True):
            rate = self.lr * 0.2 * math.sqrt(max(self.shapes[number]))
            self.weights[number].add_(update, alpha=-rate)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def stacks(numbers: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The numbers of matrices in lists of equal shape, none with more than `STACK_ELEMENTS` but of one matrix."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        by_shape.setdefault(shapes[number], []).append(number)
    result = []
    for shape, equal in by_shape.items():
        most = max(1, STACK_ELEMENTS // math.prod(shape))
        result += [equal[start : start + most] for start in range(0, len(equal), most)]
    return result


def shares(shapes: Sequence[tuple[int, ...]], num_processes: int) -> list[list[int]]:
    """The numbers of the matrices that each process orthogonalises: the largest first, each to whom has least to do."""
    loads = [0] * num_processes
    result: list[list[int]] = [[] for _ in range(num_processes)]
    for number in sorted(range(len(shapes)), key=lambda number: (-multiplications(*shapes[number]), number)):
        owner = loads.index(min(loads))
        loads[owner] += multiplications(*shapes[number])
        result[owner].append(number)
    return [sorted(share) for share in result]


def step_bytes(shapes: Sequence[tuple[int, ...]], num_processes: int = 1, has_shards: bool = False) -> int:
    """The most device memory that a step needs beside weights, gradients and momenta, on a GPU.

    Args:
        num_processes: that share the work.
        has_shards: each of them has a share of the rows, instead of copies of the weights.
    """
    size = 2
    planned = shares(shapes, num_processes)
    own = [orthogonalize_elements(len(one), *shapes[one[0]]) for share in planned for one in stacks(share, shapes)]
    sent = sum(map(math.prod, shapes)) if num_processes > 1 else 0
    # Each process sends its share of all rows. The process with the most matrices also holds these twice: as it
    # receives them and as it sends them back.
    if has_shards:
        sent = sent // num_processes + 2 * max(sum(math.prod(shapes[number]) for number in share) for share in planned)
    return size * (max(own, default=0) + sent)


def _step_with_copies(matrices: _Matrices, group: Any) -> None:
    """Each process orthogonalises its share, and sends each stack to all others while it goes on with the next."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    planned = [stacks(share, matrices.shapes) for share in shares(matrices.shapes, size)]
    pending: list[tuple[list[int], Tensor, Any]] = []

    def take_pending() -> None:
        for numbers, stack, work in pending:
            work.wait()
            matrices.take(numbers, stack)

    for turn in range(max(map(len, planned))):
        owners = [owner for owner in range(size) if turn < len(planned[owner])]
        results = {owner: matrices.empty(planned[owner][turn], matrices.dtype) for owner in owners if owner != rank}
        if rank in owners:
            results[rank] = matrices.orthogonal(planned[rank][turn])
        take_pending()
        pending = [
            (
                planned[owner][turn],
                results[owner],
                distributed.broadcast(results[owner], group=group, group_src=owner, async_op=True),
            )
            for owner in owners
        ]
    take_pending()


def _step_with_shards(matrices: _Matrices) -> None:
    """Each process gets its share of the matrices whole, orthogonalises them and gives the rows back.

    Raises:
        PeagleError: the weights are divided otherwise than by rows.
    """
    group = _group_of(matrices.parameters[0])
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    shapes, planned = matrices.shapes, shares(matrices.shapes, size)

    def rows(number: int, process: int) -> slice:
        height = shapes[number][0]
        share = -(-height // size)
        return slice(min(height, process * share), min(height, (process + 1) * share))

    def num_elements(number: int, process: int) -> int:
        return (rows(number, process).stop - rows(number, process).start) * shapes[number][1]

    def flat(owned: list[list[tuple[int, int]]], dtype: torch.dtype) -> tuple[Tensor, list[int], list[Tensor]]:
        """For a list of (number, process) for each process: one tensor, the elements for each, and its matrices."""
        sizes = [[num_elements(*one) for one in for_one] for for_one in owned]
        whole = torch.empty(sum(map(sum, sizes)), dtype=dtype, device=matrices.device)
        pieces = whole.split([size for for_one in sizes for size in for_one])
        widths = [shapes[number][1] for for_one in owned for number, _ in for_one]
        views = [piece.view(-1, width) for piece, width in zip(pieces, widths, strict=True)]
        return whole, [sum(for_one) for for_one in sizes], views

    ours = [[(number, rank) for number in share] for share in planned]
    theirs = [[(number, process) for number in planned[rank]] for process in range(size)]
    shards, our_sizes, our_pieces = flat(ours, ROUNDED[matrices.dtype])
    whole, their_sizes, their_pieces = flat(theirs, ROUNDED[matrices.dtype])
    our_numbers = [number for share in planned for number in share]
    for number, piece in zip(our_numbers, our_pieces, strict=True):
        matrices.write(number, piece)
    distributed.all_to_all_single(whole, shards, their_sizes, our_sizes, group=group)
    gathered = dict(zip([one for for_one in theirs for one in for_one], their_pieces, strict=True))
    shards, _, our_pieces = flat(ours, matrices.dtype)
    whole, _, their_pieces = flat(theirs, matrices.dtype)
    returned = dict(zip(gathered, their_pieces, strict=True))
    for numbers in stacks(planned[rank], shapes):
        stack = matrices.empty(numbers, ROUNDED[matrices.dtype])
        for place, number in enumerate(numbers):
            torch.cat([gathered[number, process] for process in range(size)], out=stack[place])
        for number, update in zip(numbers, orthogonalize(stack, matrices.dtype), strict=True):
            for process in range(size):
                returned[number, process].copy_(update[rows(number, process)])
    distributed.all_to_all_single(shards, whole, our_sizes, their_sizes, group=group)
    matrices.take(our_numbers, our_pieces)


def _group_of(parameter: Tensor) -> Any:
    """The processes that a DTensor's rows are divided among."""
    assert isinstance(parameter, DTensor)
    divided = [number for number, place in enumerate(parameter.placements) if not isinstance(place, Replicate)]
    if len(divided) != 1 or parameter.placements[divided[0]] != Shard(0):
        raise PeagleError(
            f"Muon needs weights that are divided by rows among one group of processes, not {parameter.placements}. "
            "Take --optim adamw_torch_fused."
        )
    return parameter.device_mesh.get_group(divided[0])
