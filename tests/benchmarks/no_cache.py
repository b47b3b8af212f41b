"""A step of training from a cache, beside one whose states the verifier computes in the same process.

    python tests/benchmarks/no_cache.py FOLDER                                   # sizes of Qwen3-8B, on a GPU
    python tests/benchmarks/no_cache.py FOLDER --small                           # a test of the benchmark itself
    python tests/benchmarks/no_cache.py FOLDER --verifier-device cuda:1          # the verifier on another GPU

FOLDER gets a verifier with random weights (speed doesn't depend on them), random samples and their hidden states, and
is used again as it is. Four trainings of the same samples, one after another in one process, differ only in where
states come from: the cache; the verifier, a step ahead; the verifier, with nothing computed ahead; the cache again,
which shows how much the device drifts. `verifier` is the verifier's part of a step, run alone. The hidden share is
1 - (ahead - cache) / verifier. Prints one JSON object; times are medians of the steps after --warm-up.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback

from peagle_hf import ExtractArguments, PeagleTrainingArguments, extract
from peagle_hf.data.collator import CODDataCollator
from peagle_hf.data.dataset import HiddenStatesDataset
from peagle_hf.training.memory import GIB, estimate
from peagle_hf.training.run import build_config, build_trainer

SMALL = {"hidden": 64, "inner": 128, "heads": 4, "key_heads": 2, "head_dim": 16, "vocab": 512, "verifier_layers": 8}
SMALL |= {"sample_length": 60, "total_seq_len": 128, "drafter_layers": 2, "steps": 6, "warm_up": 2}


class StepTimes(TrainerCallback):
    """Wall time of each step, the device's work included."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in {
        "hidden": 4096,
        "inner": 12288,
        "heads": 32,
        "key_heads": 8,
        "head_dim": 128,
        "vocab": 151936,
        "verifier_layers": 36,
        "sample_length": 1000,
        "total_seq_len": 4096,
        "drafter_layers": 4,
        "num_depths": 8,
        "accumulation": 1,
        "steps": 30,
        "warm_up": 8,
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--storage", default="plain")
    parser.add_argument("--optim", default="muon")
    parser.add_argument("--verifier-device")
    parser.add_argument("--small", action="store_true")
    sizes = parser.parse_args()
    if sizes.small:
        vars(sizes).update(SMALL)
    make(sizes)
    start = time.perf_counter()
    report = extract(
        ExtractArguments(str(sizes.folder / "verifier"), str(sizes.folder / "data"), storage=sizes.storage)
    )
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "extraction_tokens_per_second": report.num_tokens / report.seconds if report.num_tokens else None,
        "extraction_seconds": time.perf_counter() - start,
        "cache_bytes_per_token": cache_bytes(sizes),
        "cache": train(sizes),
        "ahead": train(sizes, ahead=sizes.accumulation),
        "not_ahead": train(sizes, ahead=0),
        "cache_again": train(sizes),
        "verifier": verifier_alone(sizes),
    }
    cached = statistics.mean((result["cache"]["step_ms"], result["cache_again"]["step_ms"]))
    result["hidden_share"] = 1 - (result["ahead"]["step_ms"] - cached) / result["verifier"]
    print(json.dumps({"sizes": {name: str(value) for name, value in vars(sizes).items()}, **result}, indent=2))


