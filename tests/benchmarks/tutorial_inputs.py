"""What the tutorial's run needs and can be made anywhere: a verifier of Qwen3-8B's size, a tokenizer, conversations.

The speed of extraction and training depends on sizes, not on values: the weights are random, and so are the words.
"""

import json
import math
import os
import random
import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

TURNS = 3.51
QUESTION, ANSWER = (94.46, 626.39), (348.45, 269.93)
"""Turns of a conversation on average (ShareGPT: 330,239 in 94,145, arXiv 2512.17843, table 1), and mean and standard
deviation of the tokens of a question and of an answer (after WildChat, arXiv 2405.01470, table 1)."""
VERIFIER = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
"""Of Qwen/Qwen3-8B's config.json."""
TINY = VERIFIER | {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def make_verifier(folder: Path, tokenizer: str | None, tiny: bool) -> None:
    """Write a random Qwen3 in bfloat16, in files of 4 GB, with a tokenizer.

    Args:
        tokenizer: a folder or hub name; None trains a small one on words of syllables.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    written = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(written, ignore_errors=True)
    config = AutoConfig.for_model("qwen3", **(TINY if tiny else VERIFIER))
    with torch.device(device):  # a GPU draws 16 GB of random numbers in a second
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(written, max_shard_size="4GB")
    make_tokenizer(tokenizer, tiny).save_pretrained(written)
    written.rename(folder)


def facts_of_verifier(folder: Path) -> dict[str, Any]:
    """The number of weights and the configuration of a verifier that `make_verifier` has written."""
    from safetensors import safe_open

    config, weights = json.loads((folder / "config.json").read_text()), 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            weights += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return {"weights": weights, "config": {name: config[name] for name in VERIFIER if name in config}}


def make_tokenizer(name: str | None, tiny: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocab_size = (TINY if tiny else VERIFIER)["vocab_size"]
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        if len(tokenizer) > vocab_size:
            raise SystemExit(f"{name} has {len(tokenizer)} tokens, the verifier {vocab_size}.")
        return tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    draw = random.Random(0)
    syllables = [first + vowel + last for first in CONSONANTS for vowel in VOWELS for last in ("", *"nrst")]
    words = {"".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400 if tiny else 8000)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size // 4,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in sorted(words)] + ["user", "assistant"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def write_chats(file: Path, verifier: Path, count: int, longest: int) -> dict[str, Any]:
    """Write conversations of ShareGPT's lengths in its own form; returns their facts.

    The number of turns is geometric; questions and answers have lognormal lengths. Each word is one token, drawn by
    Zipf's law. A conversation ends with the turn that passes `longest` tokens, after which `prepare` cuts.
    """
    from transformers import AutoTokenizer

    draw = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(verifier)
    candidates = [f" {piece[1:]}" for piece in sorted(tokenizer.get_vocab()) if piece[0] == "Ġ" and piece[1:].isalpha()]
    ids = tokenizer(candidates, add_special_tokens=False)["input_ids"]
    words = [word for word, pieces in zip(candidates, ids, strict=True) if len(pieces) == 1]
    draw.shuffle(words)
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))

    def text(mean: float, deviation: float) -> tuple[str, int]:
        variance = math.log(1 + (deviation / mean) ** 2)
        length = round(draw.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance)))
        length = max(1, min(length, longest))
        return "".join(draw.choices(words, cum_weights=weights, k=length)).lstrip(), length

    turns = tokens = 0
    part = file.with_suffix(".part")
    with open(part, "w") as chats:
        for number in range(count):
            messages: list[dict[str, str]] = []
            room = longest
            while room > 0:
                for author, lengths in (("human", QUESTION), ("gpt", ANSWER)):
                    value, length = text(*lengths)
                    messages.append({"from": author, "value": value})
                    room, tokens = room - length, tokens + length
                turns += 1
                if draw.random() < 1 / TURNS:
                    break
            chats.write(json.dumps({"id": f"chat_{number}", "conversations": messages}) + "\n")
    os.replace(part, file)
    return {"conversations": count, "turns": turns, "tokens": tokens}
