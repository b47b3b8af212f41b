"""Acceptance at a temperature with drawn and with greedy drafts, by `draft_and_verify` in plain transformers.

    python tests/benchmarks/reference_sampling.py output/demo/verifier output/demo/checkpoints/checkpoint_best

Prompts are answered in groups of eight. The interval of the difference is over these groups.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peagle_hf import PeagleForSpeculation, draft_and_verify
from peagle_hf.evaluation.intervals import all_and_leave_one_out, degrees_of_freedom, difference_interval

GROUP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier")
    parser.add_argument("drafter")
    parser.add_argument("--prompts", type=Path, default=Path("examples/data/eval_prompts.jsonl"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.verifier)
    verifier = AutoModelForCausalLM.from_pretrained(options.verifier, dtype=torch.float32).eval()
    drafter = PeagleForSpeculation.from_pretrained(options.drafter).eval()
    questions = [json.loads(line)["turns"][0] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, tokenize=False)
        for one in questions
    ]
    counts = {}
    for method in ("greedy", "probabilistic"):
        torch.manual_seed(0)
        groups = []
        for start in range(0, len(texts), GROUP):
            inputs = tokenizer(
                texts[start : start + GROUP],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            output = verifier.generate(
                **inputs,
                custom_generate=draft_and_verify,
                drafter=drafter,
                draft_sample_method=method,
                max_new_tokens=options.max_tokens,
                do_sample=True,
                temperature=options.temperature,
                top_k=0,
                top_p=1.0,
                return_dict_in_generate=True,
            )
            groups.append([output.num_drafts, *output.accepted_by_position])
        counts[method] = np.array(groups)
        drafts, *accepted = counts[method].sum(0).tolist()
        by_position = ", ".join(f"{one / drafts:.1%}" for one in accepted)
        print(
            f"{method}: acceptance length {1 + sum(accepted) / drafts:.3f}, by position {by_position}, {drafts} drafts"
        )
    weights = all_and_leave_one_out(len(counts["greedy"]))
    summed = {method: weights @ of for method, of in counts.items()}
    lengths = {method: 1 + of[:, 1:].sum(1) / of[:, 0] for method, of in summed.items()}
    values = lengths["probabilistic"] - lengths["greedy"]
    low, high = difference_interval(values, degrees_of_freedom([of[:, 0] for of in counts.values()]))
    print(f"probabilistic - greedy: {values[0]:+.3f} (95 %: {low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    main()
