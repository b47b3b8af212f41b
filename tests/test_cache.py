"""Kinds of cache files, what speculators makes of them, and `peagle-hf cache`."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_cache, write_prepared
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from torch import Tensor

from peagle_hf import (
    CODDataCollator,
    ExtractArguments,
    HiddenStatesDataset,
    PeagleError,
    PeagleTrainingArguments,
    cli,
    extract,
    train,
)
from peagle_hf.data import cache_command, cache_storage
from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.cache_storage import (
    STORAGES,
    CachedStates,
    cached_rows,
    check_file,
    read_states,
    row_path,
    write_states,
)
from peagle_hf.data.packing import EpochSampler
from peagle_hf.data.prepared_dataset import split_rows
from peagle_hf.model.slots import target_tokens

TOKENS, SLOTS, SIZE = 300, 4, 24
LEARNT = ("learnt", "fp8-learnt")


def make_states(seed: int = 0) -> tuple[Tensor, Tensor]:
    """States whose tokens differ widely in size, one of them all zero, and which are targets."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(TOKENS, SLOTS, SIZE, generator=generator) * torch.logspace(-3, 3, TOKENS)[:, None, None]
    states[7] = 0
    return states.bfloat16(), torch.rand(TOKENS, generator=generator) < 0.6


@pytest.mark.parametrize("storage", STORAGES)
def test_every_kind_gives_back_what_it_keeps(storage, tmp_path):
    states, is_target = make_states()
    write_states(tmp_path, 3, states, torch.arange(TOKENS), storage, is_target)
    assert check_file(row_path(tmp_path, 3), (TOKENS, SLOTS, SIZE), torch.arange(TOKENS), is_target) is None
    row = read_states(tmp_path, 3)
    assert row.storage == storage
    found = torch.cat(
        [row.hidden_states.view(TOKENS, SLOTS - 1, SIZE)[is_target], row.last_of(is_target)[:, None]], dim=1
    )
    assert found.dtype == torch.bfloat16
    if "fp8" in storage:
        largest = states[is_target].float().abs().amax((1, 2), keepdim=True).clamp(min=1e-9)
        assert ((found.float() - states[is_target].float()).abs() / largest).max() < 2**-4
    else:
        assert torch.equal(found, states[is_target])

    short = read_states(tmp_path, 3, length=100)
    assert torch.equal(short.hidden_states, row.hidden_states[:100])
    assert torch.equal(short.last_of(is_target[:100]), row.last_of(is_target)[: int(is_target[:100].sum())])
    some = is_target & (torch.arange(TOKENS) % 3 == 0)
    assert torch.equal(row.last_of(some), row.last_of(is_target)[some[is_target]])
    if storage in LEARNT:
        with pytest.raises(PeagleError, match="tokens are needed but not stored"):
            row.last_hidden_states  # noqa: B018
    else:
        assert torch.equal(row.last_hidden_states[is_target], row.last_of(is_target))


def test_learnt_files_hold_the_same_numbers_as_whole_ones(tmp_path):
    states, is_target = make_states()
    for row, storage in enumerate(STORAGES):
        write_states(tmp_path, row, states, torch.arange(TOKENS), storage, is_target)
    for whole, learnt in ((0, 2), (1, 3)):
        whole, learnt = read_states(tmp_path, whole), read_states(tmp_path, learnt)
        assert torch.equal(whole.hidden_states, learnt.hidden_states)
        assert torch.equal(whole.last_of(is_target), learnt.last_of(is_target))


def test_a_row_without_targets_is_a_file_too(tmp_path):
    states, _ = make_states()
    write_states(tmp_path, 0, states, torch.arange(TOKENS), "fp8-learnt", torch.zeros(TOKENS, dtype=torch.bool))
    assert read_states(tmp_path, 0).last_of(torch.zeros(TOKENS, dtype=torch.bool)).shape == (0, SIZE)
    assert check_file(row_path(tmp_path, 0), (TOKENS, SLOTS, SIZE), torch.arange(TOKENS)) is None


