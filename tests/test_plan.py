"""`peagle-hf plan`: the model of speed, and the whole command in real vLLM with a verifier that has no weights."""

import json
import math
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import VOCAB
from transformers import LlamaConfig

from peagle_hf import EvaluateArguments, PeagleError
from peagle_hf.cli import main
from peagle_hf.evaluation.arguments import asks_for_random_weights
from peagle_hf.evaluation.plan import FINISHED_RUNS, PlanArguments, plan
from peagle_hf.evaluation.plan_report import _draw_break_even, text
from peagle_hf.evaluation.speed_model import (
    SpeedModel,
    fastest,
    geometric_length,
    geometric_rate,
    median_break_even,
    median_speed_up,
)
from peagle_hf.evaluation.vllm_process import check_flags


def test_the_model_gives_back_the_times_that_it_was_made_from():
    model = SpeedModel.fit(0.010, [(length, 0.001 + 0.0135 / length) for length in (1.0, 3.0, 5.0)])
    assert (model.outside, model.rounds, model.error) == pytest.approx((0.001, 0.0135, 0), abs=1e-12)
    assert model.break_even_length == pytest.approx(1.5)
    assert model.speed_up(1.5) == pytest.approx(1)
    assert model.speed_up(3.0) == pytest.approx(0.010 / 0.0055)


def test_no_time_is_negative_and_a_deviation_is_told():
    """Faster than in proportion to the length: then all of the time is in rounds."""
    model = SpeedModel.fit(1.0, [(1.0, 2.0), (2.0, 0.9)])
    assert model.outside == 0
    assert model.error > 0.04
    assert SpeedModel(1.0, 1.2, 0.1, 0.0).break_even_length is None


def test_the_fastest_k_is_the_one_whose_further_tokens_are_worth_their_time():
    assert geometric_length(geometric_rate(2.0, 7), 7) == pytest.approx(2.0)
    cheap = {2: [SpeedModel(1.0, 0.0, 1.2, 0.0)], 7: [SpeedModel(1.0, 0.0, 1.3, 0.0)]}
    dear = cheap | {7: [SpeedModel(1.0, 0.0, 2.5, 0.0)]}
    assert fastest(cheap, 3.0)[0] == 7
    number, length, speed_up = fastest(dear, 3.0)
    assert (number, speed_up) == (2, pytest.approx(length / 1.2))
    assert 2 < length < 3
    assert fastest({2: [SpeedModel(1.0, 0.0, 3.5, 0.0)]}, 3.0) == (None, 1.0, 1.0)


def test_each_figure_is_the_median_of_the_rounds():
    """Not that of a model with the median of each time, whose break-even is outside of all three here."""
    rounds = [SpeedModel(1.0, 0.5, 1.0, 0.0), SpeedModel(2.0, 0.1, 3.0, 0.0), SpeedModel(0.6, 0.3, 0.9, 0.0)]
    assert median_break_even(rounds) == pytest.approx(2.0)
    assert median_speed_up(rounds, 3.0) == pytest.approx(1.2)
    never, always = SpeedModel(1.0, 1.2, 0.1, 0.0), SpeedModel(1.0, 0.0, 0.9, 0.0)
    assert median_break_even([never, *rounds[:1], always]) == pytest.approx(2.0)
    assert median_break_even([never, always]) is None
    assert always.break_even_length == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"concurrency": [4, 1]}, "--concurrency is 4 1 but needs .* ascending"),
        ({"num_speculative_tokens": []}, "--num-speculative-tokens is empty"),
        ({"num_layers": [0]}, "--num-layers is 0 but needs positive"),
        ({"max_tokens": 4}, "--max-tokens is 4 but must be at least 8"),
    ],
)
def test_impossible_values_are_refused_by_their_flag(change, words):
    with pytest.raises(PeagleError, match=words):
        PlanArguments("m", **change)


def test_lengths_that_the_verifier_has_no_positions_for_are_refused(tiny_verifier, tmp_path):
    with pytest.raises(PeagleError, match="at most 512 positions, but prompt, answer and one draft need 611"):
        plan(PlanArguments(str(tiny_verifier), str(tmp_path), prompt_tokens=475))


