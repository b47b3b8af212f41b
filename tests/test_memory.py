"""The prediction of a step's memory: what it counts exactly, what it advises, and how a run uses it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.tutorial_inputs import VERIFIER
from code_blocks import blocks, embedded
from peft import LoraConfig
from test_modeling import make_batch, make_config, make_drafter
from test_trainer import losses, run, weights
from transformers.training_args import OptimizerNames

from peagle_hf import (
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainer,
    PeagleTrainingArguments,
    add_adapter,
)
from peagle_hf.cli import main
from peagle_hf.cli.parsing import flags, parse_arguments
from peagle_hf.training.memory import (
    GIB,
    STATE_BYTES,
    MemoryPlan,
    advice,
    bytes_per_slot,
    cut_to_fit,
    estimate,
    report,
    slots_that_fit,
)
from peagle_hf.training.muon import step_bytes
from peagle_hf.training.newton_schulz import orthogonalize_elements
from peagle_hf.training.optimizer import MUON
from peagle_hf.training.run import build_config

ROOT = Path(__file__).parents[1]

QWEN3_8B = {"model_type": "qwen3", **VERIFIER}
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""The sizes in the configurations of Qwen/Qwen3-8B and meta-llama/Llama-3.3-70B-Instruct."""


def qwen3_8b(**fields):
    layer = QWEN3_8B | {"model_type": "llama", "num_hidden_layers": 4}
    return make_config(layer=layer, draft_vocab_size=151936, num_depths=8, **fields)


@pytest.mark.parametrize(
    ("page", "verifier", "num_layers", "plan", "sentence"),
    [
        ("one-card", QWEN3_8B, 4, {"optimizer": "adamw_bnb_8bit"}, "For the command above the report predicts {} GiB."),
        ("one-card", QWEN3_8B, 4, {}, "With Muon, the default optimizer, it predicts {} GiB,"),
        ("your-model", LLAMA_70B, 4, {"processes": 8}, "`--memory-report` predicts {} GiB a GPU at 8,192"),
        ("your-model", LLAMA_70B, 1, {"processes": 8}, "positions, with one layer {} GiB."),
    ],
)
def test_guides_quote_the_memory_that_is_predicted(page, verifier, num_layers, plan, sentence, tmp_path):
    """For the flags of the guide's command, from the verifier's sizes; not every machine has its 8-bit optimizer."""
    (tmp_path / "config.json").write_text(json.dumps(verifier))
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text()
    command = next(words for block in blocks(text) for words in embedded(block.code) if "--draft-vocab-size" in words)
    sizes = {"verifier_name_or_path": tmp_path, "mask_token_id": 0, "optim": "muon", "use_cpu": True}
    args = parse_arguments(PeagleTrainingArguments, [*command[1:], *flags({**sizes, "num_layers": num_layers})])
    predicted = estimate(replace(args.memory_plan(build_config(args)), **plan)).total
    assert sentence.format(f"{predicted / GIB:.1f}") in " ".join(text.split())


