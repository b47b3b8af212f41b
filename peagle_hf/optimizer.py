"""Muon for a drafter's matrices and AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MUON = "muon"
"""The name that `--optim` knows it by."""

_TABLES = {"embed_tokens", "lm_head"}


class MuonWithAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for the matrices within the layers, its AdamW for embeddings, head, norms and the shared state.

    Muon's step is scaled as AdamW's is (`match_rms_adamw`, arXiv 2502.16982), so that both take one learning rate.
    The parameter groups, matrices first, have the options of their optimizer; norms and vectors are never decayed.

    Args:
        named_parameters: those of the model; what needs no gradient is left out.
        momentum: of Muon.
        betas: of AdamW, as `eps`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                is_matrix = parameter.ndim == 2 and _TABLES.isdisjoint(name.split("."))
                (matrices if is_matrix else others).append(parameter)
        decayed = [parameter for parameter in others if parameter.ndim == 2]
        undecayed = [parameter for parameter in others if parameter.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
            ),
            *(
                torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, betas=betas, eps=eps, fused=True)
                for parameters, decay in ((decayed, weight_decay), (undecayed, 0.0))
                if parameters
            ),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("No closure is evaluated here.")
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # anew, as loading a state dict replaces both
            part.step()
        return None
