"""Training with the verifier in the same process (`--on-missing generate` without an endpoint) is that on a cache."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import AUX, write_prepared
from test_distributed import history, launch
from test_trainer import losses, run, weights
from transformers import AutoModelForCausalLM

from peagle_hf import PeagleError, PeagleTrainingArguments, build_datasets, build_drafter
from peagle_hf.data.cache_storage import cached_rows, row_path
from peagle_hf.data.collator import CODDataCollator
from peagle_hf.data.dataset import HiddenStatesDataset
from peagle_hf.data.errors import RowError
from peagle_hf.data.extract import ExtractArguments, extract
from peagle_hf.data.in_process_states import InProcessVerifier, batches_of_a_step
from peagle_hf.training import memory
from peagle_hf.training.memory import estimate, report
from peagle_hf.training.run import build_config, train
from peagle_hf.verifier.loading import inference_memory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """20 samples without hidden states, two of which are of the same length and so share a batch of the verifier."""
    return write_prepared(tmp_path_factory.mktemp("prepared"), [12 + index - (index == 7) for index in range(20)])


@pytest.fixture
def cached(prepared, tiny_verifier, tmp_path):
    """A copy of the samples with the states of `peagle-hf extract`, one sample at a time."""
    folder = shutil.copytree(prepared, tmp_path / "cached")
    extract(ExtractArguments(model=str(tiny_verifier), preprocessed_data=str(folder), max_batch_tokens=8))
    return folder


@pytest.fixture
def generating(train_flags, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    return {**train_flags, "data_path": str(data), "on_missing": "generate", "output_dir": str(tmp_path / "generated")}


def all_losses(trainer):
    return losses(trainer) + [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def assert_equal(trainer, other):
    assert all_losses(trainer) == all_losses(other)
    for name, weight in weights(other).items():
        assert torch.equal(weights(trainer)[name], weight), name


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2, "linear_start": False, "sequence_partitions": "2"},
    ],
)
def test_training_is_bit_equal_to_that_on_a_cache(train_flags, generating, cached, changes):
    wanted = run({**train_flags, "data_path": str(cached)}, **changes)
    assert_equal(run(generating, **changes), wanted)
    assert cached_rows(Path(generating["data_path"]) / "hidden_states") == set()


def test_building_drafter_and_data_reads_the_configuration_once(generating, caplog):
    caplog.set_level("INFO")
    args = PeagleTrainingArguments(**generating)
    build_drafter(args)
    build_datasets(args)
    assert sum(message.startswith("Mask token") for message in caplog.messages) == 1


def test_samples_that_the_verifier_reads_together_differ_in_rounding_only(train_flags, generating, cached):
    """Other samples in a batch change the order of the verifier's sums: losses to 1e-4."""
    common = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    wanted = run({**train_flags, "data_path": str(cached)}, **common)
    assert all_losses(run(generating, **common)) == pytest.approx(all_losses(wanted), rel=1e-4)