def test_only_a_verifier_without_a_tokenizer_is_run_without_one(tiny_verifier, tmp_path, monkeypatch):
    """vLLM builds the processor of a model that reads images from the tokenizer."""
    pytest.importorskip("vllm")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_verifier / "config.json").read_bytes())
    engines, advice = [], []

    def stop(engine, environment, log, what, flags, if_memory_ran_out):
        engines.append(engine)
        advice.append(if_memory_ran_out)
        raise PeagleError("stopped")

    monkeypatch.setattr("peagle_hf.evaluation.plan.VllmProcess", stop)
    for model in (tiny_verifier, bare):
        with pytest.raises(PeagleError, match="stopped"):
            plan(PlanArguments(str(model), str(tmp_path / "out"), concurrency=[1], num_layers=[1]))
    assert [engine.get("skip_tokenizer_init") for engine in engines] == [None, True]
    assert not any("--max-model-len" in one for one in advice)  # it is refused below what is needed
    assert [engine.get("load_format") for engine in engines] == [None, "dummy"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"speculative_config": {}}, "--speculative-config stands after --"),
        ({"spec_tokens": 4}, "--spec-tokens stands after --"),
        ({"seed": 0}, "--seed stands after --"),
        ({"enable_prefix_caching": True}, "--enable-prefix-caching stands after --"),
        ({"max_num_seqs": 1}, "--max-num-seqs after -- is 1 but must be at least 4"),
        ({"max_model_len": -1}, "--max-model-len after -- is -1 but must be at least 64"),
        ({"load_format": "dummy"}, "not as --load-format dummy"),
    ],
)
def test_vllms_flags_leave_what_is_measured_as_it_is(given, words):
    engine = {"model": "m", "max_num_seqs": 4, "max_model_len": 64}
    check_flags(engine, {"enable_prefix_caching": False, "max_num_seqs": 8, "max_model_len": 64, "dtype": "float32"})
    with pytest.raises(PeagleError, match=words):
        check_flags(engine, given)


