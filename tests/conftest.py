"""A tiny verifier, a prepared dataset and its cached hidden states, all real files made by the real code."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from fake_vllm import FakeDraftingVllm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.cache_storage import write_states

# Processes that tests start import this checkout too, and the versions that make test-versions puts on the path.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell script lets its background jobs ignore Ctrl-C, and with them the commands that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB, HIDDEN, LAYERS = 96, 32, 7
AUX = [2, 3, 4]
FOLLOWERS = {5: 6, 6: 7, 7: 5, 20: 21, 21: 22, 22: 2}
CHAIN_LAYER = {
    "hidden_size": VOCAB,
    "intermediate_size": 32,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
CHAIN_LENGTH = 256
START_SECONDS = 240
"""How long a vLLM server may take to be ready."""


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


# In the style of Qwen3's template: answers after the last question begin with a thought, which may be empty; earlier
# answers lose theirs.
THINKING = (
    "{% set asked = namespace(last=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role }}\n"
    "{% set parts = message.content.split('</think>') %}"
    "{% if message.role == 'assistant' and loop.index0 > asked.last %}"
    "{{ '<think>\n' + (parts[0].replace('<think>', '').strip() if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].strip() if message.role == 'assistant' else message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_LAYERS = 8


@pytest.fixture(scope="session")
def thinking_verifier(tmp_path_factory) -> Path:
    """A random Qwen3 of 8 layers whose chat template rewrites earlier answers, as Qwen3's own does."""
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the rain in the river runs under a green stone, user assistant think"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = THINKING
    fast.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(fast),
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=THINKING_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The real SmolLM2-135M-Instruct, in float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, Path(__file__).parents[1] / "examples" / "smollm2.py", folder], check=True)
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


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A chat model whose next token is `FOLLOWERS` of the last; its template is the messages' words alone.

    Its layers add nothing and its embedding is the identity, so its head alone says which token follows which.
    """
    folder = tmp_path_factory.mktemp("a chain")
    config = LlamaConfig(
        **CHAIN_LAYER,
        vocab_size=VOCAB,
        num_hidden_layers=4,
        max_position_embeddings=CHAIN_LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.zero_()
        for token, follower in FOLLOWERS.items():
            model.lm_head.weight[follower, token] = 1
    model.save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", "<mask>", *(f"w{index}" for index in range(4, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(chain):
    """A server with a drafter for `chain`; some modules have another fixture of this name."""
    with FakeDraftingVllm(str(chain)) as server:
        yield server


@pytest.fixture
def baseline(chain):
    """A server of `chain` without a drafter."""
    with FakeDraftingVllm(str(chain), drafts=False) as server:
        yield server


@pytest.fixture(scope="session")
def drafter(chain, tmp_path_factory):
    """Two layers, three tokens at a time: all zeros, it always proposes the first of its vocabulary, w5."""
    from peagle_hf import PeagleConfig, PeagleForSpeculation

    folder = tmp_path_factory.mktemp("a drafter")
    config = PeagleConfig(
        transformer_layer_config={"model_type": "llama", **CHAIN_LAYER, "vocab_size": VOCAB, "num_hidden_layers": 2},
        speculators_config={"verifier": {"name_or_path": str(chain), "architectures": ["LlamaForCausalLM"]}},
        draft_vocab_size=40,
        mask_token_id=3,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        num_depths=3,
    )
    model = PeagleForSpeculation(config)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    token_ids = torch.arange(5, 45)
    model.set_draft_vocabulary(token_ids - torch.arange(40), torch.isin(torch.arange(VOCAB), token_ids))
    model.save_pretrained(folder)
    return folder


VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def save_verifier(folder: Path, config: PreTrainedConfig, seed: int = 0, **options: object) -> PreTrainedModel:
    """A verifier whose norms and biases differ from their initial 0 and 1, saved to `folder`."""
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder, **options)
    return model


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


def write_cache(folder: Path, verifier: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
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
        write_states(folder / "hidden_states", row, states.to(dtype), tokens)
    Manifest.of(str(verifier), model.config, AUX, dtype=str(dtype).removeprefix("torch.")).write(
        folder / "hidden_states"
    )
    return folder


def write_answers(folder: Path, verifier: Path, new_tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict:
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
    write_cache(folder, verifier, dtype)
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


class VllmServer:
    """A server as a user starts it, and the processes of its session; it stops at the end of a `with`.

    Args:
        command: the module and what comes before vLLM's own flags.
        flags: those, but for its address.
        environment: default: this process's own.
    """

    def __init__(self, command: list[str], flags: list[str], log: Path, environment: dict[str, str] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command, self.log = [sys.executable, "-m", *command, *address, *flags], log
        self.environment = environment
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
                break
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        self.tree = [process.pid for process in psutil.Process(self.process.pid).children(recursive=True)]

    @property
    def api_server(self) -> psutil.Process:
        (guard,) = psutil.Process(self.process.pid).children()
        return guard.children()[0]

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def ended(process_ids: list[int], seconds: float = 5.0) -> bool:
    """Whether these processes end in so many seconds; one that nobody has waited for yet has ended too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = {process.info["pid"]: process.info["status"] for process in psutil.process_iter(["pid", "status"])}
        if all(states.get(number, psutil.STATUS_ZOMBIE) == psutil.STATUS_ZOMBIE for number in process_ids):
            return True
        time.sleep(0.05)
    return False


def short_run(verifier: Path, data: Path, output: Path) -> dict:
    """What a short run needs, as keyword arguments of `PeagleTrainingArguments`."""
    return {
        "verifier_name_or_path": str(verifier),
        "data_path": str(data),
        "output_dir": str(output / "checkpoints"),
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


@pytest.fixture
def train_flags(tiny_verifier, tiny_data, tmp_path) -> dict:
    """Those of a short run in the test's own folder."""
    return short_run(tiny_verifier, tiny_data, tmp_path)