@pytest.mark.parametrize("storage", ["plain", "fp8-learnt"])
def test_what_is_missing_is_added_to_the_cache_in_its_kind(generating, tiny_verifier, tmp_path, storage):
    """The files are those of `extract`, and a second run reads them without the verifier."""
    data, whole = Path(generating["data_path"]), tmp_path / "whole"
    kinds = {"model": str(tiny_verifier), "preprocessed_data": str(data), "storage": storage, "max_batch_tokens": 8}
    extract(ExtractArguments(**kinds, max_samples=5))
    extract(ExtractArguments(**kinds, output=str(whole)))
    keeping = {**generating, "on_generate": "cache", "num_train_epochs": 1, "total_seq_len": 20}
    first = train(PeagleTrainingArguments(**keeping))
    assert cached_rows(data / "hidden_states") == set(range(20))
    for row in range(20):
        assert row_path(whole, row).read_bytes() == row_path(data / "hidden_states", row).read_bytes()
    second = train(PeagleTrainingArguments(**{**keeping, "output_dir": str(tmp_path / "second")}))
    assert second.train_dataset.verifier._model is None
    assert_equal(second, first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_each_of_two_processes_generates_its_own_states(train_flags, generating, cached, kind):
    """With AdamW, to the rounding of two processes' sums; one accumulates what the two share."""
    common = {"optim": "adamw_torch_fused", "total_seq_len": 32, "num_train_epochs": 1}
    one = run({**train_flags, "data_path": str(cached)}, **common, gradient_accumulation_steps=2)
    launch(kind, generating, **common)
    assert history(Path(generating["output_dir"]) / "0", "loss") == pytest.approx(losses(one), rel=1e-5)


def test_a_resumed_run_is_bit_equal(generating, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1}
    whole = train(PeagleTrainingArguments(**{**generating, **steps}))
    shutil.copytree(whole.args.output_dir, tmp_path / "cut", symlinks=True)
    for folder in (tmp_path / "cut").iterdir():
        if folder.is_dir() and not folder.is_symlink() and folder.name != "checkpoint-2":
            shutil.rmtree(folder)
    resumed = train(PeagleTrainingArguments(**{**generating, **steps, "output_dir": str(tmp_path / "cut")}))
    assert_equal(resumed, whole)


def test_a_row_that_the_verifier_cannot_read_is_named(generating, tiny_verifier):
    data = Path(generating["data_path"])
    verifier = InProcessVerifier(str(tiny_verifier), AUX, "cpu")
    dataset = HiddenStatesDataset(data, total_seq_len=64, on_missing="generate", verifier=verifier)
    batch = CODDataCollator(num_depths=2)([dataset[0]])
    row = batch["to_generate"][0].row
    with torch.no_grad():
        verifier.load().model.layers[-1].mlp.down_proj.bias = torch.nn.Parameter(torch.full((32,), torch.nan))
    with pytest.raises(RowError, match=rf"row {row} of .* not finite .* --skip-rows {row}"):
        list(dataset.completed([batch]))
    batch["to_generate"][0].token_ids[0] = 10_000
    with pytest.raises(RowError, match=f"Row {row} has token ids .* another tokenizer"):
        list(dataset.completed([batch]))


@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_before_one_that_cannot_be_read_are_still_given(tiny_verifier, ahead):
    """Steps on them are taken, so that they are saved with what was trained."""

    def loaded():
        for number in range(3):
            yield {"input_ids": torch.full((1, 2), number)}
        raise RowError(7, "data", reason="it can't be read", advice="leave it out")

    batches = InProcessVerifier(str(tiny_verifier), AUX, "cpu").completed(loaded(), None, ahead)
    assert [int(next(batches)["input_ids"][0, 0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RowError, match="row 7"):
        next(batches)


def test_loader_workers_get_a_verifier_without_weights(tiny_verifier):
    verifier = InProcessVerifier(str(tiny_verifier), AUX, "cpu")
    verifier.load()
    sent = pickle.loads(pickle.dumps(verifier))
    assert (sent.layer_ids, sent._model) == (tuple(AUX), None)


def test_sources_of_states_are_not_mixed(generating, tiny_verifier):
    data, verifier = generating["data_path"], InProcessVerifier(str(tiny_verifier), [1, 2, 3], "cpu")
    for given in ({"on_missing": "generate"}, {"verifier": verifier}):
        with pytest.raises(PeagleError, match="takes either an endpoint or a verifier"):
            HiddenStatesDataset(data, **given)
    with pytest.raises(PeagleError, match="on_missing is 'ignore' but must be one of raise, skip, warn, generate"):
        HiddenStatesDataset(data, on_missing="ignore")
    with pytest.raises(PeagleError, match=r"the layers \[1, 2, 3\], but the drafter reads"):
        HiddenStatesDataset(data, on_missing="generate", verifier=verifier).check_layers(AUX)


def test_the_memory_report_counts_the_verifier(generating, tiny_verifier, capsys):
    train(PeagleTrainingArguments(**generating, memory_report=True))
    printed = capsys.readouterr().out
    assert "verifier that generates states" in printed
    assert "its work, and the states ahead" in printed
    model = InProcessVerifier(str(tiny_verifier), AUX, "cpu").load()
    weights = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(tiny_verifier).model.parameters())
    assert inference_memory(str(tiny_verifier), 3)[0] == 2 * weights
    assert isinstance(model.lm_head, torch.nn.Identity)


def test_a_verifier_on_another_device_is_compared_with_the_memory_there(generating, monkeypatch):
    """This device has the states that are computed ahead, and nothing else of it."""
    args = PeagleTrainingArguments(**generating)
    here = args.memory_plan(build_config(args))
    args.verifier_device = "cuda:1"
    apart = args.memory_plan(build_config(args))
    assert replace(apart, verifier_device=None) == here
    assert 0 < estimate(apart).generated < estimate(here).generated
    assert (estimate(here).verifier, estimate(apart).verifier) == (here.verifier, 0)
    for fits in (True, False):
        monkeypatch.setattr(memory, "device_memory", {torch.device("cuda:1"): 1 << (40 if fits else 0)}.get)
        printed = report(apart, None)
        assert "verifier and its work, on cuda:1" in printed
        assert ("It doesn't fit on cuda:1: run peagle-hf extract" in printed) != fits
    assert "verifier that generates states" not in printed


def test_a_verifier_that_is_never_loaded_is_not_counted(generating, cached):
    args = PeagleTrainingArguments(**{**generating, "data_path": str(cached)})
    assert args.memory_plan(build_config(args)).verifier == 0
    row_path(cached / "hidden_states", 3).unlink()
    assert args.memory_plan(build_config(args)).verifier > 0
    args.skip_rows = [3]
    assert args.memory_plan(build_config(args)).batches_ahead == 0


def test_the_samples_of_a_step_share_passes_on_a_gpu():
    """Padding is 35 % of a sample at most."""
    lengths = dict(enumerate([600, 1450, 900, 1200]))
    assert batches_of_a_step(lengths, "cuda") == [[1, 3], [2, 0]]
    assert batches_of_a_step(lengths, "cpu") == [[1], [3], [2], [0]]
    assert batches_of_a_step(dict(enumerate([4000, 50, 40])), "cuda") == [[0], [1, 2]]
    assert batches_of_a_step(dict(enumerate([1000] * 4)), "cuda") == [[0, 1, 2, 3]]
    assert batches_of_a_step(dict(enumerate([3000] * 4)), "cuda") == [[0, 1], [2, 3]]


@pytest.mark.parametrize("report", [False, True])
def test_the_log_says_nothing_twice(generating, report, caplog):
    with caplog.at_level("INFO", "peagle_hf"):
        train(PeagleTrainingArguments(**{**generating, "num_train_epochs": 1, "memory_report": report}))
    assert len([message for message in caplog.messages if message.startswith("Mask token")]) == 1
    assert len(set(caplog.messages)) == len(caplog.messages)
