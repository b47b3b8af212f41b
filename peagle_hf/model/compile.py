"""Compile small functions for a GPU, where elementwise work between matrix products is bound by memory traffic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as autograd_compiler

Function = TypeVar("Function", bound=Callable[..., Any])

FOR_ALL_SIZES = "triton.mix_order_reduction_non_strict_mode"
"""Without this option the compiler chooses by the number of slots how it computes the gradients of a norm. It would
compile a function again when a batch crosses a limit, such as 8,192 slots at a hidden size of 4,096."""


def fuse_on_gpu(dynamic_dim: int) -> Callable[[Function], Function]:
    """Compile the decorated function at its first call with CUDA tensors; on a CPU it runs as it is.

    Args:
        dynamic_dim: the dimension of the tensor arguments whose size changes from call to call; one compilation serves
            all sizes. The others, and all of a parameter's, are compiled in.
    """

    def decorate(function: Function) -> Function:
        @cache
        def compiled() -> Any:
            # The first call compiles, not the import of this module, because it takes seconds.
            options: dict[str, Any] = {FOR_ALL_SIZES: True} if FOR_ALL_SIZES in torch._inductor.list_options() else {}
            return torch.compile(function, options=options)

        @wraps(function)
        def run(*args: Any) -> Any:
            tensors = [
                arg for arg in args if isinstance(arg, Tensor) and arg.is_cuda and not isinstance(arg, nn.Parameter)
            ]
            # The compiler takes a size of 1 for a constant, and would compile the function again, which takes seconds.
            is_single = any(tensor.shape[dynamic_dim] == 1 for tensor in tensors)
            if not tensors or is_single or torch.compiler.is_compiling():
                return function(*args)
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, dynamic_dim)
            with small_functions():
                return compiled()(*args)

        return run  # type: ignore[return-value]

    return decorate


@contextmanager
def small_functions() -> Iterator[None]:
    """Around calls of compiled functions that are small parts of a model.

    Between matrix products recomputing costs less time than keeping costs memory. And under DDP the compiler would cut
    each function at every large weight, for gradients to be sent before its backward pass ends, which is short anyway:
    for a feed-forward part four graphs instead of one, with nothing fused across them.
    """
    whole = torch._dynamo.config.patch(optimize_ddp=False)
    with autograd_compiler.patch(aggressive_recomputation=True), whole:
        yield
