"""A prepared dataset or cache with a missing, truncated or damaged file: named, with what to do, in every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import AUX
from test_prepare import CHATML, hello, make_tokenizer, prepared, write_lines

from peagle_hf import PeagleConfig, PeagleError, PeagleForSpeculation, cli
from peagle_hf.data import extract
from peagle_hf.data.dataset import HiddenStatesDataset
from peagle_hf.data.prepare import PrepareArguments, prepare
from peagle_hf.data.prepared_dataset import load_prepared
from peagle_hf.fingerprint import file_fingerprint
from peagle_hf.verifier.draft_vocabulary import load_token_freq

ARROW = "data-00000-of-00001.arrow"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\x00\xff" * (path.stat().st_size // 2))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {"missing": Path.unlink, "truncated": truncate, "overwritten": overwrite, "empty": empty}


@pytest.fixture
def arguments(tmp_path) -> PrepareArguments:
    make_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": hello(number)} for number in range(6)])
    return PrepareArguments(model=str(tmp_path / "model"), data=[data], output=str(tmp_path / "prepared"))


@pytest.mark.parametrize("name", [ARROW, "dataset_info.json", "state.json", "token_freq.pt"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_command_makes_a_damaged_dataset_anew(arguments, name, damage, caplog):
    """Also under hidden states, which still fit."""
    folder = prepare(arguments)
    whole = prepared(folder)
    (folder / "hidden_states").mkdir()
    (folder / "hidden_states" / "hs_0.safetensors").write_bytes(b"states")
    DAMAGES[damage](folder / name)
    with pytest.raises(PeagleError, match=name.partition("-")[0]) as error:
        load_token_freq(folder / name) if name == "token_freq.pt" else load_prepared(folder)
    assert str(folder) in str(error.value)
    assert "peagle-hf prepare" in str(error.value)
    prepare(arguments)
    assert "The dataset is prepared again" in caplog.text
    assert prepared(folder) == whole
    assert load_token_freq(folder / "token_freq.pt")
    assert (folder / "hidden_states" / "hs_0.safetensors").exists()


def test_a_missing_list_of_what_was_left_out_is_written_again(arguments, caplog):
    folder = prepare(arguments)
    whole = (folder / "skipped.json").read_bytes()
    (folder / "skipped.json").unlink()
    prepare(arguments)
    assert "skipped.json is missing" in caplog.text
    assert (folder / "skipped.json").read_bytes() == whole


def test_lost_rows_are_noticed(arguments):
    """An Arrow file that ends between two batches is a whole one with fewer rows."""
    folder = prepare(arguments)
    load_prepared(folder).select(range(4)).save_to_disk(folder.with_name("four"))
    shutil.copy(folder.with_name("four") / ARROW, folder / ARROW)
    with pytest.raises(PeagleError, match=rf"{ARROW} is damaged, .*: it has \d+ instead of \d+ bytes since"):
        load_prepared(folder)
    record = json.loads((folder / "prepare.json").read_text())
    del record["files"]  # earlier versions wrote no list of files
    (folder / "prepare.json").write_text(json.dumps(record))
    with pytest.raises(PeagleError, match=r"hold 4 samples, but prepare\.json counts 6"):
        load_prepared(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"counts": 3}', '{"model": []}', '{"data": 5}', "\x00"])
def test_a_damaged_record_is_named_by_all_that_read_it(arguments, content):
    folder = prepare(arguments)
    (folder / "prepare.json").write_text(content)
    for command in (lambda: prepare(arguments), lambda: load_prepared(folder)):
        with pytest.raises(PeagleError, match=r"prepare\.json is damaged.*Put it back"):
            command()
    (folder / "prepare.json").unlink()
    assert len(load_prepared(folder)) == 6


@pytest.mark.parametrize("content", [{"a": 1}, {1: "x"}, {-1: 2}, torch.zeros(2, 2), [1]])
def test_token_counts_that_are_none_are_named(tmp_path, content):
    torch.save(content, tmp_path / "token_freq.pt")
    with pytest.raises(PeagleError, match=r"token_freq\.pt is no file of token counts"):
        load_token_freq(tmp_path / "token_freq.pt")


@pytest.fixture
def folder(tiny_data, tmp_path) -> Path:
    """A prepared dataset and its cache, with a record as prepare writes it."""
    shutil.copytree(tiny_data, tmp_path / "data")
    files = {path.name: file_fingerprint(path) for path in (tmp_path / "data").iterdir() if path.is_file()}
    record = {"counts": {"rows": 20}, "files": files}
    (tmp_path / "data" / "prepare.json").write_text(json.dumps(record))
    return tmp_path / "data"


@pytest.mark.fault("a file of a prepared dataset or its cache is cut in two", "every command that reads it names it")
@pytest.mark.parametrize(
    "name", [ARROW, "dataset_info.json", "state.json", "token_freq.pt", "prepare.json", "hidden_states/manifest.json"]
)
def test_every_command_names_the_damaged_file(folder, tiny_verifier, name, tmp_path, capsys):
    config = PeagleConfig.from_verifier(str(tiny_verifier), num_layers=1, target_layer_ids=AUX)
    PeagleForSpeculation(config).save_pretrained(tmp_path / "drafter")
    pipeline = {
        "output": str(tmp_path / "run"),
        "extract": {"model": str(tiny_verifier), "preprocessed_data": str(folder)},
    }
    (tmp_path / "pipeline.yaml").write_text(json.dumps(pipeline))
    states, data = folder / "hidden_states", ["--data-path", folder]
    training = ["--verifier-name-or-path", tiny_verifier, *data, "--save-path", folder / "ck", "--use-cpu"]
    truncate(folder / name)
    for command, flags in (
        ("extract", ["--model", tiny_verifier, "--preprocessed-data", folder]),
        ("extract", ["--model", tiny_verifier, "--preprocessed-data", folder, "--dry-run"]),
        ("train", training),
        ("train", [*training, "--dry-run"]),
        ("data", ["inspect", folder, "--model", tiny_verifier]),
        ("cache", ["info", states, *data]),
        ("cache", ["verify", states, *data]),
        ("cache", ["convert", states, tmp_path / "new", "--storage", "learnt", *data]),
        ("acceptance", ["--model", tmp_path / "drafter", *data, "--output", tmp_path / "acceptance.json"]),
        ("run", [tmp_path / "pipeline.yaml"]),
    ):
        if command == "data" and "manifest" in name:
            continue  # the command doesn't look at hidden states
        with pytest.raises(SystemExit):
            cli.main([command, *map(str, flags)])
        printed = capsys.readouterr().err
        assert f"peagle-hf {command}: {folder / name}" in printed, printed
        assert "peagle-hf prepare" in printed or "peagle-hf extract" in printed


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_list_of_failures_is_named(folder, content):
    record = folder / "hidden_states" / "failed.json"
    record.write_text(content)
    (folder / "hidden_states" / "hs_3.safetensors").unlink()
    for command in (
        lambda: cli.main(["cache", "info", str(folder / "hidden_states")]),
        lambda: HiddenStatesDataset(folder),
    ):
        with pytest.raises((PeagleError, SystemExit)):
            command()


@pytest.mark.parametrize(
    ("missing", "failed", "advice"),
    [
        (range(10, 20), [], r"10 of 20 .*first 10 are there.*without --max-samples, or with at least 20"),
        (range(20), [], r"20 of 20 .*all of them: run `peagle-hf extract`, or correct --hidden-states-path"),
        ([3, 8], [3, 5], r"2 of 20 .*failed 1 of them, for the reasons in failed\.json"),
        ([3, 8], [5], r"2 of 20 .*again, of all ranks if it ran with --world-size"),
    ],
)
def test_the_advice_about_missing_files_fits_the_cause(folder, missing, failed, advice):
    cache = folder / "hidden_states"
    for row in missing:
        (cache / f"hs_{row}.safetensors").unlink()
    (cache / "failed.json").write_text(json.dumps({str(row): "the server is gone" for row in failed}))
    with pytest.raises(PeagleError, match=advice):
        HiddenStatesDataset(folder, rows=range(0, 20, 2))


def test_what_extract_left_out_is_made_by_following_the_advice(tmp_path, folder, tiny_verifier):
    arguments = extract.ExtractArguments(
        model=str(tiny_verifier), preprocessed_data=str(folder), output=str(tmp_path / "some"), max_samples=7
    )
    extract.extract(arguments)
    with pytest.raises(PeagleError, match=r"13 of 20 .* hs_7\.safetensors.*with at least 20"):
        HiddenStatesDataset(folder, tmp_path / "some")
    arguments.max_samples = 20
    assert extract.extract(arguments).num_kept == 7
    assert len(HiddenStatesDataset(folder, tmp_path / "some").data) == 20
