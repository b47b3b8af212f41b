"""Acceptance at a temperature with drawn and with greedy drafts in vLLM, and whether the text is the verifier's own.

    python tests/benchmarks/draft_sampling.py output/demo/verifier output/demo/checkpoints/checkpoint_best

For each `draft_sample_method`, in a vLLM process of its own: the acceptance of all prompts, its difference from the
other method with an interval over prompts, and tokens/s. Before vLLM 0.29, which counts drafts in total only, the
difference has no interval. Then one prompt is answered many times with at most three tokens. The second and third of
these, which drafts may have given, are compared by chi-square with the verifier's exact probabilities given the tokens
before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peagle_hf.evaluation.intervals import all_and_leave_one_out, degrees_of_freedom, difference_interval
from peagle_hf.evaluation.vllm_process import read_counters
from peagle_hf.model.served_checkpoint import check_checkpoint, speculative_config
from peagle_hf.serving.client import acceptance_rates, drafting_counts
from peagle_hf.serving.environment import installed_vllm, vllm_environment
from peagle_hf.serving.installed import REQUEST_COUNTS, drafting_environment

METHODS = ("greedy", "probabilistic")


def answer(job: dict) -> dict:
    """In the child: the counts of each prompt, or one row of totals; tokens/s; and the short answers."""
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])

    def ask(prompts: list[list[int]], max_tokens: int) -> list:
        sampling = SamplingParams(temperature=job["temperature"], max_tokens=max_tokens)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [output.outputs[0] for output in llm.generate(given, sampling, use_tqdm=False)]

    ask(job["prompts"][: job["concurrency"]], 8)  # vLLM compiles kernels when it first has so many at a time
    before, started = read_counters(llm), time.perf_counter()
    answers = ask(job["prompts"], job["max_tokens"])
    seconds = time.perf_counter() - started
    counts = [[after - earlier for after, earlier in zip(read_counters(llm), before, strict=True)]]
    counted = [one.spec_decode_metrics for one in answers if getattr(one, "spec_decode_metrics", None) is not None]
    if len(counted) == len(answers):
        counts = [drafting_counts(one.histogram, one.num_draft_tokens) for one in counted]
    return {
        "counts": counts,
        "speed": sum(len(one.token_ids) for one in answers) / seconds,
        "short": [list(one.token_ids) for one in ask([job["prompts"][0]] * job["copies"], 3)],
    }


def chi_square(verifier: str, prompt: list[int], short: list[list[int]], temperature: float) -> str:
    """The statistic of the second and of the third token, and its distance from the mean in standard deviations."""
    model, parts = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32).eval(), []
    for place in (1, 2):
        texts = torch.tensor([one[: place + 1] for one in short if len(one) > place])  # a text may have ended
        prefixes, number = texts[:, :place].unique(dim=0, return_inverse=True)
        ids = torch.cat([torch.tensor(prompt).expand(len(prefixes), -1), prefixes], dim=1)
        with torch.no_grad():
            chances = [(model(one[None]).logits[0, -1] / temperature).softmax(-1) for one in ids]
        expected = torch.stack(chances)[number].sum(0)
        found = torch.bincount(texts[:, place], minlength=len(expected))
        frequent = expected >= 5
        both = [torch.cat([of[frequent], of[~frequent].sum()[None]]) for of in (expected, found)]
        freedom = int(frequent.sum())
        statistic = float(((both[1] - both[0]) ** 2 / both[0]).sum())
        parts.append(f"{statistic:.1f} of {freedom} ({(statistic - freedom) / (2 * freedom) ** 0.5:+.1f} deviations)")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier")
    parser.add_argument("drafter")
    parser.add_argument("--prompts", default="examples/data/eval_prompts.jsonl")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--copies", type=int, default=1000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.verifier)
    questions = [json.loads(line)["turns"][0] for line in Path(options.prompts).read_text().splitlines()]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [
        list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)) for chat in chats
    ]
    folder = os.path.realpath(options.drafter)
    installed = installed_vllm()
    if not installed.takes("draft_sample_method"):
        sys.exit(f"vLLM {installed.version} has no draft_sample_method: it drafts greedily at any temperature.")
    counts = {}
    for method in METHODS:
        engine = {
            "model": options.verifier,
            "dtype": "auto" if torch.cuda.is_available() else "float32",
            "enforce_eager": not torch.cuda.is_available(),
            "max_model_len": max(map(len, prompts)) + options.max_tokens,
            "max_num_seqs": options.concurrency,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "speculative_config": speculative_config(folder, check_checkpoint(folder), None, method),
            REQUEST_COUNTS: "detailed",
        }
        job = vars(options) | {"engine": installed.known(engine), "prompts": prompts}
        environment = drafting_environment(vllm_environment()) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(job),
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"vLLM failed: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        result = json.loads(lines[0].removeprefix("RESULT "))
        counts[method] = np.array(result["counts"])
        rates = acceptance_rates(counts[method].sum(0))
        by_position = ", ".join(f"{rate:.2%}" for rate in rates["per_position_acceptance"])
        square = chi_square(options.verifier, prompts[0], result["short"], options.temperature)
        print(
            f"{method}: acceptance length {rates['acceptance_length']:.4f}, by position {by_position}, "
            f"{int(counts[method][:, 0].sum())} drafts of {len(prompts)} prompts, {result['speed']:.0f} tokens/s; "
            f"chi-square of {len(result['short'])} texts {square}",
            flush=True,
        )
    if len(counts["greedy"]) < len(prompts):
        values = [
            acceptance_rates(counts[method].sum(0))["acceptance_length"] for method in ("probabilistic", "greedy")
        ]
        print(
            f"probabilistic - greedy: {values[0] - values[1]:+.4f}, without an interval, since this vLLM counts "
            "drafts in total only"
        )
        return
    weights = all_and_leave_one_out(len(prompts))
    lengths = {method: acceptance_rates(weights @ of)["acceptance_length"] for method, of in counts.items()}
    values = lengths["probabilistic"] - lengths["greedy"]
    low, high = difference_interval(values, degrees_of_freedom([of[:, 0] for of in counts.values()]))
    print(f"probabilistic - greedy: {values[0]:+.4f} (95 %: {low:+.4f} to {high:+.4f})")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        print("RESULT " + json.dumps(answer(json.load(sys.stdin))), flush=True)