def test_speculators_reads_what_is_written_here(tmp_path):
    transfer = pytest.importorskip("hs_connectors.transfer")
    states, _ = make_states()
    write_states(tmp_path, 0, states, torch.arange(TOKENS))
    write_states(tmp_path, 1, states, torch.arange(TOKENS), "fp8")
    plain = transfer.FileTransfer(tmp_path).get_cached(0)
    assert plain.keys() == {"hidden_states", "token_ids"}
    assert torch.equal(plain["hidden_states"], states)
    fp8 = transfer.FP8Transfer(tmp_path).get_cached(1)
    assert torch.equal(fp8["token_ids"], torch.arange(TOKENS))
    ours = read_states(tmp_path, 1)
    ours = torch.cat([ours.hidden_states, ours.last_hidden_states], dim=1).view(TOKENS, SLOTS, SIZE)
    torch.testing.assert_close(ours, fp8["hidden_states"], rtol=2**-7, atol=0)


def test_every_float8_value_is_read_as_pytorch_converts_it():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 1, 128)
    scales = torch.tensor([0.37, 5e-9]).view(2, 1, 1)
    expected = (every.float() * scales).bfloat16()
    torch.testing.assert_close(cache_storage._values(every, scales), expected, rtol=0, atol=0, equal_nan=True)


def test_fp8_files_are_those_of_speculators_bit_for_bit(tmp_path):
    utils = pytest.importorskip("hs_connectors.fp8_utils")
    states, _ = make_states()
    write_states(tmp_path, 0, states, torch.arange(TOKENS), "fp8")
    stored, scales = utils.quantize_tensor_to_fp8(states)
    theirs = {"hidden_states": stored, utils.SCALES_KEY: scales, "token_ids": torch.arange(TOKENS)}
    save_file(theirs, row_path(tmp_path, 1))
    ours = load_file(row_path(tmp_path, 0))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(read_states(tmp_path, 0).hidden_states, read_states(tmp_path, 1).hidden_states)


def test_what_speculators_cannot_read_it_does_not_take_for_states(tmp_path):
    transfer = pytest.importorskip("hs_connectors.transfer")
    states, is_target = make_states()
    write_states(tmp_path, 0, states, torch.arange(TOKENS), "learnt", is_target)
    assert "hidden_states" not in transfer.FileTransfer(tmp_path).get_cached(0)


@pytest.fixture
def arguments(tiny_verifier, tmp_path) -> ExtractArguments:
    write_prepared(tmp_path, [12 + index for index in range(8)])
    return ExtractArguments(model=str(tiny_verifier), preprocessed_data=str(tmp_path), target_layer_ids=[2, 3, 4])


@pytest.mark.parametrize("storage", STORAGES)
def test_extraction_stores_every_kind(storage, arguments, caplog):
    caplog.set_level("INFO")
    arguments.storage = storage
    report = extract(arguments)
    assert Manifest.read(report.output).storage == storage
    data = load_from_disk(arguments.preprocessed_data).with_format("torch")
    num_tokens = num_last = 0
    for row, sample in enumerate(data):
        cached = read_states(report.output, row)
        assert cached.storage == storage
        mask = sample["loss_mask"].bool()
        expected = torch.tensor([0, *(mask[1:-1] & mask[2:]).tolist(), 0]).bool()
        assert (cached.is_target is None) == (storage not in LEARNT)
        assert cached.is_target is None or torch.equal(cached.is_target, expected)
        num_tokens += len(mask)
        num_last += int(expected.sum())
    tensors = report.manifest.bytes_of(num_tokens, num_last if storage in LEARNT else num_tokens)
    used = sum(row_path(report.output, row).stat().st_size for row in range(8))
    assert 0 < used - tensors < 8 * 512, "the headers"
    assert extract(arguments).num_kept == 8
    arguments.storage = STORAGES[STORAGES.index(storage) - 1]
    with pytest.raises(PeagleError, match=f"storage is '{storage}', wanted is '{arguments.storage}'"):
        extract(arguments)


