"""What moves acceptance in longer trainings: jobs on one GPU, chosen on one set of prompts and reported on another.

    python tests/benchmarks/long_run.py data VERIFIER INVENTED.jsonl.gz FOLDER
    python tests/benchmarks/long_run.py add FOLDER '{"name": "r 0.9", "seeds": [0, 1], "down_sample_ratio": 0.9}' …
    python tests/benchmarks/long_run.py work FOLDER [--jobs 12] [--until-empty]
    python tests/benchmarks/long_run.py table FOLDER
    python tests/benchmarks/long_run.py test FOLDER NAME …

`data` prepares the chats (the demo's and the invented ones, without 160 of these, drawn by `SELECTION_SEED`, which are
the selection set), the verifier's greedy answers to examples/data/test_prompts.jsonl, and the verifier's states of
several choices of layers. `work` runs jobs as they are added. A job is one training; its result is the acceptance
length on the selection set, from cached states, of its last weights and of their moving average. `test` measures named
jobs once on the test prompts. Needs a GPU.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from peagle_hf import HiddenStatesDataset, PeagleTrainer, PeagleTrainingArguments, start_linearly
from peagle_hf.cli.parsing import flags, parse_arguments
from peagle_hf.evaluation.acceptance import count, rates_by_position
from peagle_hf.training import objective as objectives
from peagle_hf.training.losses import survival_weights
from peagle_hf.training.objective import Objective, load_head
from peagle_hf.training.run import build_drafter

BASE: dict[str, Any] = {
    "num_layers": 4,
    "num_depths": 6,
    "draft_vocab_size": 8192,
    "total_seq_len": 2048,
    "epochs": 2,
    "lr": 2e-3,
    "warmup_steps": 0.05,
    "train_data_ratio": 1.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 100,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
}
STORED = ("--storage", "learnt", "--target-layer-ids")
LAYERS = {"states": [2, 15, 27], "late": [20, 25, 29], "five": [2, 8, 15, 21, 27]}
PUBLISHED = {"draft_arch": "llama", "weight_decay": 0.0}
"""Settings of the table of longer trainings that aren't the defaults."""
OWN_FIELDS = ("name", "states", "normed", "divide", "starts")
"""Of a job; the others are training arguments."""
SELECTION_SEED, NUM_SELECTION = 24, 160
EMA_DECAY = 0.995
EXAMPLES = Path(__file__).parents[2] / "examples"


