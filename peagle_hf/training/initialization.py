"""The linear start: a new drafter begins with a linear prediction of the verifier's next state instead of noise.

Shape letters: P positions, F features, which are S of the auxiliary states and H of the embedding, N value channels.
"""

import logging
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..console import progress_bar
from ..data.collator import CODDataCollator
from ..data.dataset import HiddenStatesDataset
from ..data.errors import on_all_processes
from ..errors import PeagleError
from ..model.drafter import PeagleForSpeculation
from ..verifier.head import VerifierHead
from .memory import GIB, is_out_of_memory, linear_start_bytes
from .objective import load_head

logger = logging.getLogger(__name__)

RIDGE = 0.01
"""Ridge penalty: this share of each feature's variance is added to it."""
POSITIONS_A_FEATURE = 16
"""Stop reading after this many positions per regression feature."""


@torch.no_grad()
def start_linearly(
    drafter: PeagleForSpeculation | PeftModel,
    dataset: HiddenStatesDataset,
    head: VerifierHead | None = None,
    num_workers: int = 0,
    multiprocessing_context: str | None = None,
) -> None:
    """Set a new drafter's first weights so that it predicts the verifier's next state as well as a linear map can.

    A ridge regression over the positions that are trained on maps what the drafter reads there (the verifier's
    auxiliary states and the normed embedding of the token that followed) to the verifier's normed last state at the
    next position, from which the verifier's head makes the distribution to be drafted. The map of the auxiliary states
    becomes `fc`. The map of the embedding is added to the first layer's `v_proj` and `o_proj`, as far as their rank
    allows: at the start, attention looks mostly at the slot's own position. Depths from 1 on start as they were. The
    same samples give the same start. Several processes share the samples, and each ends with the same drafter.

    Args:
        drafter: as it was made, with its verifier's embeddings (see `PeagleForSpeculation.load_verifier`). All is
            computed on its device, in float64, so that the packing makes no difference. It takes up to 1.2 times the
            memory of a float64 matrix [F, F + H] (see `memory.linear_start_bytes`).
        dataset: to train on. Its first packed sequences are read, until there are 16 positions per feature.
        head: the verifier's; default: read from the verifier that the drafter's configuration names.
        num_workers: processes that read the samples; 0: this one.
        multiprocessing_context: how these are started, such as "spawn"; default: as Python starts processes.

    Raises:
        PeagleError: the verifier or the samples can't be read, are of other layers or hold NaN, the device's memory is
            too small, or the drafter lacks its verifier's embeddings or has an adapter.
    """
    if not isinstance(drafter, PeagleForSpeculation) or not drafter.is_ready_to_train:
        raise PeagleError(
            "start_linearly sets the first weights of a PeagleForSpeculation. Call the drafter's load_verifier before, "
            "which gives it the verifier's embeddings, and put an adapter on it after."
        )
    dataset.check_layers(drafter.config.eagle_aux_hidden_state_layer_ids)
    loading: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        loading["multiprocessing_context"] = multiprocessing_context
    try:
        _start(drafter, dataset, load_head(drafter) if head is None else head, loading)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        needed = linear_start_bytes(drafter.config) / GIB
        raise PeagleError(
            f"The linear start needs {needed:.1f} GiB of {drafter.device} beside the drafter and its verifier's head, "
            "which aren't there. Start from random weights with --no-linear-start, or call start_linearly while the "
            "drafter is on another device."
        ) from error


def _start(
    drafter: PeagleForSpeculation, dataset: HiddenStatesDataset, head: VerifierHead, loading: dict[str, Any]
) -> None:
    size, states_size = drafter.config.hidden_size, drafter.fc.in_features
    second_FF, cross_FH, num_positions = _moments(drafter, dataset, head, loading)
    deviation_F = ridge_regression(second_FF, cross_FH)
    states_SH, embeds_HH = cross_FH.split([states_size, size])
    drafter.fc.weight.copy_(states_SH.T)
    norm = 1.0
    if drafter.config.norm_before_residual:
        norm = mean_square(second_FF, states_SH, deviation_F) ** 0.5
    del second_FF
    attention: Any = drafter.layers[0].self_attn
    eps = float(drafter.norm.variance_epsilon)
    value_NH, output_HN = factors(embeds_HH.T / max(norm, eps), attention.v_proj.out_features)
    attention.v_proj.weight[:, :size] += value_NH
    # The heads of a group see the same values, so each contributes an equal share of the output.
    group = attention.q_proj.out_features // attention.v_proj.out_features
    shares = output_HN.unflatten(1, (-1, attention.head_dim)).repeat_interleave(group, dim=1).flatten(1) / group
    attention.o_proj.weight += shares
    logger.info("The first layer starts from a linear fit over %d positions.", num_positions)


