"""Changed inputs: a verifier, data, a tokenizer or hidden states that are other ones than they were are noticed."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import filelock
import pytest
import torch
from conftest import AUX, write_prepared
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file
from test_prepare import CHATML, hello, make_tokenizer, prepared, write_lines
from transformers import AutoModelForCausalLM

from peagle_hf import ExtractArguments, PeagleError, PeagleTrainingArguments, cli, extract, fingerprint, train
from peagle_hf.data.cache_command import convert
from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.cache_storage import row_path
from peagle_hf.data.prepare import PrepareArguments, prepare
from peagle_hf.data.prepared_dataset import column, load_prepared, rows_fingerprint
from peagle_hf.fingerprint import has_weights, weights_of
from peagle_hf.training.run import build_datasets, build_drafter
from peagle_hf.training.warm_start import continued_config

MIDDLE = "model.layers.3.self_attn.q_proj.weight"
"""A tensor that lies neither at the beginning nor at the end of a file."""


def fine_tune(folder: Path) -> None:
    """Change one tensor in the middle; every file keeps its size and its time of modification."""
    (path,) = [path for path in folder.glob("*.*") if path.suffix in (".safetensors", ".bin") and holds(path)]
    before = path.stat()
    if path.suffix == ".bin" and path.read_bytes()[:2] != b"PK":
        tensor = torch.load(path, weights_only=True)[MIDDLE]
        content = path.read_bytes()
        path.write_bytes(content.replace(*((values.numpy().tobytes()) for values in (tensor, tensor * 1.01))))
    elif path.suffix == ".bin":
        tensors = torch.load(path, weights_only=True)
        tensors[MIDDLE] = tensors[MIDDLE] * 1.01
        torch.save(tensors, path)
    else:
        tensors = load_file(path)
        tensors[MIDDLE] = tensors[MIDDLE] * 1.01
        save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def holds(path: Path) -> bool:
    return MIDDLE in (torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path))


@pytest.fixture
def verifier(tiny_verifier, tmp_path) -> Path:
    return shutil.copytree(tiny_verifier, tmp_path / "verifier")


def save_as(kind: str, source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    if kind == "one file":
        return folder
    model = AutoModelForCausalLM.from_pretrained(source)
    (folder / "model.safetensors").unlink()
    if kind == "shards":
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        return folder
    tensors = model.state_dict()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "torch")
    return folder


@pytest.mark.fault("one tensor in the middle changes, size and mtime stay", "the verifier is another one")
@pytest.mark.parametrize("kind", ["one file", "shards", "torch", "old torch"])
def test_weights_are_known_by_their_values(kind, tiny_verifier, tmp_path):
    folder = save_as(kind, tiny_verifier, tmp_path / "verifier")
    original = weights_of(folder)
    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)  # the copies have other times
    assert weights_of(moved) == original
    assert has_weights(original, moved)
    fine_tune(folder)
    assert weights_of(folder) != original
    assert has_weights(original, folder) is False
    assert weights_of(folder).split("weights")[0] == original.split("weights")[0]  # the configuration is the same


def test_how_tensors_are_spread_over_files_is_no_difference(tiny_verifier, tmp_path):
    assert weights_of(save_as("shards", tiny_verifier, tmp_path / "shards")) == weights_of(tiny_verifier)


def test_a_configuration_counts_but_not_the_order_of_its_fields_nor_where_it_is_from(verifier):
    original = weights_of(verifier)
    config = json.loads((verifier / "config.json").read_text())
    reordered = dict(reversed(config.items())) | {"_name_or_path": "elsewhere", "transformers_version": "5.99"}
    (verifier / "config.json").write_text(json.dumps(reordered))
    assert weights_of(verifier) == original
    (verifier / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_of(verifier) != original


def test_large_tensors_are_read_in_a_few_blocks(verifier, monkeypatch):
    sizes = []
    read = fingerprint._read
    monkeypatch.setattr(fingerprint, "_read", lambda file, start, size: sizes.append(size) or read(file, start, size))
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 64)
    weights_of(verifier)
    assert max(sizes) <= 64 * fingerprint.BLOCKS
    assert sum(sizes) < (verifier / "model.safetensors").stat().st_size / 4


@pytest.mark.fault("a shard of the verifier is missing or cut off", "the folder is named")
def test_weights_that_can_not_be_read_are_named(tiny_verifier, tmp_path):
    folder = save_as("shards", tiny_verifier, tmp_path / "verifier")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PeagleError, match=rf"The weights in {folder} can't be read \(ValueError: .* shorter"):
        weights_of(folder)
    shard.unlink()
    with pytest.raises(PeagleError, match=rf"The weights in {folder} can't be read \(FileNotFoundError: "):
        weights_of(folder)


@pytest.fixture
def extracted(verifier, tmp_path) -> ExtractArguments:
    write_prepared(tmp_path / "data", [12 + index for index in range(20)])
    arguments = ExtractArguments(model=str(verifier), preprocessed_data=str(tmp_path / "data"), target_layer_ids=AUX)
    extract(arguments)
    return arguments


def training(train_flags, extracted, **flags) -> PeagleTrainingArguments:
    return PeagleTrainingArguments(
        **train_flags
        | {"verifier_name_or_path": extracted.model, "data_path": extracted.preprocessed_data, "num_train_epochs": 1}
        | flags
    )


@pytest.mark.fault("the verifier's middle layers are trained further in place", "its hidden states are refused")
def test_states_of_a_fine_tuned_verifier_are_refused_by_all_that_read_them(
    extracted, train_flags, verifier, capsys, tmp_path
):
    arguments = training(train_flags, extracted)
    drafter = train(arguments).state.best_model_checkpoint
    folder = str(Path(extracted.preprocessed_data) / "hidden_states")
    cli.main(["cache", "verify", folder])
    fine_tune(verifier)
    words = r"other weights or another configuration.*changed since"
    with pytest.raises(PeagleError, match=words):
        extract(extracted)
    with pytest.raises(PeagleError, match=words):
        build_drafter(arguments)
    capsys.readouterr()
    for command in (
        ["cache", "verify", folder],
        ["acceptance", "--model", str(drafter), "--data-path", extracted.preprocessed_data],
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, *(["--output", str(tmp_path / "a.json")] if command[0] == "acceptance" else [])])
        assert "other weights" in capsys.readouterr().err
    cli.main(["cache", "info", folder])
    assert f"Verifier  {verifier} (LlamaForCausalLM), which has other weights now" in capsys.readouterr().out


def test_a_hub_model_and_a_copy_of_it_are_compared_by_their_weights(verifier, tmp_path, monkeypatch):
    """A commit on the hub says nothing about a copy in a folder, or about a commit that changed the README alone."""
    hub = tmp_path / "models--org--m"
    for commit in ("c" * 40, "d" * 40):
        shutil.copytree(verifier, hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("d" * 40)
    monkeypatch.setattr(
        "peagle_hf.fingerprint.try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=str(tmp_path))
    )
    assert weights_of("org/m") == "d" * 40
    assert has_weights("c" * 40, "org/m", made_by="org/m") is True
    assert has_weights("c" * 40, str(verifier), made_by="org/m") is True
    assert has_weights("e" * 40, str(verifier), made_by="org/m") is None  # this commit isn't on this machine
    fine_tune(verifier)
    assert has_weights("c" * 40, str(verifier), made_by="org/m") is False
    for path in (hub / "snapshots" / ("d" * 40)).glob("*.safetensors"):
        path.unlink()
    assert has_weights(weights_of(verifier), "org/m") is None  # its weights aren't downloaded yet


@pytest.mark.fault("half of the hidden states are of another verifier", "training names one, extract makes all again")
def test_files_of_another_run_are_noticed(extracted, train_flags, tiny_verifier, tmp_path, capsys):
    other = shutil.copytree(tiny_verifier, tmp_path / "other")
    fine_tune(other)
    theirs = extract(replace(extracted, model=str(other), output=str(tmp_path / "theirs"))).output
    folder = Path(extracted.preprocessed_data) / "hidden_states"
    for row in range(0, 20, 2):
        shutil.copy(row_path(theirs, row), folder)
    dataset, _ = build_datasets(training(train_flags, extracted))
    with pytest.raises(PeagleError, match=r"hs_\d+\.safetensors holds states of other weights or layers \(config"):
        [dataset[number] for number in range(len(dataset))]
    with pytest.raises(SystemExit):
        cli.main(["cache", "verify", str(folder)])
    assert "10 files can't be used" in capsys.readouterr().err
    assert sorted(extract(extracted).made_again) == list(range(0, 20, 2))
    cli.main(["cache", "verify", str(folder)])


@pytest.mark.fault("the cache is that of another prepared dataset", "training refuses it before its first step")
def test_states_of_other_rows_are_refused_before_training_and_made_again(extracted, train_flags, tmp_path):
    other = write_prepared(tmp_path / "other", [12 + index for index in range(20)], seed=7)
    states = Path(extracted.preprocessed_data) / "hidden_states"
    arguments = training(train_flags, extracted, data_path=str(other), hidden_states_path=str(states))
    with pytest.raises(PeagleError, match=rf"16 of the files in {states} are not of .* other tokens.*another dataset"):
        build_datasets(arguments)
    again = replace(extracted, preprocessed_data=str(other), output=str(states))
    assert len(extract(again).made_again) == 20
    assert Manifest.read(states).rows == rows_fingerprint(other)
    assert build_datasets(arguments)


def test_more_rows_of_the_same_data_keep_what_is_there(verifier, tmp_path, caplog):
    """`--max-samples` changed: the rows of the smaller dataset are the first of the larger one."""
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": hello(number)} for number in range(30)])
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    few = PrepareArguments(model=str(tmp_path / "model"), data=[chats], output=str(tmp_path / "few"), max_samples=5)
    first, second = prepare(few), prepare(replace(few, output=str(tmp_path / "more"), max_samples=9))
    assert column(load_prepared(second), "input_ids")[:5] == column(load_prepared(first), "input_ids")
    with pytest.raises(PeagleError, match="max_samples was 5, is 9"):
        prepare(replace(few, max_samples=9))


def changed_tokenizer(folder: Path) -> None:
    """The same vocabulary, special tokens and template, with which text is cut otherwise."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


