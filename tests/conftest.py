"""A tiny verifier, a prepared dataset and its cached hidden states, all real files made by the real code."""

import json
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from peagle_hf.data.cache import Manifest, write_row

VOCAB, HIDDEN, LAYERS = 96, 32, 7
AUX = [2, 3, 4]


@pytest.fixture(scope="session")
def tiny_verifier(tmp_path_factory) -> Path:
    """A Llama of 7 layers, 32 hidden, 96 tokens, whose tokenizer knows the words w0 .. w89 and four special ones."""
    folder = tmp_path_factory.mktemp("verifier")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"] + [f"w{index}" for index in range(90)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=words[1], eos_token=words[2], pad_token=words[3]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def servable_verifier(tmp_path_factory, tiny_verifier) -> Path:
    """A random Llama with heads of a size that vLLM has kernels for."""
    folder = tmp_path_factory.mktemp("servable")
    set_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_verifier)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_prepared(folder: Path, lengths: list[int], conversations: list[int] | None = None, seed: int = 0) -> Path:
    """A prepared dataset of random tokens: the first third of a row is the prompt, the rest the reply."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, VOCAB - 2, (length,), generator=generator).tolist() for length in lengths]
    data = Dataset.from_dict(
        {
            "input_ids": rows,
            "loss_mask": [[int(index >= len(row) // 3) for index in range(len(row))] for row in rows],
            "seq_len": lengths,
            "conversation_id": conversations or list(range(len(rows))),
        }
    )
    data.save_to_disk(str(folder))
    counts = torch.bincount(torch.cat([torch.tensor(row) for row in rows]), minlength=VOCAB)
    torch.save(dict(enumerate(counts.tolist())), folder / "token_freq.pt")
    return folder


def write_cache(folder: Path, verifier: Path, seed: int = 0) -> Path:
    """The verifier's own states of a prepared dataset."""
    from datasets import load_from_disk

    model = LlamaForCausalLM.from_pretrained(verifier).eval()
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    for row, sample in enumerate(load_from_disk(str(folder)).with_format(None)):
        tokens = torch.tensor(sample["input_ids"])
        with torch.no_grad():
            output = model(tokens[None], output_hidden_states=True)
        states = torch.stack([*(output.hidden_states[layer][0] for layer in AUX), last.pop()[0]], dim=1)
        write_row(folder / "hidden_states", row, states.bfloat16(), tokens)
    Manifest.of(str(verifier), model.config, AUX, dtype="bfloat16").write(folder / "hidden_states")
    return folder


def write_answers(folder: Path, verifier: Path, new_tokens: int) -> dict:
    """Prepare and cache what the verifier itself writes after four prompts, which are in `prompts.jsonl` there.

    Returns:
        Arguments of a training on it, but for the drafter's kind.
    """
    from datasets import Dataset

    model = LlamaForCausalLM.from_pretrained(verifier).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(verifier)
    prompts = [" ".join(f"w{(7 * number + 3 * step) % 90}" for step in range(6 + number)) for number in range(4)]
    rows = []
    for prompt in prompts:
        ids = tokenizer(f"{prompt} ", return_tensors="pt").input_ids
        rows.append(
            (ids.shape[1], model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=3)[0].tolist())
        )
    rows *= 50
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
    write_cache(folder, verifier)
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"question_id": number, "category": "overfit", "turns": [prompt]}) + "\n"
            for number, prompt in enumerate(prompts)
        )
    )
    return {
        "verifier_name_or_path": str(verifier),
        "data_path": str(folder),
        "output_dir": str(folder / "checkpoints"),
        "num_layers": 2,
        "down_sample_ratio": 1.0,
        "total_seq_len": 256,
        "learning_rate": 2e-3,
        "train_data_ratio": 1,
        "export_dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 50,
    }


def train_on_answers(folder: Path, verifier: Path, num_depths: int, new_tokens: int, **options) -> tuple[Path, Path]:
    """A drafter trained on what the verifier itself writes after four prompts, and those prompts."""
    from peagle_hf import PeagleTrainingArguments, train

    common = write_answers(folder, verifier, new_tokens)
    train(PeagleTrainingArguments(**common, num_depths=num_depths, **options))
    return folder / "checkpoints" / "checkpoint_best", folder / "prompts.jsonl"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, tiny_verifier) -> Path:
    """20 conversations of 12 to 31 tokens, prepared and cached."""
    folder = tmp_path_factory.mktemp("data")
    return write_cache(write_prepared(folder, [12 + index for index in range(20)]), tiny_verifier)


def ended(process_ids: list[int], seconds: float = 5.0) -> bool:
    """Whether these processes end in so many seconds; one that nobody has waited for yet has ended too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = {process.info["pid"]: process.info["status"] for process in psutil.process_iter(["pid", "status"])}
        if all(states.get(number, psutil.STATUS_ZOMBIE) == psutil.STATUS_ZOMBIE for number in process_ids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def train_flags(tiny_verifier, tiny_data, tmp_path) -> dict:
    """What a short run needs, as keyword arguments of `PeagleTrainingArguments`."""
    return {
        "verifier_name_or_path": str(tiny_verifier),
        "data_path": str(tiny_data),
        "output_dir": str(tmp_path / "checkpoints"),
        "num_layers": 2,
        "num_depths": 3,
        "draft_vocab_size": 64,
        "total_seq_len": 64,
        "num_train_epochs": 2,
        "train_data_ratio": 0.8,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