def _moments(
    drafter: PeagleForSpeculation, dataset: HiddenStatesDataset, head: VerifierHead, loading: dict[str, Any]
) -> tuple[Tensor, Tensor, int]:
    """The mean products of the features with each other [F, F] and with the targets [F, H], and of how many positions.

    The second is stored column by column. Positions are taken in pieces that need little memory.
    """
    device, size, states_size = drafter.device, drafter.config.hidden_size, drafter.fc.in_features
    head, eps = head.to(device), float(drafter.norm.variance_epsilon)
    num_states = drafter.config.num_aux_hidden_states
    num_features = states_size + size
    num_rows, num_positions = 0, 0
    while num_rows < len(dataset) and num_positions < POSITIONS_A_FEATURE * num_features:
        num_positions += dataset.num_learnt(num_rows)
        num_rows += 1
    process = PartialState()
    mine = range(process.process_index, num_rows, process.num_processes)
    collator: Any = CODDataCollator(num_depths=1)
    loader = DataLoader(dataset, 1, sampler=mine, collate_fn=collator, **loading)
    second_FF = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
    piece = _piece(num_features)
    cross_HF = torch.zeros(size, num_features, dtype=torch.float64, device=device)

    def add_up() -> None:
        batches = progress_bar(loader, desc="Linear start", unit="row", disable=not process.is_local_main_process)
        for batch in dataset.completed(batches):
            trained, targets = (batch[name][0].split(piece) for name in ("trained_slots", "target_states"))
            for slots, targets_PH in zip(trained, targets, strict=True):
                states_PS = batch["hidden_states"][0, slots].to(device).double()
                if drafter.config.norm_before_fc:
                    states_PS = F.rms_norm(states_PS, (states_size,), eps=eps)
                elif drafter.config.has_fc_norm:
                    states_PS = states_PS.unflatten(1, (num_states, -1))
                    states_PS = F.rms_norm(states_PS, states_PS.shape[2:], eps=eps).flatten(1)
                embeds_PH = drafter.embed_tokens(batch["input_ids"][0, slots].to(device)).double()
                features_PF = torch.cat([states_PS, F.rms_norm(embeds_PH, (size,), eps=eps)], dim=1)
                second_FF.addmm_(features_PF.T, features_PF)
                cross_HF.addmm_(head.normalize(targets_PH.to(device)).double().T, features_PF)

    on_all_processes(add_up)
    for products in (second_FF, cross_HF):
        if process.num_processes > 1:
            torch.distributed.all_reduce(products)
        products /= max(1, num_positions)
    return second_FF, cross_HF.T, num_positions


def _piece(num_features: int) -> int:
    """Positions, or columns of a map, in one chunk of work, so that it takes little of the features' memory."""
    return max(1, num_features // 32)


def ridge_regression(second_FF: Tensor, cross_FH: Tensor) -> Tensor:
    """Solve for the map [F, H] of least squared error, in place.

    Args:
        second_FF: float64, the features' second moments; then the lower factor of those of the features over their
            deviations, with `RIDGE` on the diagonal, as its transpose.
        cross_FH: float64, stored column by column, those with the targets; then the map.

    Returns:
        the features' deviations [F], from zero.

    Raises:
        PeagleError: the moments aren't numbers.
    """
    deviation_F = second_FF.diagonal().sqrt().clamp_min(torch.finfo(second_FF.dtype).tiny)
    second_FF.div_(deviation_F[:, None]).div_(deviation_F).diagonal().add_(RIDGE)
    # LAPACK stores matrices column by column, so the transposed view lets it work in place.
    factor_FF = second_FF.mT
    failed = torch.zeros((), dtype=torch.int32, device=second_FF.device)
    torch.linalg.cholesky_ex(factor_FF, out=(factor_FF, failed))
    if failed:
        raise PeagleError(
            "The hidden states hold NaN or infinity. Find the file with `peagle-hf cache verify` and extract it again."
        )
    cross_FH /= deviation_F[:, None]
    torch.linalg.solve_triangular(factor_FF, cross_FH, upper=False, out=cross_FH)
    torch.linalg.solve_triangular(factor_FF.mT, cross_FH, upper=True, out=cross_FH)
    cross_FH /= deviation_F[:, None]
    return deviation_F


def mean_square(second_FF: Tensor, map_SH: Tensor, deviation_F: Tensor) -> float:
    """The mean square of what a map of the first S features gives, from what `ridge_regression` made of its arguments.

    Its factor L has L L' = C + ridge, where C are the second moments of the features over their deviations. So for the
    scaled map z, z' C z = |L' z|^2 - ridge |z|^2.
    """
    num_states, total = len(map_SH), 0.0
    upper_SS, deviation_S1 = second_FF[:num_states, :num_states], deviation_F[:num_states, None]
    for piece in map_SH.split(_piece(len(second_FF)), dim=1):
        scaled = piece * deviation_S1
        total += float((upper_SS @ scaled).square().sum() - RIDGE * scaled.square().sum())
    return max(total, 0.0) / map_SH.shape[1]


def factors(map_HH: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors [N, H] and [H, N], of like size, of the closest map of rank N to [H, H]."""
    left, singular, right = torch.linalg.svd(map_HH)
    root = singular[:rank].sqrt()
    missing = max(0, rank - len(root))
    return F.pad(root[:, None] * right[:rank], (0, 0, 0, missing)), F.pad(left[:, :rank] * root, (0, missing))
