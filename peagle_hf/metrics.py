"""Counting by depth, and what the counts say: accuracy, acceptance, acceptance length."""

import torch
from torch import Tensor

COUNTERS = ("learnt", "correct", "reached", "accepted")


def count_by_depth(
    correct_R: Tensor, follows_R: Tensor, learnt_R: Tensor, anchors_R: Tensor, depths_R: Tensor, num_depths: int
) -> Tensor:
    """Count rows by depth for `summarize`; counts of several batches or ranks add up.

    A row is *reached* if it is learnt and at all earlier depths of its rollout drafter, verifier and text say the same;
    it is *accepted* if it is reached and correct: what a greedy verifier would do with this rollout. Where the text
    says something else than the verifier, how a greedy verifier would go on isn't known, so the rollout is followed no
    further.

    Args:
        correct_R: bool, whether the drafter's token is the verifier's.
        follows_R: bool, whether the text's token is the verifier's.
        learnt_R: bool.
        anchors_R: int64, rows in the order of `cod.sample_rows` (depth 0 at its own index, rollouts by anchor, depth).
        depths_R: int64.

    Returns:
        int64 [4, K]: learnt, correct, reached, accepted.
    """
    rows = torch.arange(depths_R.numel(), device=depths_R.device)
    before = torch.where(depths_R == 1, anchors_R, rows - 1)
    correct = correct_R & learnt_R
    reached = learnt_R & (depths_R == 0)
    for depth in range(1, num_depths):
        accepted_before = (reached & correct & follows_R)[before]
        reached = torch.where(depths_R == depth, accepted_before & learnt_R, reached)
    outcome_4R = torch.stack([learnt_R, correct, reached, reached & correct]).long()
    counters = torch.zeros(4, num_depths, dtype=torch.long, device=depths_R.device)
    return counters.index_add_(1, depths_R.clamp(max=num_depths - 1), outcome_4R)


def summarize(counters: Tensor) -> dict[str, float]:
    r"""Turn counters [4, K] into the logged metrics.

    `accuracy_d`: correct / learnt rows at depth d. `acceptance_d`: the share of drafts of which depth d and all before
    it are accepted, \(\prod_{j \le d} c_j\) with \(c_j\) = accepted / reached at depth j; what vLLM reports as the
    per-position acceptance rate. `acceptance_length` is \(1 + \sum_d \prod_{j \le d} c_j\), tokens a verifier step
    yields. Depths with no row are left out.
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
