"""Counting by depth, and what the counts say: accuracy, acceptance, acceptance length."""

import os
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..pages.pictures import BLUE, GREY, save_png

METRICS = ("loss", "acceptance_length", "anchor_acceptance_length")
"""What validation gives, beside the accuracy and acceptance of each depth."""
COUNTERS = ("learnt", "correct", "reached", "accepted")
LOSS_LABEL = "Loss (training: weighted, validation: not)"


def metric_names(num_depths: int) -> list[str]:
    """The names of what a validation of K depths gives, without the prefix `eval_`."""
    return [*METRICS, *(f"{name}_{depth}" for name in ("accuracy", "acceptance") for depth in range(num_depths))]


def is_metric(name: str) -> bool:
    """Whether a validation of some number of depths gives this, without the prefix `eval_`."""
    return name in METRICS or re.fullmatch(r"(accuracy|acceptance)_\d+", name) is not None


def reached_slots(
    correct_R: Tensor, follows_R: Tensor, learnt_R: Tensor, anchors_R: Tensor, depths_R: Tensor, num_depths: int
) -> Tensor:
    """Which slots are *reached*: learnt, and at all earlier depths of the rollout drafter, verifier and text agree.

    A slot that is reached and correct is *accepted*: what a greedy verifier would do with this rollout. Where the text
    says something else than the verifier, how a greedy verifier would go on isn't known, so the rollout is followed no
    further.

    Args:
        correct_R: bool, whether the drafter's token is the verifier's.
        follows_R: bool, whether the text's token is the verifier's.
        learnt_R: bool.
        anchors_R: int64, slots in the order of `slots.sample_slots` (depth 0 first, then rollouts by anchor and depth).
        depths_R: int64.

    Returns:
        bool [R].
    """
    slots = torch.arange(depths_R.numel(), device=depths_R.device)
    before = torch.where(depths_R == 1, anchors_R, slots - 1)
    continues = correct_R & follows_R
    reached = learnt_R & (depths_R == 0)
    for depth in range(1, num_depths):
        reached = torch.where(depths_R == depth, (reached & continues)[before] & learnt_R, reached)
    return reached


def count_by_depth(correct_R: Tensor, learnt_R: Tensor, reached_R: Tensor, depths_R: Tensor, num_depths: int) -> Tensor:
    """Count slots by depth for `summarize`; counts of several batches or ranks add up.

    Returns:
        int64 [4, K]: learnt, correct, reached, accepted.
    """
    outcome_4R = torch.stack([learnt_R, correct_R & learnt_R, reached_R, reached_R & correct_R]).long()
    counters = torch.zeros(4, num_depths, dtype=torch.long, device=depths_R.device)
    return counters.index_add_(1, depths_R.clamp(max=num_depths - 1), outcome_4R)


def outcomes_by_anchor(
    correct_R: Tensor, reached_R: Tensor, anchors_R: Tensor, document_ids_L: Tensor, position_ids_R: Tensor
) -> Tensor:
    """What becomes of the rollout of each of the N learnt anchors, for `count_drafts`.

    Returns:
        int64 [4, N]: document, place in it, how many of the rollout's slots are reached and how many accepted.
    """
    num_positions = document_ids_L.numel()
    slots_2L = torch.zeros(2, num_positions, dtype=torch.long, device=anchors_R.device)
    slots_2L.index_add_(1, anchors_R, torch.stack([reached_R, reached_R & correct_R]).long())
    outcomes = torch.cat([torch.stack([document_ids_L, position_ids_R[:num_positions]]), slots_2L])
    return outcomes[:, reached_R[:num_positions]]


