"""Many short conversations: prepare and extract them with a tiny verifier, and plan an epoch; time and peak memory.

    python tests/benchmarks/large_dataset.py FOLDER [--conversations 10000 100000]

Every step is a process of its own; FOLDER keeps nothing. The memory is that of all its processes: `RSS` with the pages
of mapped files, which the kernel takes back when it needs them, `private` without.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

from process_tree import MIB, watch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
PLAN = """
import sys
from peagle_hf import HiddenStatesDataset
from peagle_hf.data.prepared_dataset import split_rows
dataset = HiddenStatesDataset(sys.argv[1], rows=split_rows(sys.argv[1], 0.99)[0])
print(len(dataset), "packed rows")
"""


def save_verifier(folder: Path) -> None:
    set_seed(0)
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>", "system", "user", "assistant"]
    words += [f"w{index}" for index in range(1000)]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=7,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<pad>", chat_template=TEMPLATE
    ).save_pretrained(folder)


def write_chats(path: Path, count: int) -> None:
    """Conversations of two or four messages of 5 to 30 words."""
    chooser = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            messages = [
                {
                    "role": role,
                    "content": " ".join(f"w{chooser.randrange(1000)}" for _ in range(chooser.randint(5, 30))),
                }
                for role in ("user", "assistant") * chooser.randint(1, 2)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, nargs="+", default=[10_000, 100_000])
    arguments = parser.parse_args()
    verifier, chats, data = (arguments.folder / name for name in ("verifier", "chats.jsonl", "data"))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_verifier(verifier)
    peagle = [sys.executable, "-m", "peagle_hf"]
    extract = [*peagle, "extract", "--model", str(verifier), "--preprocessed-data", str(data)]
    steps = {
        "nothing but imports": [*peagle, "extract", "--help"],
        "prepare": [*peagle, "prepare", "--model", str(verifier), "--data", str(chats), "--output", str(data)],
        "extract": extract,
        "extract again": extract,
        "plan an epoch": [sys.executable, "-c", PLAN, str(data)],
        "cache verify": [*peagle, "cache", "verify", str(data / "hidden_states")],
    }
    print("| conversations | step | seconds | RSS MiB | private MiB |\n|---|---|---|---|---|")
    for count in arguments.conversations:
        write_chats(chats, count)
        for name, command in steps.items():
            _, seconds, seen = watch(command)
            print(
                f"| {count:,} | {name} | {seconds:,.1f} | {seen.rss / MIB:,.0f} | {seen.private / MIB:,.0f} |",
                flush=True,
            )
        shutil.rmtree(data)
    for path in (verifier, chats):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
