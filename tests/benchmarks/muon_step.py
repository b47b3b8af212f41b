"""The optimizer's step over a drafter's matrices: PyTorch's Muon, ours, and gram-newton-schulz where it is installed.

    python tests/benchmarks/muon_step.py
    torchrun --nproc-per-node 4 tests/benchmarks/muon_step.py
    torchrun --nproc-per-node 4 tests/benchmarks/muon_step.py --fsdp

By default the matrices are those of a drafter for Qwen3-8B with 4 layers: the first layer takes twice the hidden size,
`fc` three times. Each line has the milliseconds of a whole step, of Newton-Schulz alone on one process, and how far the
first step's change of the weights is from that of PyTorch's Muon (Frobenius norms, relative). With several processes
ours share the work, with copies of the weights or, with `--fsdp`, shards; the slowest one counts. gram-newton-schulz
has the same coefficients and one restart, and gets equal shapes stacked.
"""

import argparse
import json
import os
import statistics
import time

import torch
from torch import distributed, nn

from peagle_hf.training import newton_schulz
from peagle_hf.training.muon import Muon, stacks


def shapes_of(args):
    hidden, query = args.hidden_size, args.num_heads * args.head_dim
    key, inner = args.num_kv_heads * args.head_dim, args.intermediate_size
    shapes = [(hidden, 3 * hidden)]
    for width in [2 * hidden, *[hidden] * (args.num_layers - 1)]:
        shapes += [(query, width), (key, width), (key, width), (hidden, query)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return shapes


def make_parameters(shapes, device, seed=0):
    """Weights, and gradients whose singular values fall as those of a low-rank matrix in noise do."""
    generator = torch.Generator(device).manual_seed(seed)
    parameters = []
    for rows, columns in shapes:
        parameter = nn.Parameter(0.02 * torch.randn(rows, columns, device=device, generator=generator))
        left = torch.randn(rows, 32, device=device, generator=generator) * 0.7 ** torch.arange(32, device=device)
        right = torch.randn(32, columns, device=device, generator=generator)
        noise = torch.randn(rows, columns, device=device, generator=generator)
        parameter.grad = 1e-5 * (left @ right + 0.1 * noise)
        parameters.append(parameter)
    return parameters


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(action, device, rounds, warmup=3):
    times = []
    for number in range(warmup + rounds):
        if distributed.is_initialized():
            distributed.barrier()
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        if number >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    median = torch.tensor(statistics.median(times), device=device)
    if distributed.is_initialized():
        distributed.all_reduce(median, distributed.ReduceOp.MAX)
    return median.item()


def changes(parameters, make_optimizer):
    """What one step changes, from zero."""
    parameters = copy_of(parameters)
    for parameter in parameters:
        parameter.data.zero_()
    optimizer = make_optimizer(parameters)
    optimizer.step()
    return [whole(parameter.detach()) for parameter in parameters]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_of(parameters):
    copies = []
    for parameter in parameters:
        copied = nn.Parameter(parameter.detach().clone())
        copied.grad = parameter.grad.clone()
        copies.append(copied)
    return copies


def difference(found, expected):
    squares = sum((one - other).square().sum() for one, other in zip(found, expected, strict=True))
    return (squares / sum(other.square().sum() for other in expected)).sqrt().item()


def by_the_library(parameters, stacked, orthogonalize):
    """PyTorch's momentum and rates with another orthogonalisation of bfloat16 stacks."""
    shapes = [tuple(one.shape) for one in parameters]
    buffers = [torch.zeros_like(one) for one in parameters]
    groups = stacks(range(len(shapes)), shapes) if stacked else [[number] for number in range(len(shapes))]

    @torch.no_grad()
    def step():
        torch._foreach_lerp_(buffers, [one.grad for one in parameters], 0.05)
        for numbers in groups:
            updates = [parameters[one].grad.lerp(buffers[one], 0.95).bfloat16() for one in numbers]
            for number, update in zip(numbers, orthogonalize(torch.stack(updates)), strict=True):
                parameters[number].add_(update, alpha=-1e-3 * 0.2 * max(shapes[number]) ** 0.5)

    return step


class Stepper:
    def __init__(self, step):
        self.step = step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=12288)
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fsdp", action="store_true", help="shards of the weights instead of copies")
    parser.add_argument(
        "--panels", type=int, nargs="*", default=[1, 2, 4, 8], help="of a symmetric product, to compare"
    )
    parser.add_argument("--profile", action="store_true", help="the kernels of one step of ours")
    args = parser.parse_args()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    group = None
    if size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = distributed.group.WORLD
    is_first = not group or distributed.get_rank() == 0

    def show(**line):
        if is_first:
            print(
                json.dumps(
                    {name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()}
                ),
                flush=True,
            )

    shapes = shapes_of(args)
    parameters = make_parameters(shapes, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    show(
        device=name,
        processes=size,
        torch=torch.__version__,
        matrices=len(shapes),
        weights=sum(one.numel() for one in parameters),
    )

    def theirs(parameters):
        return torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def ours(parameters):
        return Muon(parameters, lr=1e-3, process_group=group)

    def measure(optimizer, made, reference, to_measure):
        difference_ = difference(changes(to_measure, made), reference) if reference is not None else 0.0
        copied = copy_of(to_measure)
        step = made(copied).step
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        taken = milliseconds(step, device, args.rounds)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
        show(optimizer=optimizer, ms=taken, difference=difference_, peak_gib_above=peak)

    reference = changes(parameters, theirs)
    if size == 1:
        measure("torch.optim.Muon", theirs, None, parameters)
    if size > 1 and args.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh(device.type, (size,))

        def divided(parameter):
            sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            sharded.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
            return sharded

        sharded = [divided(parameter) for parameter in parameters]
        measure("torch.optim.Muon on shards", theirs, reference, sharded)
        measure("ours on shards", ours, reference, sharded)
    else:
        measure("ours", ours, reference, parameters)
    if size == 1:
        try:
            from gram_newton_schulz import GramNewtonSchulz
        except ImportError:
            show(optimizer="gram-newton-schulz", ms=None, note="not installed")
        else:
            for kernels in (False, True):
                for stacked in (False, True):
                    settings = {"ns_use_kernels": kernels, "gram_newton_schulz_reset_iterations": [2]}
                    coefficients = [list(step) for step in newton_schulz.STEPS]
                    orthogonalize = GramNewtonSchulz(ns_coefficients=coefficients, **settings)
                    made = lambda copied, f=orthogonalize, s=stacked: Stepper(by_the_library(copied, s, f))  # noqa: E731
                    title = f"gram-newton-schulz{', kernels' * kernels}{', stacked' * stacked}"
                    try:
                        measure(title, made, reference, parameters)
                    except Exception as error:  # a missing kernel or device is a result too
                        show(optimizer=title, ms=None, note=repr(error)[:300])
        newton_schulz_alone(args, shapes, device, show)
    if args.profile and device.type == "cuda" and is_first and size == 1:
        optimizer = ours(copy_of(parameters))
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            synchronize(device)
        print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=90))
    if group:
        distributed.destroy_process_group()