@pytest.mark.parametrize("embed_requires_grad", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_weights_are_counted_as_the_model_has_them(embed_requires_grad, train_head):
    config = make_config(embed_requires_grad=embed_requires_grad)
    drafter = make_drafter(config)
    drafter.set_trained(train_head, torch.float32)
    predicted = estimate(MemoryPlan(config, 100, train_head=train_head))
    trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    # Norms and mask_hidden are left out.
    assert predicted.weights == predicted.gradients == pytest.approx(4 * trained, rel=0.02)
    assert predicted.optimizer == 2 * predicted.weights
    frozen = sum(p.numel() for p in drafter.parameters() if not p.requires_grad)
    assert predicted.frozen == 2 * (frozen + drafter.lm_head.weight.numel() * train_head)


def test_rows_are_what_the_collator_gives():
    config = make_config(num_depths=4)
    batch = make_batch(config, (150,))
    plan = MemoryPlan(config, 148, learnt_share=((batch["labels"] != -100) & (batch["depths"] == 0)).sum().item() / 148)
    assert plan.slots == pytest.approx(batch["anchors"].numel(), rel=0.05)


@pytest.mark.parametrize("normed", [{"norm_before_fc": True}, {"layer": {"fc_norm": True}}], ids=str)
def test_states_that_are_normed_first_are_counted_twice(normed):
    plain, other = (estimate(MemoryPlan(make_config(**fields), 100)) for fields in ({}, normed))
    assert other.inputs - plain.inputs == 100 * 3 * 32 * 2


def test_what_costs_less_is_predicted_to_cost_less():
    plan = MemoryPlan(qwen3_8b(), 32768)
    kept = replace(plan, checkpointing="keep_attention")
    totals = [
        estimate(each).total
        for each in (
            plan,
            kept,
            replace(kept, optimizer="adamw_bnb_8bit"),
            replace(kept, optimizer="sgd", positions=64),
        )
    ]
    assert totals == sorted(totals, reverse=True)
    assert estimate(replace(plan, partitions=4)).total < estimate(plan).total
    assert replace(plan, partitions=4).slots_at_once < plan.slots
    assert bytes_per_slot(replace(plan, checkpointing="whole")) < bytes_per_slot(plan)


def test_muons_step_is_counted():
    """Its momenta are one number a weight, its stacks a share of the weights that more layers don't enlarge."""
    plan = MemoryPlan(qwen3_8b(), 64, optimizer="muon")
    predicted = estimate(plan)
    assert predicted.total == predicted.held + predicted.gradients + predicted.step
    assert 0.5 * GIB < predicted.step < 4 * GIB
    shared = estimate(replace(plan, processes=4))
    assert predicted.step < shared.step < predicted.step + predicted.weights
    assert estimate(replace(plan, optimizer="adamw_torch")).step == 0
    assert "stacks of Muon's step" in report(plan, None)


def test_fsdp_divides_what_a_process_keeps():
    """Whole in bf16 are the embeddings, the head, and two layers with a gradient of one."""
    plan = MemoryPlan(qwen3_8b(), 4096, optimizer="muon", processes=8, linear_start=True)
    copies, shards = estimate(plan), estimate(replace(plan, sharding="FSDP"))
    assert (copies.gathered, shards.weights, shards.gradients) == (0, copies.weights // 8, copies.gradients // 8)
    assert shards.optimizer == copies.optimizer // 8
    assert shards.frozen == copies.frozen * 2 // 8
    layer = 2 * (8192 * 6144 + 4096 * 4096 + 3 * 4096 * 12288)
    assert shards.gathered == 2 * 2 * 151936 * 4096 + 3 * layer
    assert shards.step < copies.step
    assert (shards.activations, shards.loss) == (copies.activations, copies.loss)
    assert shards.total < 0.6 * copies.total
    whole = copies.weights + copies.frozen * 2
    assert shards.linear_start == copies.linear_start + whole - whole // 8
    alone = replace(plan, processes=1)
    assert estimate(replace(alone, sharding="FSDP")) == estimate(alone)
    assert slots_that_fit(replace(plan, sharding="FSDP"), 40 * GIB) > slots_that_fit(plan, 40 * GIB)
    printed = report(replace(plan, sharding="FSDP"), None)
    assert "weights, float32, 1/8 of them" in printed
    assert "tables and layers that are gathered" in printed


def test_the_step_on_shards_holds_a_share_of_all_rows_and_whole_matrices_of_its_own():
    shapes = [(4096, 4096)] * 8
    own = orthogonalize_elements(4, 4096, 4096)
    assert step_bytes(shapes, 2, has_shards=True) == 2 * (own + (4 + 2 * 4) * 4096**2)


@pytest.mark.parametrize(
    ("variable", "sharding"), [(None, "none"), ("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "ZeRO")]
)
def test_the_launcher_says_how_weights_are_divided(train_flags, monkeypatch, variable, sharding):
    args = PeagleTrainingArguments(**train_flags)
    if variable:
        monkeypatch.setenv(variable, "true")
    plan = replace(args.memory_plan(make_config()), processes=2)
    assert plan.sharding == sharding
    assert ("What ZeRO divides" in report(plan, None)) == (sharding == "ZeRO")


def test_the_advice_ends_with_what_fits():
    lines = report(MemoryPlan(qwen3_8b(), 8192), 20 * GIB).splitlines()
    advised = lines[lines.index("To need less, turn these on, one after another:") + 1 :]
    totals = [float(line.split()[-2]) for line in advised]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] <= 20
    assert all(total > 20 for total in totals[:-1])
    assert report(MemoryPlan(qwen3_8b(), 8192), 80 * GIB).endswith("It fits.")


@pytest.mark.parametrize("budget", [1, 17, 20])
def test_the_advised_flags_alone_give_the_advised_peaks(budget):
    """With Muon, whose own step is the peak, parts of a batch lower nothing before the optimizer is another."""
    plan = MemoryPlan(qwen3_8b(), 4096, optimizer=MUON, checkpointing="keep_attention")
    fields = {
        "--sequence-partitions 4": {"partitions": 4},
        "--optim adamw_bnb_8bit": {"optimizer": "adamw_bnb_8bit"},
        "--total-seq-len 2048": {"positions": 2048},
        "--no-embed-requires-grad": {"config": qwen3_8b(embed_requires_grad=False)},
    }
    _, *advised = advice(plan, budget * GIB).splitlines()
    assert advised[0].split()[:2] == ["--optim", "adamw_bnb_8bit"]
    for line in advised:
        if line.startswith("  "):
            flag, peak, _ = line.rsplit(maxsplit=2)
            plan = replace(plan, **fields.pop(flag.strip()))
            assert float(peak) == round(estimate(plan).total / GIB, 2)
    assert (estimate(plan).total <= budget * GIB) == line.startswith("  ")
    others = [estimate(replace(plan, **change)).total for change in fields.values()]
    assert line.startswith("  ") or min(others, default=math.inf) >= estimate(plan).total


def test_a_budget_below_the_weights_is_refused():
    with pytest.raises(PeagleError, match=r"(?s)Whatever the batch is.*--optim adamw_bnb_8bit"):
        slots_that_fit(MemoryPlan(qwen3_8b(), 8192), 10 * GIB)
    assert slots_that_fit(MemoryPlan(qwen3_8b(), 8192), 40 * GIB) > 8192


def test_a_larger_batch_is_advised_to_shrink_before_its_rows():
    plan = MemoryPlan(qwen3_8b(), 8192, batch_size=4)
    assert plan.slots == MemoryPlan(qwen3_8b(), 32768).slots
    lines = report(plan, 1 * GIB).splitlines()
    start = lines.index("To need less, turn these on, one after another:") + 1
    flags = [line.split()[0] for line in lines[start:]]
    assert flags.index("--per-device-train-batch-size") < flags.index("--total-seq-len")
    assert any(line.split()[:2] == ["--total-seq-len", "4096"] for line in lines)


def test_parts_that_are_found_automatically_are_those_of_the_report():
    plan = MemoryPlan(qwen3_8b(), 32768, accumulates=True)
    budget = estimate(replace(plan, partitions=3)).total
    assert estimate(plan).total > budget
    assert cut_to_fit(plan, budget).partitions == 3
    assert cut_to_fit(plan, estimate(plan).total).partitions == 1


def test_an_adapter_needs_less_than_the_weights():
    config = make_config(num_depths=4)
    drafter = PeagleForSpeculation(config)
    plan = MemoryPlan(config, 100, lora_r=4)
    adapter = add_adapter(drafter, LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)
    assert estimate(plan).weights == 4 * trained
    assert estimate(plan).frozen > estimate(replace(plan, lora_r=None)).frozen


def test_memory_report_prints_and_trains_nothing(train_flags, tmp_path, capsys):
    half = {"eval_strategy": "steps", "eval_steps": 0.5}  # a share of all steps
    main(["train", *flags({**train_flags, **half, "memory_report": True, "memory_budget": 1})])
    printed = capsys.readouterr().out
    assert "predicted peak" in printed
    assert "1.00 GiB" in printed
    assert not (tmp_path / "checkpoints").exists()
    step, validation, save, minutes = (
        float(found) for found in re.findall(r" ([\d.]+) (?:ms|s|minutes)$", printed, re.M)
    )
    assert "10 steps, 2 validations and 2 saves" in printed
    assert "a step here, mean of 19 " in printed  # 25 without the first 5 and the slowest
    assert minutes == pytest.approx((10 * step / 1e3 + 2 * validation + 2 * save) / 60, abs=0.1)
    assert step > 0

    main(["train", *flags({**train_flags, "memory_report": True, "hidden_states_path": tmp_path})])
    assert "How long training takes isn't measured: " in capsys.readouterr().out


def test_a_memory_report_without_data_builds_no_drafter(train_flags, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(PeagleForSpeculation, "__init__", lambda *_: pytest.fail("a drafter was built"))
    without = {**train_flags, "data_path": tmp_path / "none", "draft_vocab_size": 16, "memory_report": True}
    with caplog.at_level("INFO", "peagle_hf"):
        main(["train", *flags(without)])
    printed = capsys.readouterr().out
    assert "predicted peak" in printed
    assert f"isn't measured: {tmp_path / 'none'} is not a prepared dataset. Make it with peagle-hf prepare" in printed
    assert caplog.text.count("Mask token") == 1


def test_out_of_memory_ends_with_advice(train_flags, monkeypatch, tmp_path):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(PeagleTrainer, "compute_loss", fail)
    with pytest.raises(PeagleError, match=r"(?s)Tried to allocate 2.00 GiB.*predicted peak") as caught:
        run(train_flags)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_bad_numbers_of_partitions_are_refused(train_flags, value):
    with pytest.raises(PeagleError, match="--sequence-partitions"):
        PeagleTrainingArguments(**train_flags, sequence_partitions=value)


def test_partitioned_training_is_the_same_training(train_flags):
    train_flags["optim"] = "adamw_torch_fused"
    whole, folder = run(train_flags, max_steps=4), train_flags["output_dir"]
    for changes in (
        {"sequence_partitions": "3"},
        {"sequence_partitions": "auto", "memory_budget": estimate_for_parts(train_flags)},
    ):
        parts = run(train_flags, max_steps=4, output_dir=f"{folder}_{changes['sequence_partitions']}", **changes)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
        for name, weight in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-3, atol=1e-5)


def estimate_for_parts(train_flags):
    """A budget in GiB that lets about two thirds of a row run at once."""
    args = PeagleTrainingArguments(**train_flags)
    plan = replace(args.memory_plan(build_config(args)), accumulates=True)
    predicted = estimate(plan)
    return (predicted.total - predicted.activations + plan.slots * bytes_per_slot(plan) * 2 / 3) / GIB


def test_auto_partitions_on_a_cpu_want_a_budget(train_flags):
    with pytest.raises(PeagleError, match="--memory-budget"):
        run(train_flags, max_steps=1, sequence_partitions="auto")


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_states_of_optimizers_are_counted_as_they_are(train_flags, optimizer):
    for options in (None, "momentum=0.9") if optimizer in ("sgd", "rmsprop") else (None,):
        args = PeagleTrainingArguments(**train_flags, optim=optimizer, optim_args=options)
        weight = torch.nn.Parameter(torch.ones(256, 256))
        weight.grad = torch.ones(256, 256)
        kind, kwargs = PeagleTrainer.get_optimizer_cls_and_kwargs(args)
        stepped = kind([weight], **kwargs)
        stepped.step()
        tensors = [value for value in stepped.state[weight].values() if torch.is_tensor(value)]
        predicted = estimate(args.memory_plan(build_config(args)))
        counted = predicted.optimizer / predicted.weights * 4
        assert sum(tensor.nbytes for tensor in tensors) / weight.numel() == pytest.approx(counted, abs=0.1)


def test_every_optimizer_is_counted_or_said_to_be_unknown():
    plan, unknown = MemoryPlan(qwen3_8b(), 1024), []
    for name in OptimizerNames:
        with_it = replace(plan, optimizer=name.value)
        if estimate(with_it).optimizer is None:
            unknown.append(name.value)
            assert f"The states of {name.value} aren't known" in report(with_it, 900 * GIB)
            assert report(with_it, 900 * GIB).endswith("Without those states it fits.")
            with pytest.raises(PeagleError, match=f"states of {name.value} take isn't known"):
                slots_that_fit(with_it, 900 * GIB)
        else:
            assert name.value in STATE_BYTES
    assert estimate(replace(plan, optimizer="ademamix")).optimizer == 3 * estimate(plan).weights
    assert len(unknown) < 12


def test_the_report_counts_the_linear_start_and_the_whole_head_of_validation():
    plan = MemoryPlan(qwen3_8b(), 64)
    started = replace(plan, linear_start=True)
    assert estimate(started).linear_start == pytest.approx(1.2 * 16384 * 20480 * 8)
    alone = replace(estimate(replace(started, positions=1, optimizer="sgd")), gradients=0)
    assert alone.total == alone.weights + alone.frozen + alone.linear_start
    assert "linear start" in report(started, None)
    assert "linear start" not in report(plan, None)
    narrow = replace(plan, config=PeagleConfig.from_dict({**plan.config.to_dict(), "draft_vocab_size": 8192}))
    validated = estimate(replace(narrow, validates=True))
    assert validated.whole_head == 151936 * 4096 * 2
    assert validated.total == estimate(narrow).total + validated.whole_head
    assert estimate(replace(plan, validates=True)).whole_head == 0


def test_arguments_say_what_the_memory_depends_on(train_flags):
    plan = PeagleTrainingArguments(**train_flags).memory_plan(make_config())
    assert plan.linear_start
    assert plan.validates
    other = PeagleTrainingArguments(**{**train_flags, "train_data_ratio": 1.0, "linear_start": False})
    assert not other.memory_plan(make_config()).linear_start
    assert not other.memory_plan(make_config()).validates