def test_fp8_is_read_as_bfloat16_and_nothing_else(arguments):
    arguments.storage, arguments.dtype = "fp8", "float32"
    with pytest.raises(PeagleError, match="read as bfloat16"):
        extract(arguments)


def test_folders_of_the_first_format_are_plain(arguments):
    output = extract(arguments).output
    content = json.loads((output / "manifest.json").read_text())
    del content["storage"]
    (output / "manifest.json").write_text(json.dumps(content | {"format_version": 1}))
    assert extract(arguments).num_kept == 8


def test_learnt_files_of_another_loss_mask_are_refused_and_made_again(arguments, tmp_path):
    arguments.storage = "learnt"
    output = extract(arguments).output
    data = load_from_disk(arguments.preprocessed_data)
    data.map(lambda row: {"loss_mask": [1] * row["seq_len"]}).save_to_disk(tmp_path / "all")
    with pytest.raises(PeagleError, match=r"8 of the files .* hs_0\.safetensors: it lacks the last layer's states of"):
        HiddenStatesDataset(tmp_path / "all", output)
    manifest = Manifest.read(output)
    replace(manifest, rows=None).write(output)  # earlier versions wrote no rows
    dataset = HiddenStatesDataset(tmp_path / "all", output)
    with pytest.raises(PeagleError, match=r"hs_\d\.safetensors: The last layer's states of \d tokens are needed"):
        dataset[0]
    arguments.output, arguments.preprocessed_data, arguments.validate_outputs = str(output), str(tmp_path / "all"), True
    assert extract(arguments).made_again.keys() == set(range(8))
    dataset[0]


