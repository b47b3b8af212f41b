"""Real vLLM: what is trained is what is served."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import write_cache
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peagle_hf import EvaluateArguments, PeagleTrainingArguments, evaluate, train

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_DEPTHS, NEW_TOKENS, COPIES = 3, 60, 50


@pytest.fixture(scope="module", params=[("llama", True, None), ("qwen3", False, 90)], ids=["llama", "qwen3"])
def overfitted(request, tmp_path_factory, servable_verifier) -> tuple[Path, Path]:
    """A drafter trained on what the verifier itself writes after four prompts, and those prompts."""
    draft_arch, norm_before_residual, draft_vocab_size = request.param
    folder = tmp_path_factory.mktemp("overfit")
    model = LlamaForCausalLM.from_pretrained(servable_verifier).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(servable_verifier)
    prompts = [" ".join(f"w{(7 * number + 3 * step) % 90}" for step in range(6 + number)) for number in range(4)]
    rows = []
    for prompt in prompts:
        ids = tokenizer(f"{prompt} ", return_tensors="pt").input_ids
        rows.append(
            (ids.shape[1], model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=3)[0].tolist())
        )
    rows *= COPIES
    data = Dataset.from_dict(
        {
            "input_ids": [tokens for _, tokens in rows],
            "loss_mask": [[int(index >= start) for index in range(len(tokens))] for start, tokens in rows],
            "seq_len": [len(tokens) for _, tokens in rows],
            "conversation_id": list(range(len(rows))),
        }
    )
    data.save_to_disk(str(folder))
    torch.save(dict(Counter(token for _, tokens in rows for token in tokens)), folder / "token_freq.pt")
    write_cache(folder, servable_verifier)
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"question_id": number, "category": "overfit", "turns": [prompt]}) + "\n"
            for number, prompt in enumerate(prompts)
        )
    )
    train(
        PeagleTrainingArguments(
            verifier_name_or_path=str(servable_verifier),
            data_path=str(folder),
            output_dir=str(folder / "checkpoints"),
            num_layers=2,
            draft_arch=draft_arch,
            norm_before_residual=norm_before_residual,
            draft_vocab_size=draft_vocab_size,
            num_depths=NUM_DEPTHS,
            down_sample_ratio=1.0,
            total_seq_len=256,
            num_train_epochs=6,
            learning_rate=2e-3,
            train_data_ratio=1,
            export_dtype="float32",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            logging_steps=50,
        )
    )
    return folder / "checkpoints" / "checkpoint_best", folder / "prompts.jsonl"


def test_vllm_accepts_what_an_overfitted_drafter_proposes(overfitted, tmp_path):
    drafter, prompts = overfitted
    result = evaluate(
        EvaluateArguments(model=str(drafter), prompts=str(prompts), max_tokens=NEW_TOKENS, output=str(tmp_path))
    )
    assert result["text_identical"] is True
    assert result["num_prompts"] == 4
    assert result["acceptance_rate"] >= 0.95
    assert result["acceptance_length"] == pytest.approx(1 + sum(result["per_position_acceptance"]))
