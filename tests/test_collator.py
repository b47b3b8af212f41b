"""The collator and the dataset: what a batch holds, and what it may not depend on."""

import doctest
import logging
import time

import pytest
import torch
from conftest import write_cache, write_prepared
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from peagle_hf import CODDataCollator, HiddenStatesDataset, PeagleError
from peagle_hf.data import collator
from peagle_hf.data.cache_storage import row_path
from peagle_hf.data.packing import EpochSampler, SequenceRequest, first_fit
from peagle_hf.data.prepared_dataset import load_prepared, split_rows


def test_doctests():
    assert doctest.testmod(collator).attempted > 0
    assert doctest.testmod(collator).failed == 0


def rows_by_sample(batch, order):
    """{sample: {(anchor in the document, depth): (position, label)}}, padding-free batches only."""
    counts = torch.bincount(batch["document_ids"][0])
    starts = counts.cumsum(0) - counts
    found = {sample: {} for sample in order}
    columns = [batch[name][0].tolist() for name in ("anchors", "depths", "position_ids", "labels")]
    for anchor, depth, position, label in zip(*columns, strict=True):
        document = batch["document_ids"][0, anchor].item()
        found[order[document]][anchor - starts[document].item(), depth] = (position, label)
    return found


@pytest.fixture
def dataset(tiny_data):
    return HiddenStatesDataset(tiny_data, total_seq_len=64)


@pytest.fixture
def collate():
    return CODDataCollator(num_depths=4, down_sample_ratio=0.8, seed=5)


def test_alignment_of_tokens_states_labels_and_targets(dataset, collate):
    """Position i sees x[i+1], g[i]; row (a, d) predicts x[a+d+2] from y[a+d+1], learnt if both are in the reply."""

    def last_states(row):
        return load_file(row_path(dataset.hidden_states_path, row))["hidden_states"][:, -1]

    item = dataset[0]
    batch = collate([item])
    offset = 0
    for number, document in enumerate(item["documents"]):
        tokens, mask = document["input_ids"], document["loss_mask"]
        size = tokens.numel() - 2
        assert torch.equal(batch["input_ids"][0, offset : offset + size], tokens[1:-1])
        assert torch.equal(batch["hidden_states"][0, offset : offset + size], document["hidden_states"][:-2])
        assert (batch["document_ids"][0, offset : offset + size] == number).all()
        columns = [batch[name][0].tolist() for name in ("anchors", "depths", "position_ids", "labels")]
        rows = zip(*columns, strict=True)
        for row, (anchor, depth, position, label) in enumerate(rows):
            if not offset <= anchor < offset + size:
                continue
            target = anchor - offset + depth
            assert position == target
            learnt = bool(mask[target + 1] and mask[target + 2])
            assert label == (tokens[target + 2].item() if learnt else -100)
            where = (batch["trained_slots"][0] == row).nonzero().flatten()
            assert where.numel() == learnt
            if learnt:
                state = batch["target_states"][0, batch["target_index"][0, where[0]]]
                learnt_before = int((mask[1 : target + 1] & mask[2 : target + 2]).sum())
                assert torch.equal(state, document["target_states"][learnt_before])
                assert torch.equal(state, last_states(document["sample_id"])[target + 1])
        offset += size
    assert offset == batch["input_ids"].shape[1]
    assert (batch["target_index"][0].diff() >= 0).all()


def test_packing_changes_no_row(dataset, collate):
    items = [dataset[index] for index in range(3)]
    together = [document["sample_id"] for item in items for document in item["documents"]]
    packed = rows_by_sample(collate(items), together)
    for item in items:
        for document in item["documents"]:
            alone = rows_by_sample(collate([{"epoch": 0, "documents": [document]}]), [document["sample_id"]])
            assert alone[document["sample_id"]] == packed[document["sample_id"]]


