"""The versions of transformers and vLLM that we support: what was renamed between them, and what we use of them."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import check_vllm_source
import pytest
from test_trainer_arguments import trainer_of

from peagle_hf import PeagleTrainingArguments


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_either_name_of_checkpointing_works_without_a_warning(tmp_path, name):
    options = {"use_reentrant": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value, given, read in [(True, json.dumps(options), options), (False, None, None), (True, options, options)]:
            args = PeagleTrainingArguments(
                output_dir=str(tmp_path), use_cpu=True, **{name: value, f"{name}_kwargs": given}
            )
            assert args.activation_checkpointing is args.gradient_checkpointing is value
            assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == read
        args = PeagleTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert args.activation_checkpointing is args.gradient_checkpointing is False


def test_only_the_process_that_saves_writes(train_flags, tmp_path, monkeypatch):
    """From transformers 5.23 on the Trainer calls `_save` on every process."""
    trainer = trainer_of(train_flags)
    monkeypatch.setattr(PeagleTrainingArguments, "should_save", property(lambda self: False))
    trainer.save_model(str(tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM isn't installed")
def test_vllm_has_every_name_that_is_used_of_it():
    installed = Path(find_spec("vllm").origin).parent
    source = check_vllm_source.Source(installed)
    count, absent = check_vllm_source.missing(source)
    assert absent == []
    assert count > 150
    assert ("vllm.sampling_params", "RequestOutputKind") in check_vllm_source.imported_names()


def test_what_a_vllm_renamed_or_moved_is_reported(tmp_path):
    (tmp_path / "renderers.py").write_text("class BaseRenderer:\n    def render_cmpl(self, texts): ...\n")
    (tmp_path / "requests.py").write_text(
        "class OpenAIBaseModel:\n    model: str\n"
        'class CompletionRequest(OpenAIBaseModel):\n    prompt: str = "peagle"\n    seed: int\n'
    )
    _, absent = check_vllm_source.missing(check_vllm_source.Source(tmp_path))
    assert "BaseRenderer(prompts)" not in absent
    assert "BaseRenderer.render_cmpl(prompts)" in absent
    assert "module vllm.entrypoints.cli.main" in absent
    assert "import of LLM from vllm" in absent
    assert "CompletionRequest.top_k" in absent
    assert "the string mask_hidden" in absent
    assert not {"CompletionRequest.model", "CompletionRequest.seed", "the string peagle"} & set(absent)
