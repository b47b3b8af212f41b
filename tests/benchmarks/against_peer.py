"""Acceptance in real vLLM of drafters trained here and by speculators' own `train`, on the same data for as long.

    for seed in 0 1 2; do for who in ours peer; do
        python tests/benchmarks/against_peer.py train $who --verifier output/demo/verifier --data output/demo/data \\
            --output output/against_peer --seed $seed --steps 165
    done; done
    python tests/benchmarks/against_peer.py evaluate output/against_peer --verifier output/demo/verifier  # or generate
    python tests/benchmarks/against_peer.py table output/against_peer

`--data` is a folder of `peagle-hf prepare` with its hidden states in `hidden_states`. Both implementations train on the
same conversations of it and validate on the same, with the sizes, warm-up, schedule and length of the demo and whatever
else is their default; what follows `--` goes to the command line of the one that is trained. Each serves its own
`checkpoint_best`, whose weights are bfloat16. `train` needs speculators 0.9.0 for the peer, `evaluate` needs vLLM, the
others neither: the folder may move between machines. `generate` counts the same in transformers.
"""

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DRAFT_VOCAB, LENGTH = 8192, 1024
WARMUP, TRAIN_RATIO = 0.05, 0.95
LEARNING_RATES = {"ours": 2e-3, "peer": 1e-3}
"""Ours of the published figures, and speculators' default."""
PROMPTS = Path(__file__).parents[2] / "examples" / "data" / "eval_prompts.jsonl"
NAMES = {"ours": "peagle_hf", "peer": "speculators"}
FIGURES = ("steps", "loop_seconds", "seconds", "step_ms", "tokens")
SERVED_ALIKE = ("prompts", "num_prompts", "max_tokens", "dtype", "num_speculative_tokens", "device")
SERVED = ("acceptance_length", "per_position_acceptance", "text_identical")
TIMED_STEPS, UNTIMED_STEPS = 12, 8
"""So many steps of a trial run tell what a step takes, after those that warm up."""
LAST_STEPS = 10
"""The training loss is the mean over so many steps before the end."""
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""The 97.5 % point of Student's t by degrees of freedom."""


def train(options: argparse.Namespace) -> None:
    """Train one drafter anew into `<output>/<implementation>-<seed>`, and print what it took as a line of JSON."""
    folder = options.output / f"{options.implementation}-{options.seed}"
    steps = options.steps
    if options.minutes:
        with tempfile.TemporaryDirectory() as trial:
            tried = train_in_child(options, Path(trial), UNTIMED_STEPS + TIMED_STEPS)
        seconds = tried["step_ms"] / 1000
        steps = max(1, round((options.minutes * 60 - tried["start_seconds"]) / seconds))
        print(f"{seconds:.3f} s a step: {steps} steps in {options.minutes:g} minutes", file=sys.stderr)
    print(json.dumps(train_in_child(options, folder, steps)))