def test_epochs_differ_and_repeat(dataset, collate):
    def rows(epoch):
        item = dataset[SequenceRequest(epoch, 0)]
        return rows_by_sample(collate([item]), [document["sample_id"] for document in item["documents"]])

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_fillers_even_out_the_processes_and_teach_nothing(dataset, collate):
    requests = list(EpochSampler(len(dataset), seed=1, multiple=len(dataset) + 2))
    assert len(requests) == len(dataset) + 2
    assert sorted(request.number for request in requests[:-2]) == list(range(len(dataset)))
    assert [request.is_filler for request in requests[-3:]] == [False, True, True]
    batch = collate([dataset[requests[-1]]])
    assert (batch["labels"] == -100).all()
    assert batch["trained_slots"].shape == batch["target_index"].shape == (1, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_batches(dataset, collate, workers):
    sampler = EpochSampler(len(dataset), seed=1)
    sampler.set_epoch(3)
    loader = DataLoader(dataset, sampler=sampler, collate_fn=collate, num_workers=workers)
    expected = [collate([dataset[index]]) for index in sampler]
    assert len(expected) > 2
    for batch, wanted in zip(loader, expected, strict=True):
        assert batch.keys() == wanted.keys()
        torch.testing.assert_close(batch, wanted, rtol=0, atol=0)


def test_plan_holds_every_row_once_and_fills_no_row_over(dataset):
    lengths = dataset.data.with_format(None)["seq_len"]
    assert sorted(row for rows in dataset.plan for row in rows) == list(range(20))
    assert all(sum(lengths[row] - 2 for row in rows) <= 64 for rows in dataset.plan)
    again = HiddenStatesDataset(dataset.hidden_states_path.parent, total_seq_len=64)
    assert again.plan == dataset.plan


def test_first_fit_is_the_greedy_rule():
    assert first_fit([5, 4, 3, 2, 6], 8) == [[0, 2], [1, 3], [4]]
    assert first_fit([], 8) == []
    assert first_fit([8], 8) == [[0]]


@given(st.lists(st.integers(1, 30), max_size=60))
def test_first_fit_is_the_plain_search(sizes):
    bins, rooms = [], []
    for item, size in enumerate(sizes):
        place = next((place for place, room in enumerate(rooms) if room >= size), len(bins))
        if place == len(bins):
            bins.append([])
            rooms.append(30)
        bins[place].append(item)
        rooms[place] -= size
    assert first_fit(sizes, 30) == bins


def test_first_fit_is_not_quadratic():
    """Nearly full bins that one tiny document could still join are not searched one by one (it took minutes)."""
    start = time.process_time()
    bins = first_fit([3 if item == 0 else 5000 + item % 3000 for item in range(50_000)], 8192)
    assert len(bins) > 40_000
    assert time.process_time() - start < 10


def test_long_documents_are_cut_counted_and_said(tiny_data, caplog):
    dataset = HiddenStatesDataset(tiny_data, total_seq_len=16)
    assert dataset.num_truncated == 13
    assert "13 of 20 samples are longer than total_seq_len 16" in caplog.text
    assert max(document["input_ids"].numel() for index in range(20) for document in dataset[index]["documents"]) == 18


def test_many_long_documents_are_looked_at_together(tmp_path, monkeypatch):
    """One after another took a minute for 90,000 of them; `_targets` is what is right."""
    lengths = [40 + 7 * index % 90 for index in range(1100)]
    write_prepared(tmp_path, lengths)
    (tmp_path / "hidden_states").mkdir()
    monkeypatch.setattr("peagle_hf.data.dataset.cached_rows", lambda folder: set(range(len(lengths))))
    one_by_one, looked_at = HiddenStatesDataset._targets, []

    def targets(self, row):
        looked_at.append(row)
        return one_by_one(self, row)

    monkeypatch.setattr(HiddenStatesDataset, "_targets", targets)
    dataset = HiddenStatesDataset(tmp_path, total_seq_len=20)
    assert len(looked_at) < 10
    rows = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    assert dataset._count_learnt(rows) == [int(one_by_one(dataset, row).sum()) for row in rows]
    assert dataset._count_learnt([]) == []


def test_documents_that_teach_nothing_before_the_cut_are_left_out_and_said(tiny_data, caplog):
    lengths = load_prepared(tiny_data)["seq_len"]
    late = [row for row in range(20) if lengths[row] - 2 > 4]
    dataset = HiddenStatesDataset(tiny_data, total_seq_len=4, rows=[*late])
    learnt = {row for rows in dataset.plan for row in rows}
    assert all(dataset.num_learnt(number) for number in range(len(dataset)))
    assert len(learnt) + int(caplog.text.split(" samples are left out: nothing")[0].split()[-1]) == len(late)
    with pytest.raises(PeagleError, match=r"something to train on in its first 1.*raise --total-seq-len"):
        HiddenStatesDataset(tiny_data, total_seq_len=1)


def test_split_keeps_conversations_whole(tmp_path):
    conversations = [index // 3 for index in range(30)]
    write_prepared(tmp_path, [10] * 30, conversations)
    train, held_out = split_rows(tmp_path, 0.8, seed=0)
    assert sorted(train + held_out) == list(range(30))
    assert {conversations[row] for row in train}.isdisjoint(conversations[row] for row in held_out)
    assert len({conversations[row] for row in held_out}) == 2
    assert split_rows(tmp_path, 0.8, seed=0) == (train, held_out)
    assert split_rows(tmp_path, 0.8, seed=1) != (train, held_out)
    assert split_rows(tmp_path, 1.0)[1] == []


@pytest.fixture
def damaged(tmp_path, tiny_verifier):
    folder = write_cache(write_prepared(tmp_path / "data", [20] * 4), tiny_verifier)
    (folder / "hidden_states" / "hs_2.safetensors").unlink()
    return folder


def test_missing_files_raise_by_name(damaged):
    with pytest.raises(PeagleError, match=r"1 of 4 hidden-state files.*hs_2\.safetensors.*peagle-hf extract"):
        HiddenStatesDataset(damaged)


@pytest.mark.parametrize(("policy", "level"), [("skip", logging.INFO), ("warn", logging.WARNING)])
def test_missing_files_are_left_out_and_reported(damaged, caplog, policy, level):
    caplog.set_level(logging.INFO)
    dataset = HiddenStatesDataset(damaged, on_missing=policy)
    assert sorted(row for rows in dataset.plan for row in rows) == [0, 1, 3]
    assert [record.levelno for record in caplog.records if "hs_2.safetensors" in record.message] == [level]


def test_a_folder_without_any_file_is_named(damaged, tmp_path):
    with pytest.raises(PeagleError, match=f"4 of 4 .*{tmp_path / 'typo'}.*correct --hidden-states-path"):
        HiddenStatesDataset(damaged, tmp_path / "typo", on_missing="skip")


def test_truncated_and_foreign_cache_files_are_named(damaged):
    file = damaged / "hidden_states" / "hs_1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    dataset = HiddenStatesDataset(damaged, on_missing="skip", total_seq_len=20)
    numbers = {rows[0]: number for number, rows in enumerate(dataset.plan)}
    with pytest.raises(PeagleError, match=r"hs_1\.safetensors"):
        dataset[numbers[1]]
    (damaged / "hidden_states" / "hs_0.safetensors").rename(damaged / "hidden_states" / "hs_3.safetensors")
    with pytest.raises(PeagleError, match=r"hs_3\.safetensors holds the states of other tokens than row 3"):
        dataset[numbers[3]]


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    with pytest.raises(PeagleError, match="is not a prepared dataset"):
        HiddenStatesDataset(tmp_path)


def test_a_split_that_leaves_a_side_empty_is_refused(tmp_path):
    write_prepared(tmp_path, [10, 10], [0, 0])
    with pytest.raises(PeagleError, match="1 conversation can't be split"):
        split_rows(tmp_path, 0.5)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"num_depths": 0}, "num_depths 0 must be at least 1"),
        ({"down_sample_ratio": 0.0}, r"down_sample_ratio 0\.0 is not in \(0, 1\]"),
        ({"down_sample_ratio_min": 1.5}, r"down_sample_ratio_min 1\.5 is not in \[0, 1\]"),
        ({"max_anchors": 0}, "max_anchors 0 must be at least 1"),
    ],
)
def test_settings_that_draw_nothing_are_refused(changed, problem):
    with pytest.raises(PeagleError, match=problem):
        CODDataCollator(**changed)
