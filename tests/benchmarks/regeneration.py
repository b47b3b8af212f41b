"""`regenerate` on many prompts with a model that answers at once: time and peak memory of the command's own work.

    python tests/benchmarks/regeneration.py FOLDER [--prompts 10000 100000]

Prompts have 140 words on average. Nearly all begin with one of 20 instructions of 12 words; 2 % are copies of another
prompt and 3 % copies in which one word is changed. Answers have 200 tokens. Every step is a process of its own; FOLDER
keeps nothing. `RSS` counts the pages of mapped files, such as those of PyTorch's libraries; `private` does not. Compare
processor seconds (user and system mode) where other programs share the machine, as they lengthen the seconds that pass.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from process_tree import MIB, watch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from peagle_hf.data import regenerate as module
from peagle_hf.data.chat_models import ChatModel
from peagle_hf.data.prompts import distinct, read_prompts

VOCABULARY, NUM_INSTRUCTIONS, ANSWER_TOKENS = 20_000, 20, 200
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


class QuickModel(ChatModel):
    """Answers with different tokens at once, always the same to the same question."""

    batch_size = 32

    def complete(self, prompts, end_ids, sampling, seeds):
        answers = []
        for prompt in prompts:
            start = 1000 + sum(prompt) % (VOCABULARY - 1000 - ANSWER_TOKENS)
            answers.append([*range(start, start + ANSWER_TOKENS), min(end_ids)])
        return answers

    def run_batches(self, batches, work):
        for batch in batches:
            work(batch)
            yield batch


def save_target(folder: Path) -> None:
    """Save a configuration and a tokenizer; there are no weights."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", *(f"w{index}" for index in range(VOCABULARY))]
    LlamaConfig(vocab_size=len(words), max_position_embeddings=8192, eos_token_id=2).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)


def write_prompts(path: Path, count: int) -> None:
    """Words are as frequent as in a language (Zipf), lengths spread as those of real prompts (log-normal)."""
    chooser = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    cumulated = np.cumsum(frequencies / frequencies.sum())

    def draw(number: int) -> list[str]:
        return [f"w{index}" for index in np.searchsorted(cumulated, chooser.random(number) * cumulated[-1])]

    instructions = [draw(12) for _ in range(NUM_INSTRUCTIONS)]
    earlier = [draw(150)]
    with open(path, "w") as file:
        for number in range(count):
            kind = chooser.random()
            if kind < 0.05:
                words = list(earlier[chooser.integers(len(earlier))])
                if kind < 0.03:
                    words[len(words) // 2] = "changed"
            else:
                length = int(np.clip(chooser.lognormal(4.7, 0.6), 10, 1000))
                words = instructions[chooser.integers(NUM_INSTRUCTIONS)] + draw(length)
                earlier = [*earlier[-999:], words]
            file.write(json.dumps({"id": number, "messages": [{"role": "user", "content": " ".join(words)}]}) + "\n")


def run_step(step: str, target: str, prompts: str, output: str) -> None:
    """Do one step in this process."""
    if step == "read and de-duplicate":
        dropped: list[dict[str, str]] = []
        kept = distinct(read_prompts(prompts, dropped), [], dropped)
        print(len(kept), len(dropped))
    elif step != "nothing but imports":
        arguments = module.RegenerateArguments(model=target, output=output, prompts=prompts, max_new_tokens=256)
        module._load = lambda arguments: QuickModel(arguments.model, arguments.max_new_tokens, False)
        module.regenerate(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    target, prompts, output = (str(arguments.folder / name) for name in ("target", "prompts.jsonl", "chats.jsonl"))
    if arguments.step:
        run_step(arguments.step, target, prompts, output)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_target(Path(target))
    print("| prompts | step | processor seconds | seconds | RSS MiB | private MiB |\n|---|---|---|---|---|---|")
    for count in arguments.prompts:
        write_prompts(Path(prompts), count)
        for step in ("nothing but imports", "read and de-duplicate", "regenerate", "write again from the journal"):
            command = [sys.executable, __file__, str(arguments.folder), "--step", step]
            printed, seconds, seen = watch(command)
            print(
                f"| {count:,} | {step} | {seen.processor:,.1f} | {seconds:,.1f} | {seen.rss / MIB:,.0f} | "
                f"{seen.private / MIB:,.0f} |",
                flush=True,
            )
            if step == "read and de-duplicate":
                print("kept and dropped:", printed.split("\n")[-2], file=sys.stderr)
            Path(output).unlink(missing_ok=True)
        for path in arguments.folder.glob("*chats.*"):
            path.unlink()
    shutil.rmtree(target)
    Path(prompts).unlink()


if __name__ == "__main__":
    main()
