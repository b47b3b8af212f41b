"""Acceptance in real vLLM of drafters trained here and by speculators' own `train`, on the same data for as long.

    for seed in 0 1 2; do for who in ours peer; do
        python tests/benchmarks/against_peer.py train $who --verifier output/demo/verifier --data output/demo/data \\
            --output output/against_peer --seed $seed --steps 165
    done; done
    python tests/benchmarks/against_peer.py evaluate output/against_peer --verifier output/demo/verifier
    python tests/benchmarks/against_peer.py table output/against_peer

`--data` is a folder of `peagle-hf prepare` with its hidden states in `hidden_states`. Both implementations train on the
same conversations of it and validate on the same, with the sizes, learning rate, warm-up, schedule and length of the
demo and whatever else is their default; what follows `--` goes to the command line of the one that is trained. Each
serves its own `checkpoint_best`, whose weights are bfloat16. `train` needs speculators 0.9.0 for the peer, `evaluate`
needs vLLM, `table` neither: the folder may move between machines.
"""

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, DEPTHS, DRAFT_VOCAB, LENGTH = 2, 4, 8192, 1024
LEARNING_RATE, WARMUP, TRAIN_RATIO = 1e-3, 0.05, 0.95
TIMED_STEPS, UNTIMED_STEPS = 12, 4
"""How many steps of a trial run tell what a step takes, after those that warm up."""
LAST_STEPS = 10
"""The training loss is the mean over so many steps before the end."""
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5 % point of Student's t by degrees of freedom."""


def train(options: argparse.Namespace) -> None:
    """Train one drafter into `<output>/<implementation>-<seed>`, and print what it took as a line of JSON."""
    folder = options.output / f"{options.implementation}-{options.seed}"
    steps = options.steps
    if options.minutes:
        with tempfile.TemporaryDirectory() as trial:
            seconds = train_in_child(options, Path(trial), UNTIMED_STEPS + TIMED_STEPS)["step_ms"] / 1000
        steps = max(1, round(options.minutes * 60 / seconds))
        print(f"{seconds:.3f} s a step: {steps} steps in {options.minutes:g} minutes", file=sys.stderr)
    print(json.dumps(train_in_child(options, folder, steps)))


