"""Takes steps of Muon in two processes, with copies or with shards of the weights, and saves what each has then."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from peagle_hf.training import muon

SHAPES = [(24, 40), (40, 24), (24, 40), (16, 16), (7, 12), (24, 40), (1, 8)]
"""Rows that don't divide by two, and fewer rows than processes, too."""
STEPS = 3


def weights_and_gradients() -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = ([torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(1 + STEPS))
    return weights, gradients


def main(kind: str, folder: Path) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)]) if kind == "shards" else tensor

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if kind == "shards" else tensor

    orthogonalized = 0
    orthogonalize = muon.orthogonalize

    def counting(stack: torch.Tensor, *arguments: object) -> torch.Tensor:
        nonlocal orthogonalized
        orthogonalized += len(stack)
        return orthogonalize(stack, *arguments)

    muon.orthogonalize = counting
    weights, gradients = weights_and_gradients()
    parameters = [nn.Parameter(placed(weight)) for weight in weights]
    optimizer = muon.Muon(parameters, lr=0.1, weight_decay=0.1, process_group=distributed.group.WORLD)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = placed(gradient)
        optimizer.step()
    buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    found = [whole(parameter.detach()) for parameter in parameters], [whole(buffer) for buffer in buffers]
    torch.save((*found, orthogonalized), folder / f"{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