def train_losses(flags: dict, folder: Path, output: Path) -> list[float]:
    train(PeagleTrainingArguments(**flags | {"hidden_states_path": str(folder), "output_dir": str(output)}))
    log = json.loads((output / "checkpoint_best" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_training_on_every_kind(train_flags, tiny_data, tmp_path):
    """Learnt-only caches give the very losses of whole ones, fp8 caches nearly those of 16-bit ones."""
    flags = train_flags | {"num_train_epochs": 1}
    losses = {}
    for storage in STORAGES:
        cache_command.convert(tiny_data / "hidden_states", tmp_path / storage, storage, str(tiny_data))
        losses[storage] = train_losses(flags, tmp_path / storage, tmp_path / f"trained-{storage}")
    assert len(losses["plain"]) > 2
    assert losses["plain"] == train_losses(flags, tiny_data / "hidden_states", tmp_path / "trained")
    assert losses["learnt"] == losses["plain"]
    assert losses["fp8-learnt"] == losses["fp8"] != losses["plain"]
    assert losses["fp8"] == pytest.approx(losses["plain"], rel=0.08)


def test_kinds_may_be_mixed_file_by_file(tiny_data, tmp_path):
    batches = []
    for storage in ("plain", "learnt"):
        cache_command.convert(tiny_data / "hidden_states", tmp_path / storage, storage, str(tiny_data))
    for row in range(0, 20, 2):
        row_path(tmp_path / "learnt", row).replace(row_path(tmp_path / "plain", row))
    for folder in (tiny_data / "hidden_states", tmp_path / "plain"):
        batches.append(CODDataCollator(num_depths=3)([HiddenStatesDataset(tiny_data, folder, total_seq_len=64)[0]]))
    torch.testing.assert_close(*batches, rtol=0, atol=0)


@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("target", STORAGES)
def test_conversion_between_all_kinds(source, target, tiny_data, tmp_path):
    whole = tiny_data / "hidden_states"
    cache_command.convert(whole, tmp_path / source, source, str(tiny_data))
    if source in LEARNT and target not in LEARNT:
        with pytest.raises(
            PeagleError, match=r"hs_0\.safetensors can't be converted .* lack .* which speculators reads"
        ):
            cache_command.convert(tmp_path / source, tmp_path / "new", target, str(tiny_data))
        assert not (tmp_path / "new").exists()
        return
    cache_command.convert(tmp_path / source, tmp_path / "new", target, str(tiny_data))
    direct = tmp_path / "direct"
    cache_command.convert(whole, direct, target, str(tiny_data))
    manifest = Manifest.read(tmp_path / "new")
    assert manifest == Manifest.read(direct)
    assert manifest.storage == target
    for row in range(20):
        new, expected = read_states(tmp_path / "new", row), read_states(direct, row)
        assert new.storage == target
        mask = target_tokens(torch.tensor(load_from_disk(str(tiny_data)).with_format(None)[row]["loss_mask"]).bool())
        exact = "fp8" not in source or "fp8" in target
        if exact and (source, target) != ("learnt", "fp8-learnt"):
            assert torch.equal(new.hidden_states, expected.hidden_states)
        assert not exact or torch.equal(new.last_of(mask), expected.last_of(mask))
        torch.testing.assert_close(new.hidden_states, expected.hidden_states, rtol=2**-3, atol=0.02)
    assert sorted(os.listdir(tmp_path / "new")) == sorted(
        [*(f"hs_{row}.safetensors" for row in range(20)), "manifest.json"]
    )


def test_a_conversion_that_is_cut_off_is_no_cache_and_goes_on(tiny_data, tmp_path, monkeypatch):
    source, new, written = tiny_data / "hidden_states", tmp_path / "new", []

    def save_seven(path: Path, row: CachedStates) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path.name)
        cache_storage.save_states(path, row)

    monkeypatch.setattr(cache_command, "save_states", save_seven)
    with pytest.raises(KeyboardInterrupt):
        cache_command.convert(source, new, "fp8")
    assert not new.exists()
    with pytest.raises(PeagleError, match="20 of 20 hidden-state files are missing"):
        HiddenStatesDataset(tiny_data, new)
    (working,) = tmp_path.iterdir()
    assert Manifest.read(working) is None
    with pytest.raises(PeagleError, match="of something else that isn't finished"):
        cache_command.convert(source, new, "plain")

    written.clear()
    monkeypatch.setattr(
        cache_command,
        "save_states",
        lambda path, row: (written.append(path.name), cache_storage.save_states(path, row)),
    )
    cache_command.convert(source, new, "fp8")
    assert len(written) == 13
    assert cached_rows(new) == set(range(20))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(PeagleError, match="is not empty"):
        cache_command.convert(source, new, "fp8")


def test_a_conversion_that_is_killed_at_its_end_does_not_pass_for_another(tiny_data, tmp_path, monkeypatch):
    """All files are written, but don't have their folder's name yet."""
    source, new = tiny_data / "hidden_states", tmp_path / "new"

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", kill)
        with pytest.raises(KeyboardInterrupt):
            cache_command.convert(source, new, "fp8")
    with pytest.raises(PeagleError, match="of something else that isn't finished"):
        cache_command.convert(source, new, "learnt", str(tiny_data))
    cache_command.convert(source, new, "fp8")
    assert sorted(os.listdir(new)) == sorted([*(f"hs_{row}.safetensors" for row in range(20)), "manifest.json"])
    assert cache_command.inspect(str(new)).storages == {"fp8": 20}


def test_folders_of_speculators_are_converted_as_they_are(tmp_path):
    utils = pytest.importorskip("hs_connectors.fp8_utils")
    states, _ = make_states()
    (tmp_path / "theirs").mkdir()
    stored, scales = utils.quantize_tensor_to_fp8(states)
    save_file(
        {"hidden_states": stored, "hidden_states_scales": scales, "token_ids": torch.arange(TOKENS)},
        tmp_path / "theirs" / "hs_5.safetensors",
    )
    cli.main(["cache", "convert", str(tmp_path / "theirs"), str(tmp_path / "plain"), "--storage", "plain"])
    assert os.listdir(tmp_path / "plain") == ["hs_5.safetensors"]
    exact = stored.float() * scales
    assert torch.equal(load_file(row_path(tmp_path / "plain", 5))["hidden_states"], exact.bfloat16())
    with pytest.raises(PeagleError, match=r"need the loss mask of row 5, which isn't known.*--preprocessed-data"):
        cache_command.convert(tmp_path / "theirs", tmp_path / "learnt", "learnt")


def break_file(path: Path, how: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        return
    if how == "tokens":
        tensors["token_ids"] += 1
    if how == "not finite":
        tensors["hidden_states"][1, 2, 3] = float("inf")
    if how == "layers":
        tensors["hidden_states"] = tensors["hidden_states"][:, 1:].contiguous()
    save_file(tensors, path)


@pytest.fixture
def broken(tiny_verifier, tmp_path) -> Path:
    """One row is missing, and four files can't be used, two of which only their content gives away."""
    folder = write_cache(write_prepared(tmp_path, [12 + index for index in range(8)]), tiny_verifier) / "hidden_states"
    row_path(folder, 2).unlink()
    (folder / "failed.json").write_text('{"2": "no answer"}')
    for row, how in enumerate(("truncated", "tokens", "not finite", "layers"), start=4):
        break_file(row_path(folder, row), how)
    return folder


def test_info_shows_what_the_headers_show(broken, tiny_verifier, capsys):
    cli.main(["cache", "info", str(broken)])
    out = capsys.readouterr().out
    size = sum(row_path(broken, row).stat().st_size for row in (0, 1, 3, 6))
    tokens = sum(12 + row for row in (0, 1, 3, 6))
    for expected in (
        f"Verifier  {tiny_verifier} (LlamaForCausalLM)",
        "Layers    [2, 3, 4] and the last, of 7",
        "Storage   plain (4) in BF16",
        f"Tokens    {tokens}",
        f"Bytes     {size}, {size / tokens:.0f} a token",
        "Missing   1 row: 2",
        "Unusable  3",
        "hs_2.safetensors: no answer",
        "hs_4.safetensors: it can't be opened",
        "hs_7.safetensors: hidden_states is [19, 3, 32] instead of [19, 4, 32]",
    ):
        assert expected in out, expected


def test_verify_reads_everything_and_fails_with_the_list(broken, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", "verify", str(broken)])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "4 files" in printed.err
    assert "1 sample has no file" in printed.err
    for row, reason in ((4, "can't be opened"), (5, "other tokens"), (6, "not finite"), (7, "instead of")):
        assert re.search(rf"hs_{row}\.safetensors: .*{reason}", printed.out)


def test_verify_passes_a_sound_folder(tiny_data, capsys):
    cli.main(["cache", "verify", str(tiny_data / "hidden_states")])
    assert "Missing   none" in capsys.readouterr().out


def test_what_cannot_be_used_is_not_converted(broken, tmp_path):
    with pytest.raises(PeagleError, match=r"hs_4\.safetensors can't be converted: it can't be opened"):
        cache_command.convert(broken, tmp_path / "new", "fp8")
    row_path(broken, 4).unlink()
    with pytest.raises(PeagleError, match=r"hs_6\.safetensors can't be converted: it has values that are not finite"):
        cache_command.convert(broken, tmp_path / "new", "fp8", None)
    with pytest.raises(PeagleError, match="no storage kind 'fp16': name one of plain, fp8, learnt, fp8-learnt"):
        cache_command.convert(broken, tmp_path / "new", "fp16")


def test_a_conversion_that_cannot_begin_is_not_in_the_way_of_the_next(tiny_data, tmp_path):
    cache_command.convert(tiny_data / "hidden_states", tmp_path / "learnt", "learnt", str(tiny_data))
    with pytest.raises(PeagleError, match="can't be converted to plain"):
        cache_command.convert(tmp_path / "learnt", tmp_path / "new", "plain", str(tiny_data))
    cache_command.convert(tmp_path / "learnt", tmp_path / "new", "fp8-learnt", str(tiny_data))
    assert Manifest.read(tmp_path / "new").storage == "fp8-learnt"


@pytest.mark.parametrize("words", [["convert", "FOLDER"], ["info", "FOLDER", "new"], ["info", "nowhere"]])
def test_wrong_command_lines_say_what_is_meant(words, tiny_data, capsys):
    folder = str(tiny_data / "hidden_states")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", *(folder if word == "FOLDER" else word for word in words)])
    assert stopped.value.code == 1
    assert "folder" in capsys.readouterr().err.lower()


def test_start_up_opens_no_file(tiny_data, tmp_path):
    """Links to nothing are listed, but can't be opened."""
    for row in range(20):
        row_path(tmp_path, row).symlink_to("/nowhere")
    rows, _ = split_rows(tiny_data, 0.9)
    dataset = HiddenStatesDataset(tiny_data, tmp_path, total_seq_len=64, rows=rows)
    assert len(list(EpochSampler(len(dataset), seed=0))) == len(dataset)
    with pytest.raises(PeagleError, match="can't be read"):
        dataset[0]


def resident(kind: str) -> int:
    """Bytes of this process's memory, of the kind that the kernel calls RssFile or RssAnon."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_states_that_nobody_looks_at_are_not_read(tmp_path):
    """A row's first tokens, and of the rest the targets alone: pages of the file that are never touched stay out."""
    states = torch.randn(4096, 4, 2048).bfloat16()
    is_target = torch.arange(4096) >= 4000
    write_states(tmp_path, 0, states, torch.arange(4096), "learnt", is_target)

    before = resident("RssFile")
    row = read_states(tmp_path, 0, length=256)
    kept = row.hidden_states.clone()
    assert torch.equal(kept, states[:256, :3].flatten(1))
    assert resident("RssFile") - before < 8 * kept.nbytes < states.nbytes / 2


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """An epoch over 128 MiB of states holds a few of them at a time."""
    write_prepared(tmp_path, [512] * 64)
    data = load_from_disk(str(tmp_path)).with_format("torch")
    states = torch.randn(512, 4, 512).bfloat16()
    for row in range(64):
        write_states(tmp_path / "hidden_states", row, states, data[row]["input_ids"])
    dataset, collate = HiddenStatesDataset(tmp_path, total_seq_len=1024), CODDataCollator(num_depths=3)
    collate([dataset[0]])
    before = [resident(kind) for kind in ("RssFile", "RssAnon")]
    for number in range(len(dataset)):
        assert collate([dataset[number]])["hidden_states"].shape == (1, 1020, 3 * 512)
        now = [resident(kind) for kind in ("RssFile", "RssAnon")]
        assert sum(now) - sum(before) < 24 << 20


@pytest.mark.parametrize(
    ("storage", "least", "most"),
    [("plain", 32768, 32900), ("fp8", 16384, 16500), ("learnt", 29491, 29600), ("fp8-learnt", 14745, 14.5 * 1024)],
)
def test_bytes_a_token_at_the_sizes_of_qwen3_8b(storage, least, most, tmp_path):
    """Three auxiliary layers and the last, 4,096 wide, 60 % of 500 tokens being targets."""
    is_target = torch.arange(500) >= 200
    write_states(tmp_path, 0, torch.randn(500, 4, 4096).bfloat16(), torch.arange(500), storage, is_target)
    assert least < row_path(tmp_path, 0).stat().st_size / 500 < most
