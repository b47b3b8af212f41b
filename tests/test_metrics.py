"""Counters against a loop over rollouts, and the two formulas of acceptance length against each other."""

import torch

from peagle_hf.model.slots import sample_slots
from peagle_hf.training.metrics import COUNTERS, count_by_depth, count_drafts, reached_slots, summarize

K = 4


def counted(seed=0):
    generator = torch.Generator().manual_seed(seed)
    trained_positions = torch.rand(40, generator=generator) > 0.3
    anchors, depths = sample_slots(trained_positions, K, 0.9, 0.5, generator)
    learnt = trained_positions[anchors + depths]
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
    reached = reached_slots(correct, follows, learnt, anchors, depths, K)
    counters = count_by_depth(correct, learnt, reached, depths, K)
    assert dict(zip(COUNTERS, counters.tolist(), strict=True)) == expected
    assert all(sum(column) > 0 for column in expected.values())


def count(seed):
    correct, follows, learnt, anchors, depths = counted(seed)
    reached = reached_slots(correct, follows, learnt, anchors, depths, K)
    return count_by_depth(correct, learnt, reached, depths, K)


def test_counters_of_batches_add_up():
    first, second = (count(seed) for seed in (0, 1))
    metrics = summarize(first + second)
    assert metrics["accuracy_1"] == ((first + second)[1, 1] / (first + second)[0, 1]).item()


def test_acceptance_length_sums_products_of_conditional_rates():
    counters = torch.tensor([[100, 60, 30, 0], [50, 20, 10, 0], [100, 40, 8, 0], [50, 20, 2, 0]])
    metrics = summarize(counters)
    rates = [0.5, 0.5 * 0.5, 0.5 * 0.5 * 0.25, 0.0]
    assert [metrics[f"acceptance_{depth}"] for depth in range(4)] == rates
    assert metrics["acceptance_length"] == 1 + sum(rates)
    assert "accuracy_3" not in metrics


def test_drafts_go_on_behind_what_is_accepted_and_start_afresh_with_each_answer():
    outcomes = [  # document, place, reached, accepted
        (0, 4, 3, 2),
        (0, 5, 3, 3),
        (0, 6, 3, 3),
        (0, 7, 2, 1),  # the first draft's two tokens and one of the verifier lie before it
        (0, 8, 1, 1),
        (0, 20, 1, 0),  # another answer
        (1, 21, 4, 4),  # another document
        (1, 22, 3, 0),
    ]
    counts = count_drafts(torch.tensor(outcomes).T, K)
    assert counts.tolist() == [[4, 3, 2, 1], [3, 2, 1, 1]]
    assert count_drafts(torch.zeros(4, 0, dtype=torch.long), K).tolist() == [[0] * K] * 2


def test_an_answer_after_a_gap_starts_a_draft_of_its_own():
    """Also where what was accepted before the gap would reach beyond it."""
    outcomes = torch.tensor([[0, 0, 0], [1, 2, 4], [3, 2, 3], [3, 2, 1]])
    assert count_drafts(outcomes, 3).tolist() == [[2, 2, 2], [2, 1, 1]]
