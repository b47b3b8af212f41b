"""Counters against a loop over rollouts, and the two formulas of acceptance length against each other."""

import torch

from peagle_hf.cod import sample_rows
from peagle_hf.metrics import COUNTERS, count_by_depth, summarize

K = 4


def counted(seed=0):
    generator = torch.Generator().manual_seed(seed)
    learnt_positions = torch.rand(40, generator=generator) > 0.3
    anchors, depths = sample_rows(learnt_positions, K, 0.9, 0.5, generator)
    learnt = learnt_positions[anchors + depths]
    correct = torch.rand(anchors.numel(), generator=generator) > 0.3
    follows = torch.rand(anchors.numel(), generator=generator) > 0.1
    return correct, follows, learnt, anchors, depths


def test_counters_follow_the_definition():
    correct, follows, learnt, anchors, depths = counted()
    state = {
        tuple(key): tuple(flags)
        for key, flags in zip(
            torch.stack([anchors, depths], 1).tolist(), torch.stack([learnt, correct, follows], 1).tolist(), strict=True
        )
    }
    expected = {name: [0] * K for name in COUNTERS}
    for (anchor, depth), (is_learnt, is_correct, _) in state.items():
        before = all(state[anchor, earlier] == (True, True, True) for earlier in range(depth))
        expected["learnt"][depth] += is_learnt
        expected["correct"][depth] += is_learnt and is_correct
        expected["reached"][depth] += is_learnt and before
        expected["accepted"][depth] += is_learnt and before and is_correct
    counters = count_by_depth(correct, follows, learnt, anchors, depths, K)
    assert dict(zip(COUNTERS, counters.tolist(), strict=True)) == expected
    assert all(sum(column) > 0 for column in expected.values())


def test_counters_of_batches_add_up():
    first, second = (count_by_depth(*counted(seed), K) for seed in (0, 1))
    metrics = summarize(first + second)
    assert metrics["accuracy_1"] == ((first + second)[1, 1] / (first + second)[0, 1]).item()


def test_acceptance_length_sums_products_of_conditional_rates():
    counters = torch.tensor([[100, 60, 30, 0], [50, 20, 10, 0], [100, 40, 8, 0], [50, 20, 2, 0]])
    metrics = summarize(counters)
    rates = [0.5, 0.5 * 0.5, 0.5 * 0.5 * 0.25, 0.0]
    assert [metrics[f"acceptance_{depth}"] for depth in range(4)] == rates
    assert metrics["acceptance_length"] == 1 + sum(rates)
    assert "accuracy_3" not in metrics
