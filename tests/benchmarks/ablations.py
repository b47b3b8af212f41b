"""What each training choice is worth: one choice changed at a time, same data and steps, several seeds.

    python tests/benchmarks/ablations.py run VERIFIER TRAIN HELD_OUT OUTPUT.jsonl [--jobs 8] [--only REGEX]
    python tests/benchmarks/ablations.py table OUTPUT.jsonl

TRAIN and HELD_OUT are folders of `peagle-hf prepare` with extracted states, of the verifier's own answers. A cell is
one training and the acceptance length of its drafter on HELD_OUT, from cached states (see docs/acceptance.md). A cell's
line is written when it is finished, so that a rerun makes only what is missing. Jobs share the GPUs, or the CPU.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BASE = {
    "num_layers": 2,
    "draft_arch": "llama",
    "weight_decay": 0.0,
    "num_depths": 4,
    "draft_vocab_size": 8192,
    "total_seq_len": 1024,
    "epochs": 1,
    "lr": 1e-3,
    "warmup_steps": 0.05,
    "train_data_ratio": 1.0,
    "per_position_loss_weight": "uniform",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 50,
}

DRAFTED = 4
"""Tokens drafted at a time in every measurement, whatever a drafter was trained for."""

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "loss: reverse KL": {"loss_fn": "rkl"},
    "loss: Jensen-Shannon": {"loss_fn": "jsd"},
    "loss: cross-entropy": {"loss_fn": "ce"},
    "loss: total variation": {"loss_fn": "tv"},
    "loss: -log acceptance": {"loss_fn": "nla"},
    "loss: LK hybrid": {"loss_fn": "lk_hybrid"},
    "loss: KL + cross-entropy": {"loss_fn": '{"kl_div": 0.5, "ce": 0.5}'},
    "depth decay 0.8": {"depth_loss_decay": 0.8},
    "depth decay 0.5": {"depth_loss_decay": 0.5},
    "D-PACE weights": {"per_position_loss_weight": "dpace"},
    "r 0.5": {"down_sample_ratio": 0.5},
    "r 0.9": {"down_sample_ratio": 0.9},
    "r 1.0": {"down_sample_ratio": 1.0},
    "r_min 0.5": {"down_sample_ratio_min": 0.5},
    "K 2 in training": {"num_depths": 2},
    "K 6 in training": {"num_depths": 6},
    "K 8 in training": {"num_depths": 8},
    "1 layer": {"num_layers": 1},
    "4 layers": {"num_layers": 4},
    "frozen embeddings": {"embed_requires_grad": False},
    "trained head": {"train_head": True},
    "whole vocabulary": {"draft_vocab_size": None},
    "norm before fc": {"norm_before_fc": True},
    "norm after residual": {"norm_before_residual": False},
    "lr 5e-4": {"lr": 5e-4},
    "lr 2e-3": {"lr": 2e-3},
    "lr 3e-3": {"lr": 3e-3},
    "constant schedule": {"scheduler_type": "constant_with_warmup"},
    "linear schedule": {"scheduler_type": "linear"},
    "warm-up 20 %": {"warmup_steps": 0.2},
    "weight decay 0.1": {"weight_decay": 0.1},
    "beta2 0.95": {"adam_beta2": 0.95},
    "AdamW": {"optim": "adamw_torch_fused"},
    "AdamW, lr 5e-4": {"optim": "adamw_torch_fused", "lr": 5e-4},
    "AdamW, lr 2e-3": {"optim": "adamw_torch_fused", "lr": 2e-3},
    "random start": {"linear_start": False},
    "qwen3 layers": {"draft_arch": "qwen3"},
    "2 rows a step": {"gradient_accumulation_steps": 2},
    "window 128": {"sliding_window": 128},
    "64 anchors": {"max_anchors": 64},
    "128 anchors": {"max_anchors": 128},
}


def use_device(queue: Any) -> None:
    """In a worker, before torch is imported: take one of the devices."""
    os.environ["CUDA_VISIBLE_DEVICES"] = queue.get()


def run_cell(verifier: str, train: str, held_out: str, name: str, seed: int) -> dict[str, Any]:
    import torch

    from peagle_hf import HiddenStatesDataset, PeagleTrainer, PeagleTrainingArguments, start_linearly
    from peagle_hf.cli.parsing import flags, parse_arguments
    from peagle_hf.evaluation.acceptance import count, rates_by_position
    from peagle_hf.training.run import build_datasets, build_drafter

    torch._dynamo.config.recompile_limit = 64  # one process compiles for the sizes of many variants
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fields = {"verifier_name_or_path": verifier, "data_path": train, "save_path": folder, "seed": seed}
        args = parse_arguments(PeagleTrainingArguments, flags(fields | BASE | VARIANTS[name]))
        drafter = build_drafter(args)
        dataset, _ = build_datasets(args)
        if args.linear_start:
            start_linearly(drafter.to(args.device), dataset)
        trainer = PeagleTrainer(model=drafter, args=args, train_dataset=dataset)
        output = trainer.train()
    drafter.config.num_depths = DRAFTED
    dataset = HiddenStatesDataset(held_out, total_seq_len=BASE["total_seq_len"])
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=args.bf16):
        _, by_context, _ = count(drafter, trainer.distillation, dataset)
    reached, accepted = by_context.sum(0).tolist()
    return {
        "variant": name,
        "seed": seed,
        **rates_by_position(reached, accepted),
        "num_drafts": reached[0],
        "steps": output.global_step,
        "train_loss": output.training_loss,
        "seconds": time.monotonic() - started,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }


def run(options: argparse.Namespace) -> None:
    output = Path(options.output)
    done = {(cell["variant"], cell["seed"]) for cell in read(output)} if output.exists() else set()
    cells = [(name, seed) for seed in options.seeds for name in VARIANTS if re.search(options.only, name)]
    cells = [cell for cell in cells if cell not in done]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", options.devices).split(",")
    context = get_context("spawn")
    queue = context.Queue()
    for number in range(options.jobs):
        queue.put(visible[number % len(visible)])
    with ProcessPoolExecutor(options.jobs, context, use_device, (queue,)) as pool:
        running = {
            pool.submit(run_cell, options.verifier, options.train, options.held_out, *cell): cell for cell in cells
        }
        for finished in as_completed(running):
            if error := finished.exception():
                print(f"{running[finished]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            with open(output, "a") as file:
                file.write(json.dumps(finished.result()) + "\n")
            cell = finished.result()
            print(f"{cell['variant']}, seed {cell['seed']}: {cell['acceptance_length']:.4f}, {cell['seconds']:.0f} s")
            sys.stdout.flush()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(options: argparse.Namespace) -> None:
    """Mean and spread over seeds, and the difference to the base with its 95 % interval, paired by seed."""
    from peagle_hf.evaluation.intervals import student_t

    by_variant: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in read(Path(options.output)):
        by_variant.setdefault(cell["variant"], {})[cell["seed"]] = cell
    base = by_variant["base"]
    print("| choice | acceptance length | by position, % | to the base | |\n|---|---|---|---|---|")
    for name in VARIANTS:
        cells = by_variant.get(name, {})
        seeds = sorted(cells.keys() & base.keys())
        if len(seeds) < 2:
            continue
        lengths = [cells[seed]["acceptance_length"] for seed in seeds]
        rates = zip(*(cells[seed]["per_position_acceptance"] for seed in seeds), strict=True)
        positions = ", ".join(f"{100 * statistics.mean(rate):.1f}" for rate in rates)
        line = f"| {name} | {statistics.mean(lengths):.3f} ± {statistics.stdev(lengths):.3f} | {positions} |"
        if name == "base":
            print(f"{line} | |")
            continue
        gaps = [cells[seed]["acceptance_length"] - base[seed]["acceptance_length"] for seed in seeds]
        gap, half = statistics.mean(gaps), student_t(len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
        verdict = "no difference" if abs(gap) <= half else "better" if gap > 0 else "worse"
        print(f"{line} {gap:+.3f} ± {half:.3f} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    runner = stages.add_parser("run")
    for name in ("verifier", "train", "held_out", "output"):
        runner.add_argument(name)
    runner.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    runner.add_argument("--devices", default="", help="GPUs that the jobs share, such as 0,1")
    runner.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    runner.add_argument("--only", default="", help="variants whose name this regular expression finds")
    runner.set_defaults(stage=run)
    printer = stages.add_parser("table")
    printer.add_argument("output")
    printer.set_defaults(stage=table)
    options = parser.parse_args()
    options.stage(options)


if __name__ == "__main__":
    main()
