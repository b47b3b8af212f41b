"""`--from-pretrained`: what a continued drafter keeps, what may change, and what is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_cache, write_prepared
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peagle_hf import (
    ExtractArguments,
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainingArguments,
    build_drafter,
    extract,
    train,
)

SPECULATORS = Path(__file__).parent / "fixtures" / "speculators_0.9.0_peagle"


@pytest.fixture
def first(train_flags) -> Path:
    """A drafter that was trained for a few steps."""
    train(PeagleTrainingArguments(**train_flags, max_steps=2))
    return Path(train_flags["output_dir"]) / "checkpoint_best"


@pytest.fixture
def again(train_flags, first, tmp_path):
    """Arguments that continue from it."""

    def arguments(**changes):
        names = ("num_layers", "draft_vocab_size")
        kept = {name: value for name, value in train_flags.items() if name not in names}
        kept |= {"from_pretrained": str(first), "output_dir": str(tmp_path / "again"), "max_steps": 1}
        return PeagleTrainingArguments(**{**kept, **changes})

    return arguments


def test_sampling_that_is_not_given_stays_the_drafters(train_flags, tmp_path):
    train(PeagleTrainingArguments(**train_flags, max_steps=2, down_sample_ratio=0.6, max_anchors=7))
    again = {name: value for name, value in train_flags.items() if name not in ("num_layers", "draft_vocab_size")}
    del again["num_depths"]
    best = f"{again.pop('output_dir')}/checkpoint_best"
    args = PeagleTrainingArguments(**again, from_pretrained=best, output_dir=str(tmp_path / "again"))
    config = build_drafter(args).config
    assert (config.num_depths, config.down_sample_ratio, config.max_anchors) == (3, 0.6, 7)


@pytest.mark.parametrize("changes", [{}, {"resume": False}])
def test_a_drafter_in_the_output_folder_is_not_continued_there(again, first, changes):
    before = (first / "model.safetensors").read_bytes()
    with pytest.raises(PeagleError, match=r"would take its place.*--save-path"):
        train(again(output_dir=str(first.parent), **changes))
    assert (first / "model.safetensors").read_bytes() == before


def save_llama(folder: Path, **changes: int) -> Path:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**sizes, "intermediate_size": 64, **changes})).save_pretrained(folder)
    return folder


def test_other_depths_and_data_reuse_all_weights(again, first, tiny_verifier, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="peagle_hf")
    data = write_cache(write_prepared(tmp_path / "other-data", [15, 25, 35], seed=7), tiny_verifier)
    args = again(num_depths=5, max_anchors=9, data_path=str(data))
    saved = PeagleForSpeculation.from_pretrained(first, dtype=torch.float32).state_dict()
    drafter = build_drafter(args)
    assert {name: torch.equal(tensor, saved[name]) for name, tensor in drafter.state_dict().items()} == dict.fromkeys(
        saved, True
    )
    assert caplog.messages == [
        f"Reused: all {len(saved)} tensors of {first.resolve()}; sampling changed: num_depths 3 -> 5, "
        "max_anchors None -> 9; "
        "new: optimizer, schedule and step count."
    ]
    trainer = train(args)
    assert trainer.state.log_history[0]["accuracy_4"] >= 0
    config = json.loads((tmp_path / "again" / "checkpoint_best" / "config.json").read_text())
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5


def test_another_verifier_of_the_same_sizes_is_the_one_that_is_drafted_for(again, first, train_flags, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="peagle_hf")
    other = save_llama(tmp_path / "other-verifier")
    data = write_cache(write_prepared(tmp_path / "other-data", [15, 25, 35], seed=7), other)
    trainer = train(again(verifier_name_or_path=str(other), data_path=str(data)))
    assert f"; verifier changed: {train_flags['verifier_name_or_path']} -> {other}; " in caplog.text
    saved = PeagleConfig.from_pretrained(tmp_path / "again" / "checkpoint_best")
    assert saved.speculators_config["verifier"] == {
        "name_or_path": str(other),
        "architectures": ["LlamaForCausalLM"],
    }
    head = load_file(other / "model.safetensors")["lm_head.weight"]
    assert torch.equal(trainer.distillation.verifier_head.weight, head)
    assert not torch.equal(trainer.distillation.draft_head.weight, trainer.model.lm_head.weight)
    kept = PeagleForSpeculation.from_pretrained(first, dtype=torch.float32).lm_head.weight
    assert torch.equal(trainer.model.lm_head.weight, kept)


def test_a_checkpoint_of_speculators_is_continued(train_flags, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="peagle_hf")
    verifier = save_llama(tmp_path / "verifier", vocab_size=512, hidden_size=64, num_hidden_layers=6)
    data = write_prepared(tmp_path / "data", [15, 25, 35])
    extract(ExtractArguments(model=str(verifier), preprocessed_data=str(data), target_layer_ids=[2, 4, 5]))
    flags = {name: value for name, value in train_flags.items() if name not in ("num_layers", "draft_vocab_size")}
    flags |= {"verifier_name_or_path": str(verifier), "data_path": str(data), "num_train_epochs": 1}
    trainer = train(PeagleTrainingArguments(**flags, from_pretrained=str(SPECULATORS)))
    number = len(load_file(SPECULATORS / "model.safetensors"))
    wanted = f"Reused: all {number} tensors of {SPECULATORS}; sampling changed: num_depths 8 -> 3; verifier changed: "
    assert wanted in caplog.text
    assert trainer.state.log_history[0]["loss"] > 0
    written = load_file(Path(flags["output_dir"]) / "checkpoint_best" / "model.safetensors")
    assert written.keys() == load_file(SPECULATORS / "model.safetensors").keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"draft_vocab_size": 40},
        {"token_freq_path": "counts.pt"},
        {"target_layer_ids": [1, 2, 3]},
        {"num_layers": 3},
        {"draft_arch": "llama"},
        {"mask_token_id": 5},
        {"sliding_window": 8},
        {"norm_before_residual": False},
        {"norm_before_fc": True},
        {"fc_norm": True},
    ],
    ids=str,
)
def test_another_drafter_can_not_be_continued(again, changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(PeagleError) as refused:
        build_drafter(again(**changes))
    assert f"{name} {value} (the drafter has " in str(refused.value)


def test_arguments_that_say_what_the_drafter_has_are_no_error(again):
    args = again(draft_vocab_size=64, num_layers=2, draft_arch="qwen3", target_layer_ids=[2, 3, 4])
    assert build_drafter(args).config.draft_vocab_size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "hidden_size 16 instead of 32"),
        ({"vocab_size": 97}, "vocab_size 97 instead of 96"),
        ({"num_hidden_layers": 3}, "3 layers where the drafter reads the states after layer 4"),
    ],
)
def test_a_verifier_of_other_sizes_is_refused(again, tmp_path, changes, message):
    other = save_llama(tmp_path / "other", **changes)
    with pytest.raises(PeagleError, match=f"{other}, which has {message}"):
        build_drafter(again(verifier_name_or_path=str(other)))


def test_a_drafter_that_lacks_tensors_is_refused(again, first, tmp_path):
    broken = shutil.copytree(first, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    norm = tensors.pop("norm.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeagleError, match=r"1 tensors are missing or too many, such as norm\.weight"):
        build_drafter(again(from_pretrained=str(broken)))
    save_file(tensors | {"norm.weight": norm[:5].clone()}, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeagleError, match=f"{broken} can't be read"):
        build_drafter(again(from_pretrained=str(broken)))
    (broken / "model.safetensors").unlink()
    with pytest.raises(PeagleError, match=f"{broken} can't be read"):
        build_drafter(again(from_pretrained=str(broken)))
    with pytest.raises(PeagleError, match="nowhere can't be read"):
        build_drafter(again(from_pretrained=str(tmp_path / "nowhere")))
