"""Tiny verifiers, tokenizers and chats for the cases. `python mk.py T` makes the default verifier T and d.jsonl."""

import json
import random
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "stone",
    "lamp",
    "river",
    "green",
    "paper",
    "train",
    "under",
    "seven",
    "quick",
    "cloud",
    "maple",
    "orange",
    "doctor",
    "window",
    "never",
    "again",
    "simple",
    "rain",
]
PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}<|u|>{{ m.content }}</s>{% elif m.role == 'assistant' %}"
    "<|a|>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
# Behaves as Qwen3's: the answer after the last question gets an empty thinking block, earlier ones do not.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<|u|>{{ m.content }}</s>"
    "{% elif m.role == 'assistant' %}{% if loop.index0 > ns.last %}<|a|><think>\n\n</think>\n\n{{ m.content }}</s>"
    "{% else %}<|a|>{{ m.content }}</s>{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


def say(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def tokenizer(folder, template=PLAIN, size=320, extra=()):
    rng = random.Random(0)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|u|>", "<|a|>", *extra]
    t.train_from_iterator(
        [say(rng, 200) for _ in range(20)],
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tok.chat_template = template
    tok.save_pretrained(folder)
    return tok


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def verifier(folder, model_type="llama", template=PLAIN, tok=None, save=True, dtype=None, **over):
    tok = tok or tokenizer(folder, template)
    fields = {**SIZES, "head_dim": 16, "vocab_size": len(tok), "initializer_range": 0.1, **over}
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if dtype is not None:
        model = model.to(dtype)
    if save:
        model.save_pretrained(folder)
    return model, tok


def chats(path, n=40, turns=1, q=6, a=14, seed=0):
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n):
            messages = []
            for _ in range(turns):
                messages += [{"role": "user", "content": say(rng, q)}, {"role": "assistant", "content": say(rng, a)}]
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    folder = sys.argv[1]
    verifier(folder)
    chats(sys.argv[2] if len(sys.argv) > 2 else "d.jsonl")
