"""A batch in parts gives the loss, the counters and the gradients of the whole."""

import pytest
import torch
from test_modeling import make_batch, make_config, make_pair

from peagle_hf import PeagleError
from peagle_hf.data.partition import partition, partition_by_slots, without_labels

LENGTHS = (37, 12, 58)


def step(drafter, objective, batches, num_items):
    drafter.zero_grad()
    losses, counters = [], []
    for batch in batches:
        output = objective(drafter, batch, num_items)
        output.loss.backward()
        losses.append(output.loss.item())
        counters.append(output.counters)
    grads = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
    return sum(losses), sum(counters), grads


def test_a_batch_that_teaches_nothing_gives_no_loss_and_no_gradient():
    config = make_config()
    drafter, objective = make_pair(config)
    drafter.train().lm_head.weight.requires_grad_(True)
    nothing = without_labels(make_batch(config, LENGTHS))
    loss, _, grads = step(drafter, objective, [nothing], torch.tensor(0))
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("lengths", [LENGTHS, (107,)])
@pytest.mark.parametrize("num_parts", [2, 3, 7])
@pytest.mark.parametrize(
    ("window", "dpace_alpha", "train_head"),
    [(None, None, False), (9, None, False), (None, 0.5, False), (None, 0.5, True)],
)
def test_parts_add_up_to_the_whole(lengths, num_parts, window, dpace_alpha, train_head):
    layer = {"sliding_window": window, "layer_types": ["sliding_attention"] * 2} if window else {}
    config = make_config(layer=layer)
    # The norms round to float32.
    drafter, objective = make_pair(config, dpace_alpha=dpace_alpha)
    drafter, batch = drafter.double().train(), make_batch(config, lengths)
    drafter.lm_head.weight.requires_grad_(train_head)
    objective.verifier_head.double()
    objective.draft_head.double()
    num_items = int((batch["labels"] != -100).sum())
    parts = partition(batch, num_parts)
    assert 1 < len(parts) <= num_parts
    rows = [part["anchors"].numel() for part in parts]
    assert max(rows) < batch["anchors"].numel()

    loss, counters, grads = step(drafter, objective, [batch], num_items)
    part_loss, part_counters, part_grads = step(drafter, objective, parts, num_items)
    assert part_loss == pytest.approx(loss, rel=1e-6)
    assert torch.equal(part_counters, counters)
    assert part_grads.keys() == grads.keys()
    assert ("lm_head.weight" in grads) == train_head
    for name, grad in grads.items():
        torch.testing.assert_close(part_grads[name], grad, rtol=1e-4, atol=1e-8)


def test_no_part_is_larger_than_asked_and_fewer_parts_would_be():
    batch = make_batch(make_config(), LENGTHS)
    for max_rows in (90, 130, 200):
        parts = partition_by_slots(batch, max_rows)
        assert all(part["anchors"].numel() <= max_rows for part in parts)
    smallest = max(part["anchors"].numel() for part in partition(batch, 3))
    assert len(partition_by_slots(batch, smallest - 1)) > 3


def test_one_part_is_the_batch_itself():
    batch = make_batch(make_config(), LENGTHS)
    assert partition(batch, 1) == [batch]
    (only,) = partition_by_slots(batch, batch["anchors"].numel())
    for name, value in batch.items():
        torch.testing.assert_close(only[name], value, rtol=0, atol=0)


def test_a_document_too_long_for_a_part_is_refused():
    batch = make_batch(make_config(), LENGTHS)
    with pytest.raises(PeagleError, match="parts of 20 slots"):
        partition_by_slots(batch, 20)