CHANGES = {
    "tokenization_fingerprint was": lambda at: changed_tokenizer(at / "model"),
    "the content of .*chats.jsonl has changed": lambda at: write_lines(at / "chats.jsonl", [{"messages": hello(99)}]),
    "tokenizer_fingerprint was": lambda at: make_tokenizer(CHATML + " ").save_pretrained(at / "model"),
}


@pytest.mark.fault("data files, tokenizer or template change under the same name", "prepare refuses the older dataset")
@pytest.mark.parametrize("words", CHANGES)
def test_prepare_notices_changed_inputs(words, tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": hello(number)} for number in range(6)])
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    arguments = PrepareArguments(model=str(tmp_path / "model"), data=[chats], output=str(tmp_path / "out"))
    prepare(arguments)
    CHANGES[words](tmp_path)
    with pytest.raises(PeagleError, match=f"made with other settings: {words}"):
        prepare(arguments)
    assert prepare(replace(arguments, overwrite=True))


@pytest.mark.fault("files of another dataset take the place of a prepared one's", "the file is named")
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "token_freq.pt", "chat_template.jinja"])
def test_files_of_another_dataset_are_noticed(name, tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(CHATML)
    folders = []
    for number in range(2):
        rows = [{"messages": hello(10 * number + row)} for row in range(10)]
        data = write_lines(tmp_path / f"{number}.jsonl", rows)
        arguments = PrepareArguments(
            model=str(tmp_path / "model"),
            data=[data],
            output=str(tmp_path / f"out{number}"),
            chat_template=str(tmp_path / "own.jinja"),
        )
        folders.append(prepare(arguments))
        (tmp_path / "own.jinja").write_text(CHATML.replace("assistant", "Assistant"))
    shutil.copy(folders[1] / name, folders[0] / name)
    with pytest.raises(PeagleError, match=rf"{folders[0]}/{name} is damaged, or isn't the file that belongs"):
        load_prepared(folders[0])


@pytest.mark.fault("prepare is killed while it puts files into place", "readers say so, a rerun does the rest")
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_dataset_that_is_put_into_place_by_halves_is_finished(count, tmp_path, monkeypatch):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    data = [write_lines(tmp_path / f"{number}.jsonl", [{"messages": hello(number)}] * 3) for number in range(2)]
    arguments = PrepareArguments(model=str(tmp_path / "model"), data=data[:1], output=str(tmp_path / "out"))
    prepare(arguments)
    new = replace(arguments, data=data[1:], overwrite=True)
    moved = []

    def kill(source, target, move=os.replace):
        if Path(source).parent.name == ".prepared":
            if len(moved) == count:
                raise KeyboardInterrupt
            moved.append(source)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare(new)
    with pytest.raises(PeagleError, match=r"out is not complete: peagle-hf prepare was stopped .*Run it again"):
        load_prepared(tmp_path / "out")
    finished = prepare(new)
    assert prepared(finished) == prepared(prepare(replace(new, output=str(tmp_path / "whole"))))
    assert not (finished / ".prepared").exists()
    assert json.loads((finished / "prepare.json").read_text())["data"] == data[1:]


def test_a_project_that_is_moved_goes_on_from_elsewhere(train_flags, tiny_verifier, tmp_path, monkeypatch):
    """Verifier, data and hidden states together: nothing is made again, and no flag says where the verifier is now."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    monkeypatch.chdir(old)
    shutil.copytree(tiny_verifier, old / "T")
    rows = [
        {"input_ids": [4 + (5 * row + step) % 80 for step in range(20)], "loss_mask": [0] * 6 + [1] * 14}
        for row in range(12)
    ]
    write_lines(old / "chats.jsonl", rows)
    arguments = PrepareArguments(model="T", data=["chats.jsonl"], output="data")
    prepare(arguments)
    extract(ExtractArguments(model="T", preprocessed_data="data"))
    old.rename(new)
    monkeypatch.chdir(tmp_path)
    before = rows_fingerprint("new/data")
    prepare(replace(arguments, model="new/T", data=["new/chats.jsonl"], output="new/data"))
    assert rows_fingerprint("new/data") == before
    report = extract(ExtractArguments(preprocessed_data="new/data"))
    assert (report.num_kept, report.manifest.verifier) == (12, str(new / "T"))
    flags = train_flags | {"data_path": "new/data", "verifier_name_or_path": None, "num_train_epochs": 1}
    train(PeagleTrainingArguments(**flags))
    shutil.move(new / "T", tmp_path / "elsewhere")
    with pytest.raises(PeagleError, match=r"The verifier .*T can't be read"):
        build_drafter(PeagleTrainingArguments(**flags))
    assert build_drafter(PeagleTrainingArguments(**flags | {"verifier_name_or_path": str(tmp_path / "elsewhere")}))
    assert extract(ExtractArguments(model="elsewhere", preprocessed_data="new/data")).num_kept == 12


@pytest.mark.fault("a model, a hub dataset or a verifier can't be read", "no empty output folder is left behind")
def test_what_fails_leaves_no_folder_behind(tiny_verifier, extracted, train_flags, tmp_path):
    nowhere = str(tmp_path / "new" / "deep" / "out")
    asked = ["regenerate", "--model", str(tmp_path / "x"), "--invent", "3", "--output", f"{nowhere}/c.jsonl"]
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    shutil.copytree(tiny_verifier, broken := tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors[MIDDLE]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for fails in (
        lambda: prepare(PrepareArguments(model=str(tmp_path / "model"), data=["no/where"], output=nowhere)),
        lambda: extract(replace(extracted, model=str(broken), output=nowhere)),
        lambda: train(training(train_flags, extracted, output_dir=nowhere, verifier_name_or_path=str(broken))),
        lambda: cli.main(asked),
    ):
        with pytest.raises((PeagleError, SystemExit)):
            fails()
        assert not (tmp_path / "new").exists(), list((tmp_path / "new").rglob("*"))


@pytest.mark.fault(
    "another process writes the same output folder", "the second is refused, and leaves the folder alone"
)
def test_an_output_has_one_writer(extracted, tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": hello(0)}])
    arguments = PrepareArguments(model=str(tmp_path / "model"), data=[chats], output=str(tmp_path / "out"))
    states = Path(extracted.preprocessed_data) / "hidden_states"
    for folder, lock, writes in (
        (tmp_path / "out", ".prepare.lock", lambda: prepare(arguments)),
        (states, ".extract.lock", lambda: extract(extracted)),
        (tmp_path, ".new.lock", lambda: convert(states, tmp_path / "new", "fp8", extracted.preprocessed_data)),
    ):
        folder.mkdir(exist_ok=True)
        before = sorted(os.listdir(folder))
        with filelock.FileLock(folder / lock), pytest.raises(PeagleError, match="is being written by another process"):
            writes()
        assert sorted(set(os.listdir(folder)) - {lock}) == before
        writes()


def test_a_link_to_a_drafter_is_followed_once(train_flags, extracted, tmp_path, monkeypatch):
    """checkpoint_best of a training that is still under way moves while another one starts from it."""
    first = training(train_flags, extracted)
    train(first)
    best = Path(first.output_dir) / "checkpoint_best"
    shutil.copytree(best.resolve(), other := Path(first.output_dir) / "7")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    read = continued_config

    def read_and_move(*args):
        config = read(*args)
        best.unlink()
        best.symlink_to("7")
        return config

    monkeypatch.setattr("peagle_hf.training.run.continued_config", read_and_move)
    again = training(train_flags, extracted, from_pretrained=str(best), output_dir=str(tmp_path / "second"))
    for name in ("num_layers", "draft_vocab_size"):
        setattr(again, name, again.__dataclass_fields__[name].default)
    assert build_drafter(again).fc.weight.abs().max() > 0