def train_in_child(options: argparse.Namespace, folder: Path, steps: int) -> dict:
    """Train in a process that knows its number of threads, and its device, before it imports anything."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    hidden = {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    job = {name: getattr(options, name) for name in ("verifier", "seed", "threads", "workers", "device", "flags")}
    job |= {"data": str(options.data), "folder": str(folder), "steps": steps}
    command = [sys.executable, __file__, "child", options.implementation, json.dumps(job)]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | threads | hidden, stdout=sys.stderr)
    result = json.loads((folder / "training.json").read_text())
    result["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def run_child(implementation: str, job: dict) -> None:
    """Train and write `training.json` into the job's folder.

    `loop_seconds` are the steps alone; `step_ms` is the mean without the steps that warm up; `tokens` are positions
    trained on. The losses are each implementation's own and can't be compared: its validation runs on other rows.
    """
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    measured = (train_ours if implementation == "ours" else train_peer)(job)
    on_gpu = job["device"] == "cuda"
    result = {
        "implementation": implementation,
        "seed": job["seed"],
        "steps": len(measured.step_ends),
        "loop_seconds": round(sum(measured.epoch_seconds), 2),
        "step_ms": round(measured.step_ms(), 1),
        "tokens": measured.tokens,
        "train_loss": statistics.fmean(measured.losses[-LAST_STEPS:]),
        "validation_loss": measured.validation_losses[-1],
        "validation_losses": measured.validation_losses,
        "flags": measured.flags,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (Path(job["folder"]) / "training.json").write_text(json.dumps(result, indent=1) + "\n")


class Measured:
    """What a training run did: when its steps ended, by epoch, how long its epochs took without what follows them."""

    def __init__(self, flags: list[str]):
        self.flags = flags
        self.tokens = 0
        self.step_ends: list[float] = []
        self.step_seconds: list[float] = []
        self.epoch_seconds: list[float] = []
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def begin_epoch(self) -> None:
        self.began = self.previous = time.perf_counter()

    def end_step(self) -> None:
        now = time.perf_counter()
        self.step_ends.append(now)
        self.step_seconds.append(now - self.previous)
        self.previous = now

    def end_epoch(self) -> None:
        self.epoch_seconds.append(time.perf_counter() - self.began)

    def step_ms(self) -> float:
        return 1000 * statistics.fmean(self.step_seconds[UNTIMED_STEPS:] or self.step_seconds)


def train_ours(job: dict) -> Measured:
    """`peagle-hf train`."""
    import transformers
    from transformers import TrainerCallback

    from peagle_hf import PeagleTrainingArguments, parse_arguments
    from peagle_hf.training import train

    flags = [
        *("--verifier-name-or-path", job["verifier"], "--data-path", job["data"]),
        *("--save-path", f"{job['folder']}/checkpoints", "--seed", str(job["seed"])),
        *("--num-layers", str(LAYERS), "--num-depths", str(DEPTHS), "--draft-vocab-size", str(DRAFT_VOCAB)),
        *("--total-seq-len", str(LENGTH), "--train-data-ratio", str(TRAIN_RATIO), "--max-steps", str(job["steps"])),
        *("--lr", str(LEARNING_RATE), "--scheduler-type", "cosine", "--warmup-steps", str(warmup_steps(job["steps"]))),
        *("--dataloader-num-workers", str(job["workers"]), "--save-total-limit", "1", "--no-resume"),
        *("--logging-steps", "1", "--include-num-input-tokens-seen", "true", "--report-to", "none"),
        *job["flags"],
    ]
    measured = Measured(flags)

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            measured.begin_epoch()

        def on_step_end(self, args, state, control, **kwargs):
            measured.end_step()

        def on_epoch_end(self, args, state, control, **kwargs):
            measured.end_epoch()

    # The command makes its own trainer, to which nothing else could be given.
    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    trainer = train(parse_arguments(PeagleTrainingArguments, flags))
    measured.tokens = trainer.state.num_input_tokens_seen
    measured.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    measured.validation_losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return measured


def train_peer(job: dict) -> Measured:
    """`speculators train`, on a folder of links in which our split is the one that it takes: the first rows train."""
    from speculators.train import cli
    from speculators.train.config import TrainConfig
    from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2

    from peagle_hf.data.dataset import column, load_prepared, split_rows

    train_rows, held_out = split_rows(job["data"], TRAIN_RATIO, job["seed"])
    data = Path(job["folder"]) / "data"
    link_rows(Path(job["data"]), data, train_rows + held_out)
    on_gpu = job["device"] == "cuda"
    flags = [
        *("--speculator-type", "peagle", "--verifier-name-or-path", job["verifier"], "--data-path", str(data)),
        *("--save-path", f"{job['folder']}/checkpoints", "--seed", str(job["seed"]), "--no-resume-from-checkpoint"),
        *("--num-layers", str(LAYERS), "--num-depths", str(DEPTHS), "--draft-vocab-size", str(DRAFT_VOCAB)),
        *("--total-seq-len", str(LENGTH), "--max-steps", str(job["steps"])),
        # Half a row more, so that rounding down gives the very number.
        *("--train-data-ratio", str((len(train_rows) + 0.5) / len(train_rows + held_out))),
        *("--lr", str(LEARNING_RATE), "--scheduler-type", "cosine"),
        *("--scheduler-warmup-steps", str(warmup_steps(job["steps"]))),
        *("--num-workers", str(job["workers"]), "--save-best", "--on-missing", "raise"),
        *("--hidden-states-dtype", "bfloat16" if on_gpu else "float32"),
        # Its defaults are made of Triton.
        *([] if on_gpu else ["--draft-attn-impl", "sdpa", "--loss-implementation", "eager"]),
        *job["flags"],
    ]
    measured = Measured(flags)
    config = TrainConfig.resolve(flags)
    # It would go on with one step in each epoch after the last step: there must be just enough epochs.
    lengths = column(load_prepared(data), "seq_len")[: len(train_rows)]
    sampler = MultipackDistributedBatchSamplerV2(config.data.total_seq_len, lengths, 1, 0, seed=config.seed)
    epochs, steps = 0, 0
    while steps < job["steps"]:
        sampler.set_epoch(epochs)
        steps += len(sampler)
        epochs += 1
    config.trainer.epochs = epochs

    class Reader(logging.Handler):
        """Reads the metrics that are logged after each step and each validation."""

        def emit(self, record: logging.LogRecord) -> None:
            if not isinstance(record.msg, dict):
                return
            if "train" in record.msg:
                measured.end_step()
                measured.losses.append(record.msg["train"]["loss"])
                profile = record.msg["profile"]
                measured.tokens += round(profile["tokens_per_s"] * profile["step_ms"] / 1000)
            if "val" in record.msg:
                measured.validation_losses.append(record.msg["val"]["loss_epoch"])

    logging.getLogger().addHandler(Reader())
    train_epoch = cli.Trainer.train_epoch

    def timed_epoch(*arguments, **options):
        measured.begin_epoch()
        train_epoch(*arguments, **options)
        measured.end_epoch()

    cli.Trainer.train_epoch = timed_epoch
    fit_peer(on_gpu)
    cli.main(config)
    return measured


def fit_peer(on_gpu: bool) -> None:
    """What speculators 0.9.0 needs to run here; none of it changes a number."""
    import torch
    from speculators.train import trainer
    from training_step import make_peer_compile

    if on_gpu:
        make_peer_compile()
        return
    # It would move the model and the batches to device 0 of an accelerator. Autocast, for one too, switches itself off.
    trainer.get_local_rank = lambda: "cpu"
    # Its clock waits for the accelerator.
    torch.accelerator.synchronize = lambda: None


def link_rows(source: Path, target: Path, rows: list[int]) -> None:
    """A prepared dataset of these rows, in this order, and links to their hidden states."""
    from peagle_hf.data.cache import row_path
    from peagle_hf.data.dataset import load_prepared

    load_prepared(source).select(rows).with_format("torch").save_to_disk(target)
    states = target / "hidden_states"
    states.mkdir()
    for index, row in enumerate(rows):
        row_path(states, index).symlink_to(row_path(source / "hidden_states", row).resolve())
    (target / "token_freq.pt").symlink_to((source / "token_freq.pt").resolve())


def warmup_steps(steps: int) -> int:
    return math.ceil(steps * WARMUP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one drafter")
    one.add_argument("implementation", choices=["ours", "peer"])
    one.add_argument("--verifier", required=True)
    one.add_argument("--data", type=Path, required=True, help="prepared data with hidden_states in it")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--seed", type=int, default=0)
    how_long = one.add_mutually_exclusive_group(required=True)
    how_long.add_argument("--steps", type=int)
    how_long.add_argument("--minutes", type=float, help="as many steps as this takes, by a short trial before")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--workers", type=int, default=0, help="loader processes")
    one.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    child = commands.add_parser("child")
    child.add_argument("implementation")
    child.add_argument("job", type=json.loads)

    arguments, flags = sys.argv[1:], []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, flags = arguments[:place], arguments[place + 1 :]
    options = parser.parse_args(arguments)
    if options.command == "child":
        run_child(options.implementation, options.job)
    elif options.command == "train":
        options.flags = flags
        train(options)


if __name__ == "__main__":
    main()