def newton_schulz_alone(args, shapes, device, show):
    """The time of `orthogonalize` over all matrices, for several panels and for polynomials with fewer steps."""
    dtype = newton_schulz.working_dtype(device)
    generator = torch.Generator(device).manual_seed(0)
    groups = stacks(range(len(shapes)), shapes)
    stacked = [torch.randn(len(one), *shapes[one[0]], device=device, generator=generator).to(dtype) for one in groups]
    variants = {f"5 steps, {panels} panels": {"panels": panels} for panels in args.panels}
    for steps, restart in ((4, 2), (4, 0), (3, 0)):
        variants[f"{steps} steps, restart {restart}"] = {"steps": newton_schulz.STEPS[:steps], "restart": restart}
    for name, settings in variants.items():
        taken = milliseconds(
            lambda settings=settings: [newton_schulz.orthogonalize(one, dtype, **settings) for one in stacked],
            device,
            args.rounds,
        )
        show(newton_schulz=name, ms=taken)
    for equal in stacked:
        taken = milliseconds(lambda equal=equal: newton_schulz.orthogonalize(equal, dtype), device, args.rounds)
        show(newton_schulz=f"{len(equal)} x {tuple(equal.shape[1:])}", ms=taken)
    if args.hidden_size >= 1024:
        square = torch.randn(4, args.hidden_size, args.hidden_size, device=device, generator=generator).to(dtype)
        for panels in args.panels:
            taken = milliseconds(
                lambda panels=panels: newton_schulz.symmetric_product(square, square, panels), device, args.rounds
            )
            show(symmetric_product=f"4 x {args.hidden_size}, {panels} panels", ms=taken)


if __name__ == "__main__":
    main()