@pytest.mark.skipif(find_spec("vllm") is None or torch.cuda.is_available(), reason="vLLM for a CPU isn't installed")
def test_each_process_of_vllm_on_a_cpu_accepts_synthetically():
    """A worker of `--tensor-parallel-size` is told the rates, and nothing else of `plan` runs in it."""
    code = (
        "import torch; from types import SimpleNamespace as N; from vllm.v1.sample import rejection_sampler\n"
        "from peagle_hf.evaluation import synthetic_acceptance as ours\n"
        "rates = torch.zeros(3); worker = N(model_runner=N(rejection_sampler=N(synthetic_conditional_rates=rates)))\n"
        "assert ours._set_rates(worker, 2.5) and rates.tolist() == [1, 0.5, 0]\n"
        "assert rejection_sampler.rejection_sample is ours._rejection_sample"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_the_load_format_asks_for_random_weights_and_no_file_holds_flags():
    for words, is_dummy in {
        "--load-format dummy": True,
        "--seed=1 --load_format=dummy": True,
        "--served-model-name dummy": False,
        "--load-format auto": False,
    }.items():
        assert asks_for_random_weights(words.split()) is is_dummy
    for command in (PlanArguments, partial(EvaluateArguments, suite=["prompts.jsonl"], output="out")):
        with pytest.raises(PeagleError, match="--config stands after --"):
            command("m", vllm_args=["--config=flags.yaml"])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.fault(
    "A plan ends before its report is written", "The same command reads the finished runs and starts no vLLM."
)
def test_a_plan_needs_only_the_verifiers_configuration(tmp_path, monkeypatch, capsys):
    """Its journal makes the second run a matter of seconds; drafts are accepted as often as they shall be."""
    folder = tmp_path / "verifier"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    output = tmp_path / "plan"
    numbers = "--num-layers 1 --num-speculative-tokens 3 --concurrency 1 4 --num-prompts 8 --draft-vocab-size 64"
    command = ["plan", str(folder), "--output", str(output), *numbers.split(), "--prompt-tokens", "16"]
    command += ["--max-tokens", "32", "--", "--max-num-batched-tokens", "512"]
    with monkeypatch.context() as patched:
        patched.setattr("peagle_hf.evaluation.plan.text", lambda report: 1 / 0)
        with pytest.raises(SystemExit):
            main(command)
    assert (output / FINISHED_RUNS).exists()
    monkeypatch.setattr("peagle_hf.evaluation.plan.VllmProcess", None)
    main(command)
    assert not (output / FINISHED_RUNS).exists()
    report = json.loads((output / "plan.json").read_text())
    assert "'max_num_batched_tokens': 512" in (output / "vllm_without_a_drafter.log").read_text()
    assert (report["weights"], report["drafters"][0]["draft_vocab_size"]) == ("random", 64)
    assert (output / "plan.png").stat().st_size > 1000
    assert "Pays from" in capsys.readouterr().out
    for run in report["drafters"][0]["by_concurrency"]:
        lengths = [one["acceptance_length"] for one in run["measured"]]
        assert (lengths[0], lengths[2]) == (1, 4)
        assert lengths[1] == pytest.approx(2.5, abs=0.3)
        assert run["break_even_length"] is None or run["break_even_length"] > 0
        assert run["speed_up"]["4"] > run["speed_up"]["1.5"] > 0


def report_of(**changes: object) -> dict:
    """A report of one drafter at one load."""
    run = {
        "concurrency": 1,
        "tokens_per_second_without": 190.0,
        "measured": [],
        "break_even_length": 1.4,
        "break_even_range": None,
        "speed_up": {"1.5": 1.07, "2": 1.4, "3": 2.1, "4": None},
        "model_error": 0.01,
    }
    size = {"num_layers": 1, "draft_vocab_size": 32000}
    item = {"length_with_largest_k": 2, "num_speculative_tokens": None, "acceptance_length": 1, "speed_up": 1}
    return {
        "verifier": "v",
        "weights": "random",
        "drafters": [size | {"num_speculative_tokens": 2, "by_concurrency": [run | changes]}],
        "serve": [size | {"concurrency": 1, "by_length": [item]}],
        **dict.fromkeys(("prompt_tokens", "max_tokens", "rounds", "seed"), 8),
        **dict.fromkeys(("command", "dtype", "device"), ""),
        "num_prompts": {"1": 16},
        "versions": {},
    }


def test_the_text_says_what_pays_and_what_is_rough():
    assert "from acceptance length 1.40 on, with 1 chat at a time" in text(report_of())
    assert "1 layer, 32,000 tokens" in text(report_of())
    assert "16 prompts with 1 chat at a time" in text(report_of())
    assert "no drafter" in text(report_of())
    never = text(report_of(break_even_length=3.5))
    assert "never: 3.50 of at most 3" in never
    assert "No drafter of these pays" in never
    assert "never  " in text(report_of(break_even_length=None))
    always = text(report_of(break_even_length=1.0))
    assert "1.00 (always)" in always
    assert 'the table says "always"' in always
    assert "pays first" not in always
    assert "1.40 (1.30 to 1.50)" in text(report_of(break_even_range=[1.3, 1.5]))
    assert "deviate from the model of speed by up to 12%" in text(report_of(model_error=0.12))


def test_the_picture_has_no_length_that_the_table_says_is_never_reached():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    _draw_break_even(report_of(break_even_length=8.3), axes)
    assert "never: 8.30 of at most 3" in text(report_of(break_even_length=8.3))
    assert math.isnan(axes.lines[0].get_ydata()[0])


def test_each_k_has_a_line_of_its_own_in_the_picture():
    report, axes = report_of(), pytest.importorskip("matplotlib.figure").Figure().subplots()
    report["drafters"] = [report["drafters"][0] | {"num_speculative_tokens": tokens} for tokens in range(1, 9)]
    _draw_break_even(report, axes)
    assert len({(line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 8