def drafts_in_text(outcomes_4N: Tensor) -> Tensor:
    """The drafts that decoding the text would make: from each one on to the token after what it has accepted.

    Most tokens of a run that is easy to guess are accepted from its first one and never start a draft of their own, so
    decoding meets harder anchors than all anchors are on average.

    Args:
        outcomes_4N: of `outcomes_by_anchor`, anchors in order, with nothing dropped (`slots.every_slot`).

    Returns:
        int64 [3, D] on the CPU: the anchor's place in its document, how many of the draft's slots are reached and how
        many accepted.
    """
    drafts: list[tuple[int, int, int]] = []
    last_document, last_place, next_place = -1, -1, 0
    for document, place, reached, accepted in outcomes_4N.T.tolist():
        is_new_answer = document != last_document or place != last_place + 1
        if is_new_answer or place >= next_place:
            drafts.append((place, reached, accepted))
            next_place = place + accepted + 1
        last_document, last_place = document, place
    return torch.tensor(drafts, dtype=torch.long).reshape(-1, 3).T


def count_by_position(drafts_3D: Tensor, num_depths: int) -> Tensor:
    """Count the slots of drafts (of `drafts_in_text`) by position, int64 [2, K]: reached, accepted."""
    return (drafts_3D[1:, :, None] > torch.arange(num_depths)).sum(1)


def count_drafts(outcomes_4N: Tensor, num_depths: int) -> Tensor:
    """The counts of all `drafts_in_text` by position, int64 [2, K]: reached, accepted."""
    return count_by_position(drafts_in_text(outcomes_4N), num_depths).to(outcomes_4N.device)


def summarize(counters: Tensor) -> dict[str, float]:
    """Turn counters [4, K] into the logged metrics.

    `accuracy_d`: correct / trained slots at depth d. `acceptance_d`: the share of drafts of which depth d and all
    before it are accepted, `Π_{j≤d} c_j` with `c_j` = accepted / reached at depth j. vLLM calls it the
    per-position acceptance rate. `acceptance_length` is `1 + Σ_d Π_{j≤d} c_j`, the tokens that a forward
    pass of the verifier yields. Depths without a slot are left out.
    """
    metrics: dict[str, float] = {}
    learnt, correct, reached, accepted = counters.double().cpu().tolist()
    rate, length = 1.0, 1.0
    for depth in range(len(learnt)):
        if learnt[depth]:
            metrics[f"accuracy_{depth}"] = correct[depth] / learnt[depth]
        rate *= accepted[depth] / reached[depth] if reached[depth] else 0.0
        metrics[f"acceptance_{depth}"] = rate
        length += rate
    metrics["acceptance_length"] = length
    return metrics


def draw(history: list[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw a run as a PNG: loss and acceptance length in training and validation, and acceptance by depth.

    Depths are those of validation, where there was one, else of training.

    Args:
        history: the Trainer's `state.log_history`.
    """

    def curve(axes: Any, name: str, **style: Any) -> None:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        marker = "." if len(points) == 1 else None  # without one a line of a single point isn't seen
        axes.plot([step for step, _ in points], [value for _, value in points], **{"marker": marker, **style})

    def finish(axes: Any, label: str) -> None:
        axes.set(xlabel="Step", ylabel=label)
        if axes.lines:
            axes.legend()

    def both(name: str, label: str, axes: Any) -> None:
        curve(axes, name, label="training", color=GREY)
        curve(axes, f"eval_{name}", label="validation", color=BLUE, marker="o")
        finish(axes, label)

    def by_depth(axes: Any) -> None:
        from matplotlib import colormaps

        prefix = "eval_" if any("eval_loss" in entry for entry in history) else ""
        names = {name for entry in history for name in entry if re.fullmatch(rf"{prefix}acceptance_\d+", name)}
        for depth in range(len(names)):
            color = colormaps["viridis"](depth / len(names))
            curve(axes, f"{prefix}acceptance_{depth}", label=f"depth {depth}", color=color, marker=".")
        finish(axes, "Acceptance by depth")

    losses = partial(both, "loss", LOSS_LABEL)
    lengths = partial(both, "acceptance_length", "Acceptance length")
    save_png(path, [losses, lengths, by_depth], (13 / 3, 3.8), "the trainer_state.json of each checkpoint")