def make(sizes: argparse.Namespace) -> None:
    """Write the verifier and the prepared samples, unless they are there."""
    if not (sizes.folder / "verifier" / "config.json").exists():
        config = Qwen3Config(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.inner,
            num_hidden_layers=sizes.verifier_layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.key_heads,
            head_dim=sizes.head_dim,
            max_position_embeddings=40960,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(sizes.folder / "verifier")
        del model
        free()
    if not (sizes.folder / "data" / "token_freq.pt").exists():
        generator = torch.Generator().manual_seed(0)
        each = min(sizes.sample_length, sizes.total_seq_len)
        num_samples = max(1, sizes.total_seq_len // each) * sizes.accumulation * sizes.steps
        lengths = torch.randint(each // 2, each + each // 2, (num_samples,), generator=generator).clamp(
            8, sizes.total_seq_len
        )
        rows = [torch.randint(4, sizes.vocab, (int(n),), generator=generator).tolist() for n in lengths]
        data = {
            "input_ids": rows,
            "loss_mask": [[int(place >= 0.4 * len(row)) for place in range(len(row))] for row in rows],
            "seq_len": [len(row) for row in rows],
            "conversation_id": list(range(len(rows))),
        }
        Dataset.from_dict(data).save_to_disk(str(sizes.folder / "data"))
        torch.save(dict.fromkeys(range(sizes.vocab), 1), sizes.folder / "data" / "token_freq.pt")


def cache_bytes(sizes: argparse.Namespace) -> float:
    data = HiddenStatesDataset(sizes.folder / "data", total_seq_len=sizes.total_seq_len).data
    files = (sizes.folder / "data" / "hidden_states").glob("hs_*.safetensors")
    return sum(path.stat().st_size for path in files) / sum(data.with_format(None)["seq_len"])


def arguments(sizes: argparse.Namespace, generates: bool) -> PeagleTrainingArguments:
    name = "generated" if generates else "cached"
    generating = {"on_missing": "generate", "hidden_states_path": str(sizes.folder / "no states")} if generates else {}
    if sizes.verifier_device:  # without it a second visible GPU is refused; from a cache no verifier is loaded
        generating |= {"on_missing": "generate", "verifier_device": sizes.verifier_device}
    return PeagleTrainingArguments(
        verifier_name_or_path=str(sizes.folder / "verifier"),
        data_path=str(sizes.folder / "data"),
        output_dir=str(sizes.folder / name),
        num_layers=sizes.drafter_layers,
        num_depths=sizes.num_depths,
        total_seq_len=sizes.total_seq_len,
        gradient_accumulation_steps=sizes.accumulation,
        train_data_ratio=1.0,
        max_steps=sizes.steps,
        save_strategy="no",
        logging_steps=sizes.steps,
        linear_start=False,
        optim=sizes.optim,
        disable_tqdm=True,
        report_to="none",
        resume=False,
        **generating,
    )


def train(sizes: argparse.Namespace, ahead: int | None = None) -> dict[str, float | None]:
    """Step time, loss and memory of one training; `ahead`: batches computed in advance, None: from the cache."""
    args, times = arguments(sizes, ahead is not None), StepTimes()
    completed = HiddenStatesDataset.completed
    free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with patch.object(
        HiddenStatesDataset, "completed", lambda self, batches, _=1: completed(self, batches, ahead or 0)
    ):
        trainer = build_trainer(args, callbacks=[times])
        trainer.train()
    steps = [end - begin for begin, end in zip(times.ends[:-1], times.ends[1:], strict=True)][sizes.warm_up :]
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    predicted = estimate(args.memory_plan(build_config(args))).total / GIB
    del trainer
    return {
        "step_ms": 1000 * statistics.median(steps),
        "loss": last["loss"],
        "loader_wait": last["loader_wait"],
        "predicted_gib": predicted,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
    }


def verifier_alone(sizes: argparse.Namespace) -> float:
    """Milliseconds of the verifier's part of a step, with nothing beside it."""
    trainer = build_trainer(arguments(sizes, True))
    dataset, collator, took = trainer.train_dataset, CODDataCollator(num_depths=sizes.num_depths), []
    for number in range(min(len(dataset), sizes.steps)):
        batch = collator([dataset[number]])
        batch["input_ids"] = batch["input_ids"].to(trainer.args.device)  # where the states go, as in training
        start = time.perf_counter()
        list(dataset.completed([batch]))
        took.append(time.perf_counter() - start)
    return 1000 * sizes.accumulation * statistics.median(took[min(sizes.warm_up, len(took) - 1) :])


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
