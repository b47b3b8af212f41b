"""The block mask against the dense one, and attention in rectangles against one dense attention."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from peagle_hf.model import attention, slots
from peagle_hf.model.forward_slots import PackedSlots


def long_document(length, num_depths=4, seed=0, documents=1):
    """Spans of `documents` documents of `length` positions, rows padded to whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    learnt = torch.ones(length, dtype=torch.bool)
    heads, tails = [], []
    for index in range(documents):
        anchors, depths = slots.sample_slots(learnt, num_depths, 0.7, 0.2, generator)
        heads.append((anchors[:length] + index * length, depths[:length]))
        tails.append((anchors[length:] + index * length, depths[length:]))
    anchors, depths = (torch.cat(parts) for parts in zip(*heads, *tails, strict=True))
    document_ids = torch.arange(documents).repeat_interleave(length)
    return slots.find_spans(anchors, depths, document_ids)


def padded(spans, multiple):
    return spans.map(lambda bound: torch.nn.functional.pad(bound, (0, -bound.numel() % multiple)))


def dense(spans, num_keys):
    return spans.map(lambda bound: bound[:, None]).sees(torch.arange(num_keys))


def visited(mask):
    """The element mask that a block mask stands for: partial blocks by `mask_mod`, whole ones entirely."""
    num_queries, num_keys = mask.seq_lengths
    by_element = create_mask(mask.mask_mod, None, None, num_queries, num_keys, device="cpu")[0, 0]
    found = torch.zeros_like(by_element)
    for counts, indices, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in indices[0, 0, row, :count].tolist():
                size = attention.BLOCK
                block = (slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
                found[block] = True if whole else by_element[block]
    return found


@pytest.mark.parametrize("documents", [1, 3])
def test_block_mask_is_the_dense_mask(monkeypatch, documents):
    monkeypatch.setattr(attention, "BLOCK", 8)
    spans = padded(long_document(50, documents=documents), 8)
    num_keys = spans.own_start.numel()
    mask = attention.block_mask(spans, num_keys, [])
    assert torch.equal(visited(mask), dense(spans, num_keys))
    assert mask.full_kv_num_blocks.sum() > 0


@pytest.mark.parametrize("documents", [1, 2])
def test_rectangles_are_visible_and_the_block_mask_has_the_rest(monkeypatch, documents):
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "STRIPE", 16)
    monkeypatch.setattr(attention, "KEY_UNIT", 8)
    spans = padded(long_document(150, documents=documents), 8)
    num_keys = spans.own_start.numel()
    expected, rectangles = dense(spans, num_keys), attention.find_rectangles(spans)
    assert len({keys.stop - keys.start for _, keys in rectangles}) > 2
    for rows, keys in rectangles:
        assert expected[rows, keys].all()
        expected[rows, keys] = False
    assert torch.equal(visited(attention.block_mask(spans, num_keys, rectangles)), expected)
    assert expected.sum() < dense(spans, num_keys).sum() / 2


def test_merging_rectangles_gives_dense_attention_and_its_gradients(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "STRIPE", 16)
    monkeypatch.setattr(attention, "KEY_UNIT", 8)
    spans = long_document(100)
    num_keys = spans.own_start.numel()
    # The cut leaves a row that sees nothing but a rectangle, and rows of padding, which see nothing at all.
    spans = padded(spans.map(lambda bound: bound[15:]), 64)
    whole, rectangles = dense(spans, num_keys), attention.find_rectangles(spans)
    near = whole.clone()
    for rows, keys in rectangles:
        near[rows, keys] = False
    assert (~near.any(1) & whole.any(1)).any()
    generator = torch.Generator().manual_seed(0)
    sizes = (whole.shape[0], num_keys, num_keys)
    states = [torch.randn(1, 2, size, 16, generator=generator).double().requires_grad_() for size in sizes]
    query, key, value = states

    def attend_near():
        scores = (query @ key.transpose(-1, -2) / 4).masked_fill(~near, float("-inf"))
        norm = scores.logsumexp(-1)
        weights = (scores - norm.masked_fill(norm.isinf(), 0).unsqueeze(-1)).exp()
        return weights @ value, norm

    output_grad = torch.randn(query.shape, generator=generator).double()
    seen = whole.any(1)
    assert not seen[-1]
    output_grad *= seen[:, None]
    expected = scaled_dot_product_attention(query, key, value, attn_mask=whole | ~seen[:, None])
    expected_grads = torch.autograd.grad(expected, states, output_grad)

    kept = {}
    for _ in range(2):  # the second pass uses what the first has kept
        output = attention.RectangleAttention.apply(query, key, value, *attend_near(), rectangles, kept)
        torch.testing.assert_close(output[:, :, seen], expected[:, :, seen], rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(output, states, output_grad)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("number", "blocks"), [(1, 2), (127, 2), (256, 2), (257, 3), (1000, 8)])
def test_flex_attention_gets_two_blocks_or_more(number, blocks):
    positions = torch.arange(number)
    documents = torch.zeros(number, dtype=torch.long)
    packed = PackedSlots(positions, documents, documents, positions[-1:], number, "flex_attention")
    assert number + packed.padding == blocks * attention.BLOCK
    assert packed.trained.tolist() == [number - 1] * 2 * attention.BLOCK
    unpadded = PackedSlots(positions, documents, documents, positions[-1:], number, "sdpa")
    assert (unpadded.padding, unpadded.trained.tolist()) == (0, [number - 1])