def data(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    prepare_text(options.verifier, options.invented, folder)
    waited = [
        extract(folder, name, "--output", str(folder / name / layers), *STORED, *map(str, ids))
        for layers, ids in LAYERS.items()
        for name in ("train", "selected", "tested")
    ]
    if any(process.wait() for process in waited):
        raise SystemExit("The extraction failed.")


def prepare_text(verifier: str, invented: str, folder: Path) -> None:
    """The prepared datasets train, selected and tested in `folder`; generates the answers to the test prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(invented, "rt") as file:
        chats = file.readlines()
    chosen = set(random.Random(SELECTION_SEED).sample(range(len(chats)), NUM_SELECTION))
    for name, wanted in (("invented", False), ("selection", True)):
        lines = [chat for number, chat in enumerate(chats) if (number in chosen) == wanted]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "verifier.txt").write_text(str(Path(verifier).absolute()))

    def call(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "peagle_hf", *arguments], check=True)

    def prepare(name: str, *sources: Path) -> None:
        files = [str(source) for source in sources]
        target = ("--model", verifier, "--output", str(folder / name), "--seq-length", "2046")
        call("prepare", *target, "--data", *files)

    prepare("train", EXAMPLES / "data/train_chats.jsonl", folder / "invented.jsonl")
    prepare("selected", folder / "selection.jsonl")
    test = ("--prompts", str(EXAMPLES / "data/test_prompts.jsonl"), "--output", str(folder / "test.jsonl"))
    answers = ("--max-new-tokens", "128", "--min-answer-tokens", "0", "--max-repetition", "1", "--dtype", "float32")
    call("regenerate", "--model", verifier, *test, *answers, "--batch-size", "160")
    prepare("tested", folder / "test.jsonl")


def extract(folder: Path, name: str, *flags: str) -> subprocess.Popen[bytes]:
    """Start caching the verifier's states of one of the datasets."""
    where = ["--model", (folder / "verifier.txt").read_text(), "--data-path", str(folder / name)]
    return subprocess.Popen([sys.executable, "-m", "peagle_hf", "extract", *where, *flags])


def saved(folder: Path, job: dict[str, Any]) -> Path:
    return folder / "drafters" / f"{job['name']} {job['seed']}.pt".replace("/", "-")


def add(options: argparse.Namespace) -> None:
    queue = Path(options.folder) / "queue"
    queue.mkdir(exist_ok=True)
    for text in options.jobs:
        job = json.loads(text)
        for seed in job.pop("seeds", [0]):
            path = queue / f"{time.time_ns()}.json"  # the names sort jobs by the time when they were added
            path.with_suffix(".tmp").write_text(json.dumps(job | {"seed": seed}))
            path.with_suffix(".tmp").rename(path)


def build(folder: Path, job: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The training arguments, the drafter before training and the class of its datasets."""
    fields = {name: value for name, value in job.items() if name not in OWN_FIELDS}
    fields |= {"verifier_name_or_path": (folder / "verifier.txt").read_text(), "data_path": str(folder / "train")}
    fields |= {"hidden_states_path": str(folder / "train" / job.get("states", "states"))}
    fields |= {"save_path": str(folder / "output" / saved(folder, job).stem)}
    args = parse_arguments(PeagleTrainingArguments, flags(BASE | PUBLISHED | fields))
    return args, build_drafter(args), NormedStates if job.get("normed") else HiddenStatesDataset


class NormedStates(HiddenStatesDataset):
    """A dataset whose auxiliary states are each divided by their root mean square."""

    def _load_sample(self, row: int, generated: Any = None) -> dict[str, Any]:
        sample = super()._load_sample(row, generated)
        states, size = sample["hidden_states"], sample["target_states"].shape[-1]
        normed = F.rms_norm(states.float().unflatten(-1, (-1, size)), (size,))
        return sample | {"hidden_states": normed.flatten(-2).to(states.dtype)}


def set_weights(job: dict[str, Any]) -> None:
    """Other slot weights than the library's, if the job asks for them."""

    def weights(chance: Any, anchors: Any, depths: Any, num_positions: int, num_depths: int, alpha: float) -> Any:
        sizes = num_positions, num_depths
        weight = survival_weights(chance, anchors, depths, *sizes, alpha)
        if job.get("starts"):
            weight = weight * start_chances(chance, anchors, depths, *sizes) ** job["starts"]
        if job.get("divide") == "rollout":
            total, rows = weight.new_zeros(2, num_positions)
            total, rows = total.index_add(0, anchors, weight), rows.index_add(0, anchors, torch.ones_like(weight))
            weight = weight * (rows / total)[anchors]
        return weight / weight.mean() if job.get("divide") == "step" or job.get("starts") else weight

    objectives.survival_weights = weights  # type: ignore[assignment]


def start_chances(chance: Any, anchors: Any, depths: Any, num_positions: int, num_depths: int) -> Any:
    """The probability that decoding starts a draft at each row's anchor, divided by its mean, [N].

    A draft at position i is followed by one at i + k + 1 if k of its tokens are accepted. Where COD dropped a depth,
    the mean acceptance at that depth stands in. From equal chances 20 rounds come close to where they settle.
    """
    grid = chance.new_zeros(num_positions, num_depths)
    kept = torch.zeros_like(grid)
    grid[anchors, depths], kept[anchors, depths] = chance, 1
    grid = torch.where(kept > 0, grid, grid.sum(0) / kept.sum(0).clamp(min=1))
    reached = torch.cat([torch.ones_like(grid[:, :1]), grid.cumprod(1)], dim=1)
    ends = torch.cat([reached[:, :-1] * (1 - grid), reached[:, -1:]], dim=1)
    learnt = kept[:, 0]
    first = learnt * (1 - torch.cat([learnt.new_zeros(1), learnt[:-1]]))
    starts = learnt.clone()
    for _ in range(20):
        going = starts[:, None] * ends
        arriving = torch.zeros_like(starts)
        for accepted in range(num_depths + 1):
            arriving[accepted + 1 :] += going[: -accepted - 1, accepted]
        starts = torch.where(first > 0, 1.0, arriving * learnt)
    weight = torch.where(learnt > 0, starts, starts.sum() / learnt.sum().clamp(min=1))[anchors]
    return weight / weight.mean().clamp_min(1e-6)


def measure(folder: Path, job: dict[str, Any], drafter: Any, dataset_class: Any, name: str) -> dict[str, Any]:
    states = folder / name / job.get("states", "states")
    dataset = dataset_class(folder / name, states, total_seq_len=BASE["total_seq_len"])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, by_context, _ = count(drafter, Objective(drafter, load_head(drafter)), dataset)
    reached, accepted = by_context.sum(0).tolist()
    rates = rates_by_position(reached, accepted)
    names = {
        "length": "acceptance_length",
        "rates": "per_position_acceptance",
        "conditional": "conditional_acceptance",
    }
    return {ours: rates[name] for ours, name in names.items()} | {"drafts": reached[0]}


def run_job(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    class Average(TrainerCallback):
        """A moving average of the trained weights."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            if state.global_step == 1:
                self.average = [weight.detach().clone() for weight in weights]
            decay = min(EMA_DECAY, state.global_step / (state.global_step + 9))
            torch._foreach_lerp_(self.average, weights, 1 - decay)

    started = time.monotonic()
    args, drafter, dataset_class = build(folder, job)
    set_weights(job)
    dataset = dataset_class(folder / "train", args.hidden_states_path, args.total_seq_len, seed=args.seed)
    start_linearly(drafter.to(args.device), dataset)
    average = Average()
    trainer = PeagleTrainer(model=drafter, args=args, train_dataset=dataset, callbacks=[average])
    begun = time.monotonic()
    output = trainer.train()
    seconds = time.monotonic() - begun
    result = job | {"steps": output.global_step, "train_loss": output.training_loss, "train_seconds": seconds}
    result |= measure(folder, job, drafter, dataset_class, "selected")
    saved(folder, job).parent.mkdir(exist_ok=True)
    torch.save(drafter.state_dict(), saved(folder, job))
    with torch.no_grad():
        for weight, mean in zip((w for w in drafter.parameters() if w.requires_grad), average.average, strict=True):
            weight.copy_(mean)
    result["average"] = measure(folder, job, drafter, dataset_class, "selected")
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    result["grad_norm"] = statistics.median(norms) if norms else None
    peak = torch.cuda.max_memory_allocated() / 2**30
    return result | {"seconds": time.monotonic() - started, "peak_gib": peak, "device": torch.cuda.get_device_name()}


def worker(folder: str, until_empty: bool) -> None:
    """Take jobs one after another, the oldest first."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one process compiles for the sizes of many jobs
    queue, results = Path(folder) / "queue", Path(folder) / "results"
    while True:
        for path in sorted(queue.glob("*.json")):
            taken = path.with_suffix(f".taken{os.getpid()}")
            try:
                path.rename(taken)
            except OSError:
                continue
            job = json.loads(taken.read_text())
            try:
                result = run_job(Path(folder), job)
            except Exception:
                result = job | {"error": traceback.format_exc()[-1500:]}
            if "CUDA error" in result.get("error", ""):  # after such an error this process can run nothing
                taken.rename(path)
                os._exit(1)
            (results / f"{path.stem}.json").write_text(json.dumps(result))
            break
        else:
            if until_empty:
                return
            time.sleep(1)


def work(options: argparse.Namespace) -> None:
    """Keep so many workers going; one that ended by an error of the GPU is replaced, and its job runs again."""
    (Path(options.folder) / "results").mkdir(exist_ok=True)
    context = get_context("spawn")

    def start() -> Any:
        process = context.Process(target=worker, args=(options.folder, options.until_empty))
        process.start()
        return process

    workers = [start()]
    time.sleep(20)  # the first one compiles for all
    workers += [start() for _ in range(options.jobs - 1)]
    while any(process.exitcode != 0 for process in workers):
        workers = [start() if process.exitcode else process for process in workers]
        time.sleep(1)


def read(folder: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((Path(folder) / "results").glob("*.json"))]


def table(options: argparse.Namespace) -> None:
    """The mean over seeds of each job, of its last weights and of their average, and conditional acceptance."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in read(options.folder):
        if "error" in result:
            print(f"FAILED {result['name']}: {result['error'].strip().splitlines()[-1]}")
        else:
            by_name.setdefault(result["name"], []).append(result)
    print("| choice | seeds | acceptance length | of the average | conditional acceptance by position, % | steps |")
    print("|---|---|---|---|---|---|")
    for name, results in by_name.items():
        lengths = ", ".join(f"{result['length']:.3f}" for result in results)
        average = statistics.mean(result["average"]["length"] for result in results)
        columns = zip(*(result["conditional"] for result in results), strict=True)
        conditional = ", ".join(f"{100 * statistics.mean(column):.1f}" for column in columns)
        seeds = ", ".join(str(result["seed"]) for result in results)
        print(f"| {name} | {seeds} | {lengths} | {average:.3f} | {conditional} | {results[0]['steps']} |")


def test(options: argparse.Namespace) -> None:
    folder = Path(options.folder)
    for result in read(options.folder):
        if result["name"] not in options.names or "error" in result:
            continue
        measured = ("length", "rates", "conditional", "drafts", "average", "error")
        computed = ("steps", "train_loss", "train_seconds", "grad_norm", "seconds", "peak_gib", "device")
        job = {name: value for name, value in result.items() if name not in (*measured, *computed)}
        _, drafter, dataset_class = build(folder, job)
        drafter.load_state_dict(torch.load(saved(folder, job), weights_only=True))
        drafter.to("cuda").set_attn_implementation("flex_attention")
        print(json.dumps(job | measure(folder, job, drafter, dataset_class, "tested")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    for function, names in ((data, ("verifier", "invented")), (add, ()), (work, ()), (table, ()), (test, ())):
        stage = stages.add_parser(function.__name__)
        for name in names:
            stage.add_argument(name)
        stage.add_argument("folder")
        stage.set_defaults(stage=function)
        if function is add:
            stage.add_argument("jobs", nargs="+", help="JSON: a name, seeds, and training arguments")
        if function is work:
            stage.add_argument("--jobs", type=int, default=12, help="trainings at a time")
            stage.add_argument("--until-empty", action="store_true")
        if function is test:
            stage.add_argument("names", nargs="+")
    options = parser.parse_args()
    options.stage(options)


if __name__ == "__main__":
    main()
