"""COD sampling against its definition, and the mask against a loop over the rule."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle_hf.model import attention, slots


def sample(learnt, num_depths=4, ratio=0.7, ratio_min=0.2, seed=0, max_anchors=None):
    generator = torch.Generator().manual_seed(seed)
    return slots.sample_slots(torch.tensor(learnt), num_depths, ratio, ratio_min, generator, max_anchors)


def test_doctests():
    assert doctest.testmod(slots).attempted > 0
    assert doctest.testmod(slots).failed == 0


@settings(max_examples=100, deadline=None)
@given(learnt=st.lists(st.booleans(), min_size=1, max_size=40), num_depths=st.integers(1, 9))
def test_every_row_is_every_rollout_up_to_where_learning_ends(learnt, num_depths):
    anchors, depths = slots.every_slot(torch.tensor(learnt), num_depths)
    length = len(learnt)
    expected = [(position, 0) for position in range(length)]
    expected += [
        (anchor, depth)
        for anchor in range(length)
        for depth in range(1, num_depths)
        if anchor + depth < length and all(learnt[anchor : anchor + depth + 1])
    ]
    assert list(zip(anchors.tolist(), depths.tolist(), strict=True)) == expected


@settings(max_examples=200, deadline=None)
@given(
    learnt=st.lists(st.booleans(), min_size=1, max_size=60),
    num_depths=st.integers(1, 9),
    ratio=st.floats(0.05, 1.0),
    ratio_min=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**62),
    max_anchors=st.none() | st.integers(1, 20),
)
def test_sampling_invariants(learnt, num_depths, ratio, ratio_min, seed, max_anchors):
    anchors, depths = sample(learnt, num_depths, ratio, ratio_min, seed, max_anchors)
    again = sample(learnt, num_depths, ratio, ratio_min, seed, max_anchors)
    assert torch.equal(anchors, again[0])
    assert torch.equal(depths, again[1])

    rows = list(zip(anchors.tolist(), depths.tolist(), strict=True))
    length = len(learnt)
    assert rows[:length] == [(position, 0) for position in range(length)]
    assert rows[length:] == sorted(rows[length:])
    assert len(set(rows)) == len(rows)
    seeds = min(sum(learnt), max_anchors or length)
    for anchor, depth in rows[length:]:
        assert 1 <= depth < num_depths
        assert anchor >= 0
        assert learnt[anchor + depth]
        assert (anchor, depth - 1) in rows
    for depth in range(1, num_depths):
        count = sum(d == depth for _, d in rows)
        assert count <= int(max(0, seeds - depth) * max(ratio**depth, ratio_min))


def test_count_is_the_rules_where_nothing_limits_it():
    learnt = [False] * 10 + [True] * 100
    _, depths = sample(learnt, num_depths=4, ratio=0.7, ratio_min=0.6)
    assert [(depths == depth).sum().item() for depth in range(3)] == [110, int(99 * 0.7), int(98 * 0.6)]


def test_sampling_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    sample([True] * 50)
    assert torch.equal(state, torch.get_rng_state())


def random_rows(seed):
    """Three documents and padding, laid out as the collator does: all depth-0 rows, then all rollouts."""
    generator = torch.Generator().manual_seed(seed)
    parts, offset = [], 0
    for document, length in enumerate([9, 5, 12]):
        learnt = torch.rand(length, generator=generator) > 0.3
        anchors, depths = slots.sample_slots(learnt, 4, 0.9, 0.3, generator)
        parts.append((anchors + offset, depths, torch.full_like(anchors, document), length))
        offset += length
    parts.append((torch.arange(3) + offset, torch.zeros(3, dtype=torch.long), torch.full((3,), -1), 3))
    heads = [[part[:length] for part in (a, d, doc)] for a, d, doc, length in parts]
    tails = [[part[length:] for part in (a, d, doc)] for a, d, doc, length in parts]
    return tuple(torch.cat(columns) for columns in zip(*heads, *tails, strict=True))


def rule(rows, window):
    """Who may attend to whom, pair by pair: bool [R, R]."""
    listed = list(zip(*(part.tolist() for part in rows), strict=True))
    expected = torch.zeros(len(listed), len(listed), dtype=torch.bool)
    for q, (anchor_q, depth_q, document_q) in enumerate(listed):
        for k, (anchor_k, depth_k, document_k) in enumerate(listed):
            if document_q != document_k or document_q == -1:
                continue
            context = depth_k == 0 and anchor_k <= anchor_q
            if window is not None:
                context = context and anchor_k > anchor_q + depth_q - window
            expected[q, k] = context or (anchor_k == anchor_q and depth_k <= depth_q)
    return expected


def spans_of(rows, window):
    anchors, depths, documents = rows
    return slots.find_spans(anchors, depths, documents[: 9 + 5 + 12 + 3], window)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_spans_follow_the_rule(seed, window):
    rows = random_rows(seed)
    spans = spans_of(rows, window).map(lambda bound: bound[:, None])
    assert torch.equal(spans.sees(torch.arange(rows[0].numel())), rule(rows, window))


@pytest.mark.parametrize("window", [None, 4])
def test_attention_paths_agree_with_one_dense_mask(monkeypatch, window):
    monkeypatch.setattr(attention, "BLOCK", 1)
    rows = random_rows(2)
    chosen = (torch.rand(rows[0].numel(), generator=torch.Generator().manual_seed(3)) > 0.5).nonzero().flatten()
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(1, 4, chosen.numel(), 16, generator=generator)
    key, value = torch.randn(2, 1, 2, rows[0].numel(), 16, generator=generator)
    mask = rule(rows, window)[chosen]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    expected = torch.where(rows[2][chosen, None] >= 0, expected, 0)
    arguments = (spans_of(rows, window).map(lambda bound: bound[chosen]), rows[2][chosen], rows[2], 12)
    torch.testing.assert_close(attention.document_attention(*arguments)(query, key, value), expected)
    with torch.no_grad():
        torch.testing.assert_close(attention.block_attention(*arguments)(query, key, value), expected)