def train_in_child(options: argparse.Namespace, folder: Path, steps: int) -> dict:
    """Train in a process that knows its number of threads, and its device, before it imports anything."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    hidden = {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    passed = ("verifier", "seed", "layers", "depths", "threads", "workers", "device", "flags")
    job = {name: getattr(options, name) for name in passed}
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

    `loop_seconds` are the steps and what comes before the first, the linear start here (`start_seconds`); `step_ms` is
    the mean without the steps that warm up; `tokens` are positions trained on. The losses are each implementation's own
    and can't be compared: its validation runs on other rows.
    """
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    measured = (train_ours if implementation == "ours" else train_peer)(job)
    on_gpu = job["device"] == "cuda"
    result = {
        "implementation": implementation,
        "seed": job["seed"],
        "steps": len(measured.step_seconds),
        "start_seconds": round(measured.start_seconds, 2),
        "loop_seconds": round(measured.start_seconds + sum(measured.epoch_seconds), 2),
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
    """What a training run did, and how long its steps and its epochs took, without validation and saving."""

    def __init__(self, flags: list[str]):
        self.flags = flags
        self.tokens = 0
        self.start_seconds = 0.0
        self.step_seconds: list[float] = []
        self.epoch_seconds: list[float] = []
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def begin_epoch(self) -> None:
        self.began = self.previous = time.perf_counter()

    def end_step(self) -> None:
        now = time.perf_counter()
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
    from peagle_hf.training import run as training

    flags = [
        *("--verifier-name-or-path", job["verifier"], "--data-path", job["data"]),
        *("--save-path", f"{job['folder']}/checkpoints", "--seed", str(job["seed"])),
        *("--num-layers", str(job["layers"]), "--num-depths", str(job["depths"])),
        *("--draft-vocab-size", str(DRAFT_VOCAB)),
        *("--total-seq-len", str(LENGTH), "--train-data-ratio", str(TRAIN_RATIO), "--max-steps", str(job["steps"])),
        *("--lr", str(LEARNING_RATES["ours"]), "--scheduler-type", "cosine"),
        *("--warmup-steps", str(warmup_steps(job["steps"]))),
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

    start_linearly = training.start_linearly

    def timed_start(*arguments):
        began = time.perf_counter()
        start_linearly(*arguments)
        measured.start_seconds = time.perf_counter() - began

    # The command makes its own trainer, to which nothing else could be given.
    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    training.start_linearly = timed_start
    trainer = training.train(parse_arguments(PeagleTrainingArguments, flags))
    measured.tokens = trainer.state.num_input_tokens_seen
    measured.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    measured.validation_losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return measured


def train_peer(job: dict) -> Measured:
    """`speculators train`, on a folder of links in which our split is the one that it takes: the first rows train."""
    from speculators.train import cli
    from speculators.train.config import TrainConfig
    from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2

    from peagle_hf.data.prepared_dataset import column, load_prepared, split_rows

    train_rows, held_out = split_rows(job["data"], TRAIN_RATIO, job["seed"])
    data = Path(job["folder"]) / "data"
    link_rows(Path(job["data"]), data, train_rows + held_out)
    on_gpu = job["device"] == "cuda"
    flags = [
        *("--speculator-type", "peagle", "--verifier-name-or-path", job["verifier"], "--data-path", str(data)),
        *("--save-path", f"{job['folder']}/checkpoints", "--seed", str(job["seed"]), "--no-resume-from-checkpoint"),
        *("--num-layers", str(job["layers"]), "--num-depths", str(job["depths"])),
        *("--draft-vocab-size", str(DRAFT_VOCAB)),
        *("--total-seq-len", str(LENGTH), "--max-steps", str(job["steps"])),
        # Half a row is added, so that rounding down gives exactly this number.
        *("--train-data-ratio", str((len(train_rows) + 0.5) / len(train_rows + held_out))),
        *("--lr", str(LEARNING_RATES["peer"]), "--scheduler-type", "cosine"),
        *("--scheduler-warmup-steps", str(warmup_steps(job["steps"]))),
        *("--num-workers", str(job["workers"]), "--save-best", "--on-missing", "raise"),
        *("--hidden-states-dtype", "bfloat16" if on_gpu else "float32"),
        # The peer's default kernels need Triton.
        *([] if on_gpu else ["--draft-attn-impl", "sdpa", "--loss-implementation", "eager"]),
        *job["flags"],
    ]
    measured = Measured(flags)
    config = TrainConfig.resolve(flags)
    # After its last step the peer would take one more step in each further epoch, so it gets exactly as many epochs as
    # it needs.
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
    # The peer's clock waits for an accelerator.
    torch.accelerator.synchronize = lambda: None


def link_rows(source: Path, target: Path, rows: list[int]) -> None:
    """A prepared dataset of these rows, in this order, and links to their hidden states."""
    from peagle_hf.data.cache_storage import row_path
    from peagle_hf.data.prepared_dataset import load_prepared

    load_prepared(source).select(rows).with_format("torch").save_to_disk(target)
    states = target / "hidden_states"
    states.mkdir()
    for index, row in enumerate(rows):
        row_path(states, index).symlink_to(row_path(source / "hidden_states", row).resolve())
    (target / "token_freq.pt").symlink_to((source / "token_freq.pt").resolve())


def warmup_steps(steps: int) -> int:
    return math.ceil(steps * WARMUP)


def evaluate(options: argparse.Namespace) -> None:
    """Serve in vLLM all drafters of the output folder, beside one run without any; each folder gets its figures."""
    from peagle_hf.evaluation.benchmark import EvaluateArguments
    from peagle_hf.evaluation.benchmark import evaluate as evaluate_drafters

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folders = trained_folders(options.output)
    drafters = [str(best(folder)) for folder in folders]
    arguments = EvaluateArguments(
        model=drafters[0],
        compare=drafters[1:],
        verifier=options.verifier,
        suite=[str(options.prompts)],
        max_prompts=options.max_prompts,
        max_tokens=options.max_tokens,
        dtype="float32",
        output=str(options.output / "evaluation"),
    )
    report = evaluate_drafters(arguments)
    for folder, entry in zip(folders, [report, *report["others"]], strict=True):
        figures = {name: entry.get(name, report.get(name)) for name in (*SERVED_ALIKE, *SERVED)}
        (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")


def generate(options: argparse.Namespace) -> None:
    """Give each folder the figures of `evaluate`, of the first turns' answers, generated in one batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peagle_hf import PeagleForSpeculation, draft_and_verify

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.verifier, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [json.loads(line)["turns"][0] for line in options.prompts.read_text().splitlines()][: options.max_prompts]
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    verifier = AutoModelForCausalLM.from_pretrained(options.verifier, dtype=torch.float32).to(device).eval()
    settings = {**inputs, "max_new_tokens": options.max_tokens, "do_sample": False}
    expected = verifier.generate(**settings)
    for folder in trained_folders(options.output):
        drafter = PeagleForSpeculation.from_pretrained(best(folder), dtype=torch.float32).to(device).eval()
        output = verifier.generate(
            **settings, custom_generate=draft_and_verify, drafter=drafter, return_dict_in_generate=True
        )
        figures = {
            "prompts": f"first turns of {options.prompts.name}",
            "num_prompts": len(prompts),
            "max_tokens": options.max_tokens,
            "dtype": "float32",
            "num_speculative_tokens": drafter.config.num_depths,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "acceptance_length": output.acceptance_length,
            "per_position_acceptance": [count / output.num_drafts for count in output.accepted_by_position],
            "text_identical": torch.equal(output.sequences, expected),
        }
        (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")


def trained_folders(output: Path) -> list[Path]:
    folders = [path.parent for path in sorted(output.glob("*/training.json"))]
    return folders or sys.exit(f"No drafter was trained in {output}.")


def best(folder: Path) -> Path:
    return folder / "checkpoints" / "checkpoint_best"


def print_table(options: argparse.Namespace) -> None:
    """Print the comparison over the seeds that both have, and write it to `table.json`."""
    runs: dict[str, dict[int, dict]] = {"ours": {}, "peer": {}}
    for path in sorted(options.output.glob("*/training.json")):
        if not (path.parent / "evaluation.json").exists():
            continue
        training = json.loads(path.read_text())
        runs[training["implementation"]][training["seed"]] = {
            **{name: training[name] for name in FIGURES},
            "trained_on": training["device"],
            **json.loads((path.parent / "evaluation.json").read_text()),
        }
    seeds = sorted(runs["ours"].keys() & runs["peer"].keys())
    if not seeds:
        sys.exit(f"No seed in {options.output} was trained and evaluated with both implementations.")
    ours, peer = ([runs[implementation][seed] for seed in seeds] for implementation in ("ours", "peer"))
    for field in SERVED_ALIKE:
        values = {run[field] for run in ours + peer}
        if len(values) > 1:
            sys.exit(f"The runs in {options.output} can't be compared, because {field} differs: {values}.")
    devices = {run["trained_on"] for run in ours + peer}
    result = {"seeds": seeds, "trained_on": sorted(devices), "served_on": ours[0]["device"], **compare(ours, peer)}
    (options.output / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def compare(ours: list[dict], peer: list[dict]) -> dict:
    """Compare the runs of both, in the same order of seeds.

    Returns:
        Of each implementation the mean of every figure, and the standard deviation of those of acceptance; the ratio
        of the mean gains and by position the difference of acceptance, ours less the peer's, with their intervals.
    """
    result: dict = {}
    for implementation, runs in (("ours", ours), ("peer", peer)):
        result[implementation] = {name: statistics.fmean(run[name] for run in runs) for name in FIGURES}
        lengths = [run["acceptance_length"] for run in runs]
        result[implementation] |= {
            "acceptance_length": statistics.fmean(lengths),
            "acceptance_length_deviation": statistics.stdev(lengths) if len(lengths) > 1 else None,
            "acceptance_lengths": lengths,
            "per_position_acceptance": [
                statistics.fmean(rates) for rates in zip(*(run["per_position_acceptance"] for run in runs), strict=True)
            ],
            "text_identical": all(run["text_identical"] for run in runs),
        }
    gain, peer_gain = (result[implementation]["acceptance_length"] - 1 for implementation in ("ours", "peer"))
    if peer_gain > 0:
        ratio = gain / peer_gain
        # The error of a ratio of means, to first order: that of what is left of ours less the ratio times the peer's.
        left = [
            one["acceptance_length"] - 1 - ratio * (other["acceptance_length"] - 1) for one, other in pairs(ours, peer)
        ]
        result["gain_ratio"] = with_interval(ratio, [value / peer_gain for value in left])
    result["positions"] = []
    for position in range(len(ours[0]["per_position_acceptance"])):
        differences = [
            one["per_position_acceptance"][position] - other["per_position_acceptance"][position]
            for one, other in pairs(ours, peer)
        ]
        result["positions"].append(with_interval(statistics.fmean(differences), differences))
    return result


def pairs(ours: list[dict], peer: list[dict]) -> list[tuple[dict, dict]]:
    return list(zip(ours, peer, strict=True))


def with_interval(mean: float, values: list[float]) -> dict[str, float | None]:
    """A mean over seeds and its 95 % interval by Student's t, from values that scatter as it does; none of one seed."""
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T_95.get(len(values) - 1, T_95[max(T_95)]) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def markdown(result: dict) -> str:
    lines = [
        "| | steps | training loop, s | whole run, s | step, ms | positions seen | acceptance length |",
        "|---|---|---|---|---|---|---|",
    ]
    for implementation, name in NAMES.items():
        run = result[implementation]
        deviation = run["acceptance_length_deviation"]
        scatter = "" if deviation is None else f" ± {deviation:.3f}"
        lines.append(
            f"| {name} | {run['steps']:.0f} | {run['loop_seconds']:.0f} | {run['seconds']:.0f} | {run['step_ms']:.0f} "
            f"| {run['tokens']:,.0f} | {run['acceptance_length']:.3f}{scatter} |"
        )
    lines += [
        "",
        "| position | peagle_hf | speculators | difference, points | 95 % interval | |",
        "|---|---|---|---|---|---|",
    ]
    rates = [result[implementation]["per_position_acceptance"] for implementation in NAMES]
    for place, (ours, peer, difference) in enumerate(zip(*rates, result["positions"], strict=True), 1):
        low, high = difference["low"], difference["high"]
        interval = "" if low is None else f"{100 * low:+.2f} to {100 * high:+.2f}"
        verdict = "" if low is None or low <= 0 <= high else "above" if low > 0 else "below"
        lines.append(
            f"| {place} | {ours:.2%} | {peer:.2%} | {100 * difference['mean']:+.2f} | {interval} | {verdict} |"
        )
    ratio = result.get("gain_ratio")
    if ratio is None:
        sentence = "speculators' drafters gain nothing, so there is no ratio"
    else:
        sentence = f"gain (acceptance length - 1) to speculators': {ratio['mean']:.2f}"
        if ratio["low"] is not None:
            sentence += f", 95 % interval over the seeds {ratio['low']:.2f} to {ratio['high']:.2f}"
    seeds = ", ".join(map(str, result["seeds"]))
    return "\n".join([*lines, "", f"Seeds {seeds}; ± is the standard deviation over them; {sentence}."])


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
    one.add_argument("--layers", type=int, default=2)
    one.add_argument("--depths", type=int, default=4)
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--workers", type=int, default=0, help="loader processes")
    one.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, purpose in (("evaluate", "serve the drafters in vLLM"), ("generate", "draft and verify in transformers")):
        measured = commands.add_parser(name, help=purpose)
        measured.add_argument("output", type=Path)
        measured.add_argument("--verifier", required=True)
        measured.add_argument("--prompts", type=Path, default=PROMPTS)
        measured.add_argument("--max-prompts", type=int)
        measured.add_argument("--max-tokens", type=int, default=128)
    table = commands.add_parser("table", help="compare what was measured")
    table.add_argument("output", type=Path)
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
    else:
        {"evaluate": evaluate, "generate": generate, "table": print_table}[options.command](options)


if __name__ == "__main__":
    main()
