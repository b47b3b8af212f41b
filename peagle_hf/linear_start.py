"""Where a new drafter starts from: a linear prediction of the verifier's next state, instead of noise.

Shape letters: P positions, F features, which are S of the auxiliary states and H of the embedding, N value channels.
"""

import logging
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.nn import functional as F

from .console import progress_bar
from .data.collator import CODDataCollator
from .data.dataset import HiddenStatesDataset
from .errors import PeagleError
from .modeling_peagle import PeagleForSpeculation

logger = logging.getLogger(__name__)

RIDGE = 0.01
"""What is added to the variance of every feature, as a share of it."""
POSITIONS_A_FEATURE = 16
"""So many times the number of features are enough positions."""


@torch.no_grad()
def start_linearly(drafter: PeagleForSpeculation, dataset: HiddenStatesDataset) -> None:
    """Let a new drafter predict the verifier's next state from the start as well as a linear map can.

    By ridge regression over learnt positions, from what the drafter reads there (the verifier's auxiliary states and
    the embedding of the token that followed, normed) to the verifier's normed last state at the position after, of
    which its head makes the distribution to be drafted. The map of the auxiliary states becomes `fc`. That of the
    embedding is added to the first layer's `v_proj` and `o_proj`, as much of it as their rank allows: attention starts
    out at the row's own position. What is drafted deeper starts as it was. The same rows give the same start. Several
    processes share the rows, and each ends with the same drafter.

    Args:
        drafter: as it was made, with its verifier's head attached (see `PeagleForSpeculation.load_verifier`). All is
            computed on its device, in float64, so that it makes no difference how the rows are packed.
        dataset: the rows to train on. The first ones are read, until there are 16 positions a feature.

    Raises:
        PeagleError: no verifier's head is attached, or the rows can't be read or are of other layers.
    """
    if drafter.verifier_head is None:
        raise PeagleError("A linear start needs the verifier's head: call load_verifier(name_or_path) before.")
    dataset.check_layers(drafter.config.eagle_aux_hidden_state_layer_ids)
    device, size, states_size = drafter.device, drafter.config.hidden_size, drafter.fc.in_features
    head, eps = drafter.verifier_head.to(device), float(drafter.norm.variance_epsilon)
    num_features = states_size + size
    num_rows, num_positions = 0, 0
    while num_rows < len(dataset) and num_positions < POSITIONS_A_FEATURE * num_features:
        num_positions += dataset.num_learnt(num_rows)
        num_rows += 1
    process = PartialState()
    mine = range(process.process_index, num_rows, process.num_processes)
    collator = CODDataCollator(num_depths=1)
    moments = torch.zeros(num_features, num_features + size, dtype=torch.float64, device=device)
    for number in progress_bar(mine, desc="Linear start", unit="row", disable=not process.is_local_main_process):
        batch = collator([dataset[number]])
        learnt = batch["learnt_rows"][0]
        states_PS = batch["hidden_states"][0, learnt].to(device).double()
        if drafter.config.norm_before_fc:
            states_PS = F.rms_norm(states_PS, (states_size,), eps=eps)
        embeds_PH = drafter.embed_tokens(batch["input_ids"][0, learnt].to(device)).double()
        features_PF = torch.cat([states_PS, F.rms_norm(embeds_PH, (size,), eps=eps)], dim=1)
        targets_PH = head.normalize(batch["target_states"][0].to(device)).double()
        moments += features_PF.T @ torch.cat([features_PF, targets_PH], dim=1)
    moments = reduce(moments, reduction="sum")
    second_FF, cross_FH = (moments / max(1, num_positions)).split([num_features, size], dim=1)
    map_FH = ridge_regression(second_FF, cross_FH)
    states_SH, embeds_HH = map_FH.split([states_size, size])

    drafter.fc.weight.copy_(states_SH.T)
    norm = 1.0
    if drafter.config.norm_before_residual:
        norm = float(((second_FF[:states_size, :states_size] @ states_SH) * states_SH).sum() / size) ** 0.5
    attention: Any = drafter.layers[0].self_attn
    value_NH, output_HN = factors(embeds_HH.T / max(norm, eps), attention.v_proj.out_features)
    attention.v_proj.weight[:, :size] += value_NH
    # The heads of a group see the same values, so each gives its share.
    group = attention.q_proj.out_features // attention.v_proj.out_features
    shares = output_HN.unflatten(1, (-1, attention.head_dim)).repeat_interleave(group, dim=1).flatten(1) / group
    attention.o_proj.weight += shares
    logger.info("The first layer starts from a linear fit over %d positions.", num_positions)


def ridge_regression(second_FF: Tensor, cross_FH: Tensor) -> Tensor:
    """The map [F, H] of least squared error, from the features' second moments and those with the targets."""
    deviation_F = second_FF.diagonal().sqrt().clamp_min(torch.finfo(second_FF.dtype).tiny)
    scaled_FF = second_FF / deviation_F[:, None] / deviation_F
    scaled_FF.diagonal().add_(RIDGE)
    return torch.linalg.solve(scaled_FF, cross_FH / deviation_F[:, None]) / deviation_F[:, None]


def factors(map_HH: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors [N, H] and [H, N], of like size, of the closest map of rank N to [H, H]."""
    left, singular, right = torch.linalg.svd(map_HH)
    root = singular[:rank].sqrt()
    missing = max(0, rank - len(root))
    return F.pad(root[:, None] * right[:rank], (0, 0, 0, missing)), F.pad(left[:, :rank] * root, (0, missing))
