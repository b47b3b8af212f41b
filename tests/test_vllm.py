"""Real vLLM: what is trained is what is served."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAIN_LENGTH, train_on_answers, write_answers
from test_distributed import launch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peagle_hf import (
    EvaluateArguments,
    PeagleForSpeculation,
    PeagleTrainingArguments,
    draft_and_verify,
    evaluate,
    train,
)
from peagle_hf.data.prompts import Prompt
from peagle_hf.evaluation.answer_parts import Contexts, counts_by_part
from peagle_hf.evaluation.in_processes import engine_arguments
from peagle_hf.evaluation.runs import Condition, Run
from peagle_hf.evaluation.vllm_process import Job, VllmProcess
from peagle_hf.model.served_checkpoint import check_checkpoint, speculative_config
from peagle_hf.serving.environment import vllm_environment
from peagle_hf.serving.installed import REQUEST_COUNTS, drafting_environment
from peagle_hf.serving.tokens_by_load import scheduled

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_DEPTHS, NEW_TOKENS = 3, 60


@pytest.fixture(scope="module", params=[("llama", True, None), ("qwen3", False, 90)], ids=["llama", "qwen3"])
def overfitted(request, tmp_path_factory, servable_verifier) -> tuple[Path, Path]:
    """A drafter trained on what the verifier itself writes after four prompts, and those prompts."""
    draft_arch, norm_before_residual, draft_vocab_size = request.param
    return train_on_answers(
        tmp_path_factory.mktemp("overfit"),
        servable_verifier,
        draft_arch=draft_arch,
        norm_before_residual=norm_before_residual,
        draft_vocab_size=draft_vocab_size,
        num_train_epochs=6,
        per_position_loss_weight="uniform",  # so that a few epochs teach all depths by heart
        num_depths=NUM_DEPTHS,
        new_tokens=NEW_TOKENS,
    )


def test_vllm_accepts_what_an_overfitted_drafter_proposes(overfitted, tmp_path):
    drafter, prompts = overfitted
    result = evaluate(
        EvaluateArguments(model=str(drafter), suite=[str(prompts)], max_tokens=NEW_TOKENS, output=str(tmp_path))
    )
    assert result["text_identical"] is True
    assert result["num_prompts"] == 4
    assert result["acceptance_rate"] >= 0.95
    assert result["acceptance_length"] == pytest.approx(1 + sum(result["per_position_acceptance"]))


@pytest.mark.parametrize("fields", [{}, {"fc_norm": True, "draft_arch": "llama"}], ids=str)
def test_the_reference_counts_what_vllm_counts(servable_verifier, tmp_path, fields):
    """A drafter that is right at times, with more tokens at a time than it was trained for, in one batch."""
    drafter, prompts = train_on_answers(
        tmp_path, servable_verifier, NUM_DEPTHS, NEW_TOKENS, num_train_epochs=1, **fields
    )
    result = evaluate(
        EvaluateArguments(
            model=str(drafter),
            suite=[str(prompts)],
            max_tokens=NEW_TOKENS,
            output=str(tmp_path),
            num_speculative_tokens=[NUM_DEPTHS + 1],
        )
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(servable_verifier, padding_side="left")
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in prompts.read_text().splitlines()]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    output = (
        LlamaForCausalLM.from_pretrained(servable_verifier)
        .eval()
        .generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            custom_generate=draft_and_verify,
            drafter=PeagleForSpeculation.from_pretrained(drafter).eval(),
            num_speculative_tokens=NUM_DEPTHS + 1,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
        )
    )
    counts = output.accepted_by_position
    print(output.num_drafts, counts, result["per_position_acceptance"])
    assert 0.05 < sum(counts) / output.num_drafts / len(counts) < 0.9
    assert (output.num_drafts, sum(counts)) == (result["num_drafts"], result["num_accepted_tokens"])
    assert [count / output.num_drafts for count in counts] == pytest.approx(result["per_position_acceptance"])
    assert output.acceptance_length == pytest.approx(result["acceptance_length"])


def test_nothing_is_drafted_at_loads_above_the_border(chain, drafter, tmp_path):
    """With the schedule of `serve --num-speculative-tokens auto`: drafts at two chats at a time, none at eight.

    Then the load falls from six to two while two answers are written: they are drafted from there on only.
    """
    speeds = {2: {"0": 1.0, "3": 2.0}, 8: {"0": 2.0, "3": 1.0}}
    rows = [{"concurrency": number, "tokens_per_second_by_k": by_k} for number, by_k in speeds.items()]
    schedule = scheduled(rows, takes_schedule=True)
    assert schedule["num_speculative_tokens_per_batch_size"] == [[1, 4, 3], [5, 8, 0]]
    config = speculative_config(drafter, check_checkpoint(drafter)) | schedule
    prompts = [Prompt(str(number), "cycle", [], ["w9 w7"]) for number in range(8)]
    jobs = [Job(prompts, [Condition(0.0, 2), Condition(0.0, 8)], NEW_TOKENS)]
    soon = [Prompt(str(number), "ends", [], ["w9 w20"]) for number in range(2, 14)]  # four of them run at a time
    jobs.append(Job(prompts[:2] + soon, [Condition(0.0, 6)], NEW_TOKENS))
    engine = engine_arguments(str(chain), [8], max_model_len=CHAIN_LENGTH)
    runs: dict[str, list[Run]] = {"without": [], "with": []}
    for name, drafting in {"without": {}, "with": {"speculative_config": config, REQUEST_COUNTS: "detailed"}}.items():
        environment = drafting_environment(vllm_environment())
        with VllmProcess(engine | drafting, environment, tmp_path / f"{name}.log", name) as process:
            for job in jobs:
                runs[name] += [run for run, _ in process.run(job)]
    for alone, drafted in zip(*runs.values(), strict=True):
        assert drafted.texts == alone.texts
    few, many, falling = runs["with"]
    # In the cycle of three tokens every second draft begins before w5, which is right (see test_evaluation.py).
    assert [(counts[0], counts[2]) for counts in few.drafting] == [(40, 19)] * len(prompts)
    assert not np.any(many.drafting)
    assert 20 < falling.drafting[0][0] < 40
    assert falling.drafting[2:] == [[0] * 6] * len(soon)
    assert counts_by_part(many, Contexts()) is counts_by_part(falling, Contexts()) is None


def served(drafter, data, output):
    """What vLLM does with a drafter on the prompts that the data answers."""
    return evaluate(
        EvaluateArguments(
            model=str(drafter), suite=[str(data / "prompts.jsonl")], max_tokens=NEW_TOKENS, output=str(output)
        )
    )


def test_vllm_serves_what_was_saved_under_fsdp_and_its_merged_adapter(servable_verifier, tmp_path):
    """Two FSDP2 processes train half a drafter, LoRA with a module trained whole does the rest."""
    common = write_answers(tmp_path / "data", servable_verifier, NEW_TOKENS) | {"num_depths": NUM_DEPTHS}
    launch("fsdp2", common, num_train_epochs=2, output_dir=str(tmp_path / "fsdp"))
    sharded = served(tmp_path / "fsdp" / "checkpoint_best", tmp_path / "data", tmp_path / "a")
    assert sharded["text_identical"] is True
    assert 0.1 < sharded["acceptance_rate"] < 0.9
    adapter = {"lora_r": 16, "lora_modules_to_save": ["norm"], "output_dir": str(tmp_path / "lora")}
    adapter |= {"from_pretrained": str(tmp_path / "fsdp" / "checkpoint_best"), "num_train_epochs": 5}
    train(PeagleTrainingArguments(**{**common, **adapter}))
    merged = served(tmp_path / "lora" / "checkpoint_best", tmp_path / "data", tmp_path / "b")
    assert merged["text_identical"] is True
    assert merged["acceptance_rate"] > sharded["acceptance_rate"] + 0.05
