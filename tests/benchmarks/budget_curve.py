"""What a budget buys: acceptance length against tokens trained on, of drafters trained here and by speculators.

    python tests/benchmarks/budget_curve.py data VERIFIER INVENTED.jsonl.gz FOLDER   # prepares text; needs no GPU
    python tests/benchmarks/budget_curve.py states FOLDER                            # caches the verifier's states
    python tests/benchmarks/budget_curve.py run FOLDER                               # trains on all GPUs
    python tests/benchmarks/budget_curve.py serve FOLDER NAME …                      # of FOLDER/drafters, in vLLM
    python tests/benchmarks/budget_curve.py collect FOLDER docs/data/budget_curve.jsonl

budget_figures.py makes tables and a picture of the results.

`run` trains with each learning rate of RATES once for SEARCH_STEPS and takes for each implementation the rate that is
best on the selection prompts; with it, it trains every number of steps with every seed. The longest trainings start at
once with all rates, and those with another rate than the best are ended when it is known. Each training is a process of
its own, on the rows of one cache; its last weights are measured from cached states, in float32, on the selection and
the test prompts. What fails is tried again. An interrupted `run` goes on with the trainings that have no result yet;
the file `long_steps` in the folder shortens the longest trainings, which then start anew. Needs speculators 0.9.0.
`run --jobs FILE` runs other trainings; `late_loss` in a line is the loss of ours in the last third of the steps.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from against_peer import fit_peer, link_rows, warmup_steps
from budget_figures import NAMES, RATES, SEARCH_STEPS, Job, best_rate
from long_run import BASE, EXAMPLES, PUBLISHED, extract, prepare_text

SEEDS = {165: (0, 1, 2), 500: (0, 1, 2), 2000: (0, 1, 2)}
"""Seeds by the number of steps; those of the longest training are LONG_SEEDS."""
LONG_STEPS, LONG_SEEDS = 10000, (0, 1)
BESIDE: tuple[Job, ...] = (
    {"who": "peer", "rate": 3e-3, "steps": 2000, "seed": 0, "flags": {"max_anchors": 2048}},
    {"who": "peer", "rate": 3e-3, "steps": 10000, "seed": 0, "flags": {"max_anchors": 2048}},
    {"who": "ours", "rate": 2e-3, "steps": 10000, "seed": 0, "flags": PUBLISHED | {"down_sample_ratio": 1.0}},
    {"who": "peer", "rate": 4e-3, "steps": 2000, "seed": 0},
    {"who": "ours", "rate": 3e-3, "steps": 165, "seed": 0},
    {"who": "ours", "rate": 4e-3, "steps": 165, "seed": 0},
    {"who": "peer", "rate": 1e-3, "steps": 165, "seed": 0},
    {"who": "peer", "rate": 4e-3, "steps": 165, "seed": 0},
)
"""Trainings beside the curve. Speculators starts rollouts at 512 positions of a packed sequence; 2,048 are all."""
TEST_PROMPTS = EXAMPLES / "data/test_prompts.jsonl"
RECIPE = ("num_layers", "num_depths", "draft_vocab_size", "total_seq_len")
ATTEMPTS = 3


def name_of(job: Job) -> str:
    others = job.get("flags", {}) | ({"late_loss": job["late_loss"]} if "late_loss" in job else {})
    flags = "".join(f"-{name}{value}" for name, value in others.items())
    return f"{job['who']}-lr{job['rate']:g}-steps{job['steps']}-seed{job['seed']}{flags}"


def data(options: argparse.Namespace) -> None:
    prepare_text(options.verifier, options.invented, Path(options.folder))


def states(options: argparse.Namespace) -> None:
    """Cache the states of the three datasets; of the training rows every GPU makes a share."""
    folder, names = Path(options.folder), gpu_names()
    shares, waited = len(names), []
    for rank, name in enumerate(names):
        os.environ["CUDA_VISIBLE_DEVICES"] = name
        waited.append(extract(folder, "train", "--rank", str(rank), "--world-size", str(shares)))
    waited += [extract(folder, name) for name in ("selected", "tested")]
    if any(process.wait() for process in waited):
        raise SystemExit("The extraction failed.")


def gpu_names() -> list[str]:
    """For each GPU what CUDA_VISIBLE_DEVICES must be, so that a process has it alone; one name without a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(gpu) for gpu in range(max(1, torch.cuda.device_count()))]


class Clock:
    """When the steps of a training ended; says in a file how far it is."""

    def __init__(self, progress: Path):
        self.progress, self.times = progress, [time.monotonic()]

    def step(self) -> None:
        self.times.append(time.monotonic())
        if len(self.times) % 50 == 1:
            seconds = self.times[-1] - self.times[-51]
            self.progress.write_text(f"step {len(self.times) - 1}, {20 * seconds:.0f} ms a step")

    def figures(self) -> dict[str, float]:
        steps = [1000 * (after - before) for before, after in zip(self.times, self.times[1:], strict=False)]
        return {"train_seconds": round(self.times[-1] - self.times[0], 1), "step_ms": statistics.median(steps)}


def train_ours(folder: Path, job: Job, drafter_folder: Path, clock: Clock) -> dict[str, Any]:
    from transformers import TrainerCallback

    from peagle_hf import HiddenStatesDataset, PeagleTrainer, PeagleTrainingArguments, start_linearly
    from peagle_hf.cli.parsing import flags, parse_arguments
    from peagle_hf.training.losses import parse_loss
    from peagle_hf.training.run import build_drafter

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *arguments: Any, **options: Any) -> None:
            clock.step()
            if job.get("late_loss") and state.global_step == 2 * job["steps"] // 3:
                trainer.distillation.loss_weights = parse_loss(job["late_loss"])

    fields = BASE | {"lr": job["rate"], "max_steps": job["steps"], "seed": job["seed"]}
    fields |= {"verifier_name_or_path": (folder / "verifier.txt").read_text(), "data_path": str(folder / "train")}
    fields |= {"save_path": str(folder / "work" / name_of(job)), "warmup_steps": warmup_steps(job["steps"])}
    fields |= job.get("flags", {})
    args = parse_arguments(PeagleTrainingArguments, flags(fields))
    drafter = build_drafter(args)
    dataset = HiddenStatesDataset(folder / "train", None, args.total_seq_len, seed=args.seed)
    start_linearly(drafter.to(args.device), dataset)
    trainer = PeagleTrainer(model=drafter, args=args, train_dataset=dataset, callbacks=[Steps()])
    trainer.train()
    drafter.to(torch.bfloat16).save_pretrained(drafter_folder)
    lengths, share = dataset.data["seq_len"], job["steps"] / len(dataset)
    positions = sum(min(int(lengths[row]) - 2, args.total_seq_len) for rows in dataset.plan for row in rows)
    learnt = sum(dataset.num_learnt(number) for number in range(len(dataset)))
    return {"positions": round(positions * share), "learnt": round(learnt * share), "passes": round(share, 2)}


def train_peer(folder: Path, job: Job, drafter_folder: Path, clock: Clock) -> dict[str, Any]:
    """`speculators train` with its defaults, without validation and with its log of every hundredth step only."""
    from speculators.train import cli
    from speculators.train.config import TrainConfig
    from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2

    from peagle_hf.data.prepared_dataset import load_prepared

    prepared = load_prepared(folder / "train")
    lengths = [int(length) for length in prepared["seq_len"]]
    work = folder / "work" / name_of(job)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows = list(range(len(lengths)))
    link_rows(folder / "train", work / "data", [*rows, 0])  # the peer wants rows to validate on
    on_gpu = torch.cuda.is_available()
    recipe = {name: BASE[name] for name in RECIPE} | job.get("flags", {})
    flags = [
        *("--speculator-type", "peagle", "--verifier-name-or-path", (folder / "verifier.txt").read_text()),
        *("--data-path", str(work / "data"), "--save-path", str(work / "checkpoints")),
        *("--train-data-ratio", str((len(rows) + 0.5) / (len(rows) + 1))),
        *(*(text for name, value in recipe.items() for text in (f"--{name.replace('_', '-')}", str(value))),),
        *("--seed", str(job["seed"]), "--lr", str(job["rate"]), "--max-steps", str(job["steps"])),
        *("--scheduler-type", "cosine", "--scheduler-warmup-steps", str(warmup_steps(job["steps"]))),
        *("--num-workers", "2", "--on-missing", "raise", "--no-resume-from-checkpoint", "--log-freq", "100"),
        *("--hidden-states-dtype", "bfloat16" if on_gpu else "float32"),
        *([] if on_gpu else ["--draft-attn-impl", "sdpa", "--loss-implementation", "eager"]),
    ]
    config = TrainConfig.resolve(flags)
    # After its last step the peer would take one more step in each further epoch, so it gets exactly as many epochs as
    # it needs.
    sampler = MultipackDistributedBatchSamplerV2(BASE["total_seq_len"], lengths, 1, 0, seed=config.seed)
    batches: list[Any] = []
    epochs = 0
    while len(batches) < job["steps"]:
        sampler.set_epoch(epochs)
        batches += list(sampler)
        epochs += 1
    batches = batches[: job["steps"]]
    config.trainer.epochs = config.trainer.checkpoint_freq = epochs

    schedulers_step = cli.Trainer._schedulers_step

    def step(trainer: Any) -> None:
        schedulers_step(trainer)
        clock.step()

    cli.Trainer._schedulers_step, cli.Trainer.val_epoch = step, lambda *arguments: None
    fit_peer(on_gpu)
    cli.main(config)
    drafter_folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(work / "checkpoints" / str(epochs - 1) / file, drafter_folder)
    learnt = [int(sum(mask)) for mask in prepared.with_format(None)["loss_mask"]]
    return {
        "positions": sum(min(sum(lengths[row] for row in batch), BASE["total_seq_len"]) for batch in batches),
        "learnt": sum(learnt[row] for batch in batches for row in batch),
        "passes": round(sum(map(len, batches)) / len(rows), 2),
    }


def train(options: argparse.Namespace) -> None:
    """One training, from start to figures, in this process; measured in another, as speculators changes the models."""
    import transformers

    folder, job = Path(options.folder), json.loads(options.job)
    name, started = name_of(job), time.monotonic()
    drafter = folder / "drafters" / name
    clock = Clock(folder / "progress" / f"{name}.txt")
    result = job | (train_ours if job["who"] == "ours" else train_peer)(folder, job, drafter, clock)
    result |= clock.figures()
    if torch.cuda.is_available():
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result |= {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
    shutil.rmtree(folder / "work" / name, ignore_errors=True)
    measured = folder / "work" / f"{name}.json"
    command = [sys.executable, __file__, "measure", str(folder), str(drafter), str(measured)]
    subprocess.run(command, check=True)
    result |= json.loads(measured.read_text()) | {"seconds": round(time.monotonic() - started, 1)}
    (folder / "results" / f"{name}.json").write_text(json.dumps(result))


def measure(options: argparse.Namespace) -> None:
    """Counts of reached and accepted positions, of every selection and test prompt, from cached states in float32."""
    from peagle_hf import HiddenStatesDataset, PeagleForSpeculation, VerifierHead
    from peagle_hf.training.objective import Objective

    folder, device = Path(options.folder), "cuda" if torch.cuda.is_available() else "cpu"
    drafter = PeagleForSpeculation.from_pretrained(options.drafter, dtype=torch.float32).to(device)
    if device == "cuda":
        drafter.set_attn_implementation("flex_attention")
    objective = Objective(drafter, VerifierHead.from_pretrained((folder / "verifier.txt").read_text(), torch.float32))
    result = {}
    for name in ("selected", "tested"):
        dataset = HiddenStatesDataset(folder / name, None, BASE["total_seq_len"])
        result[name] = count_by_prompt(drafter, objective, dataset).tolist()
    Path(options.output).write_text(json.dumps(result))


@torch.no_grad()
def count_by_prompt(drafter: Any, objective: Any, dataset: Any) -> torch.Tensor:
    """As `peagle_hf.evaluation.acceptance.count`, but of each sample of the dataset, int64 [samples, 2, K]."""
    from peagle_hf.data.collator import CODDataCollator
    from peagle_hf.data.partition import partition_every_slot
    from peagle_hf.training.metrics import count_drafts

    drafter.eval()
    num_depths = drafter.config.num_depths
    collator = CODDataCollator.from_config(drafter.config, every_slot=True)
    counts = torch.zeros(len(dataset.data), 2, num_depths, dtype=torch.long)
    for number, rows in enumerate(dataset.plan):
        outcomes = []
        for part in partition_every_slot(collator([dataset[number]])):
            tensors = {name: value.to(drafter.device) for name, value in part.items() if name != "max_length"}
            outcomes.append(objective(drafter, tensors | {"max_length": part["max_length"]}).outcomes.cpu())
        of_all = torch.cat(outcomes, dim=1)
        for document, row in enumerate(rows):
            counts[row] += count_drafts(of_all[:, of_all[0] == document], num_depths)
    return counts


def wanted(results: list[Job], long_steps: int) -> list[Job]:
    """The trainings to run, by what is known so far, in the order in which to start them."""
    long, search, rest = [], [], []
    for who, rates in RATES.items():
        best = best_rate(results, who)
        for rate in rates:
            search.append({"who": who, "rate": rate, "steps": SEARCH_STEPS, "seed": 0})
            if best in (None, rate):
                long += [{"who": who, "rate": rate, "steps": long_steps, "seed": seed} for seed in LONG_SEEDS]
        if best is not None:
            rest += [
                {"who": who, "rate": best, "steps": steps, "seed": seed}
                for steps, seeds in reversed(SEEDS.items())
                for seed in seeds
            ]
    jobs = {name_of(job): job for job in (*search, *long, *rest, *(BESIDE if rest else ()))}
    return list(jobs.values())


def read(folder: Path) -> list[Job]:
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]


def run(options: argparse.Namespace) -> None:
    """Keep every GPU at work until all that is wanted has a result or has failed ATTEMPTS times."""
    folder, names_of_gpus = Path(options.folder), gpu_names()
    gpus = len(names_of_gpus)
    for name in ("results", "progress", "logs", "work", "drafters"):
        (folder / name).mkdir(exist_ok=True)
    threads = {f"{name}_NUM_THREADS": "2" for name in ("OMP", "MKL", "OPENBLAS")}
    environment = os.environ | threads | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    running: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
    failures: dict[str, int] = {}

    def start(job: Job, gpu: int) -> None:
        name = name_of(job)
        command = [sys.executable, __file__, "train", str(folder), json.dumps(job)]
        with (folder / "logs" / f"{name}.log").open("ab") as log:
            settings = environment | ({"CUDA_VISIBLE_DEVICES": names_of_gpus[gpu]} if torch.cuda.is_available() else {})
            process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
        running[name] = process, gpu
        print(f"{time.strftime('%T')} {name} on GPU {gpu}", flush=True)

    while True:
        asked = folder / "long_steps"
        results = read(folder)
        done = {name_of(result) for result in results}
        if options.jobs:
            chosen = map(json.loads, Path(options.jobs).read_text().splitlines())
        else:
            chosen = wanted(results, int(asked.read_text()) if asked.exists() else LONG_STEPS)
        jobs = {name_of(job): job for job in chosen}
        for name, (process, _) in list(running.items()):
            if name not in jobs and process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
                print(f"{time.strftime('%T')} {name} isn't wanted any more", flush=True)
            if process.poll() is not None:
                del running[name]
                if name in jobs and name not in done and not (folder / "results" / f"{name}.json").exists():
                    failures[name] = failures.get(name, 0) + 1
                    print(f"{time.strftime('%T')} {name} FAILED with {process.returncode}", flush=True)
        left = [name for name in jobs if name not in done | running.keys() and failures.get(name, 0) < ATTEMPTS]
        for name in left:
            loads = [sum(gpu == on for _, on in running.values()) for gpu in range(gpus)]
            if min(loads) >= options.processes:
                break
            is_long = jobs[name]["steps"] > SEARCH_STEPS
            pinned = list(NAMES).index(jobs[name]["who"]) * len(LONG_SEEDS) + jobs[name]["seed"]
            start(jobs[name], pinned % gpus if is_long else loads.index(min(loads)))
        if not left and not running:
            break
        time.sleep(1)


def serve(options: argparse.Namespace) -> None:
    """Acceptance of trained drafters in vLLM, in bfloat16, each in a process of its own, by vLLM's own counters.

    These also count in versions without the counts of single requests, which `peagle-hf evaluate` needs.
    """
    if len(options.names) > 1:
        share = ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
        for name in options.names:
            subprocess.run([sys.executable, __file__, "serve", options.folder, name, *share], check=True)
        return
    from vllm import LLM, SamplingParams

    folder, name = Path(options.folder), options.names[0]
    drafting = {"model": str(folder / "drafters" / name), "method": "eagle3", "parallel_drafting": True}
    drafting["num_speculative_tokens"] = BASE["num_depths"]
    settings = {"dtype": "bfloat16", "max_model_len": 1024, "disable_log_stats": False, "enable_prefix_caching": False}
    settings["gpu_memory_utilization"] = options.gpu_memory_utilization
    llm = LLM((folder / "verifier.txt").read_text(), speculative_config=drafting, **settings)
    questions = [json.loads(line)["turns"][0] for line in TEST_PROMPTS.read_text().splitlines()]
    chats = [[{"role": "user", "content": question}] for question in questions]
    llm.chat(chats, SamplingParams(temperature=0, max_tokens=128), use_tqdm=False)
    counted = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    drafts, accepted = counted["drafts"].value, counted["accepted_tokens_per_pos"].values
    rates = [number / drafts for number in accepted]
    print(json.dumps({"name": name, "drafts": drafts, "length": 1 + sum(rates), "by_position": rates}))


def collect(options: argparse.Namespace) -> None:
    """All results as one file, a line each, with the counts of single prompts only of the curve's test prompts."""
    results = read(Path(options.folder))
    best = {who: best_rate(results, who) for who in NAMES}
    lines = []
    for result in sorted(results, key=lambda job: (job["who"], job["steps"], job["rate"], job["seed"])):
        of_curve = result["rate"] == best[result["who"]] and not result.get("flags")
        for name in ("selected", "tested"):
            if name == "selected" or not of_curve:
                result[name] = [torch.tensor(result[name]).sum(0).tolist()]
        lines.append(json.dumps(result, separators=(",", ":")))
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    arguments = {
        data: ("verifier", "invented", "folder"),
        states: ("folder",),
        run: ("folder",),
        train: ("folder", "job"),
        measure: ("folder", "drafter", "output"),
        collect: ("folder", "output"),
        serve: ("folder",),
    }
    for function, names in arguments.items():
        stage = stages.add_parser(function.__name__)
        for name in names:
            stage.add_argument(name)
        stage.set_defaults(stage=function)
        if function is serve:
            stage.add_argument("names", nargs="+")
            stage.add_argument("--gpu-memory-utilization", type=float, default=0.9)
        if function is run:
            stage.add_argument("--processes", type=int, default=5, help="trainings at a time on each GPU")
            stage.add_argument("--jobs", help="a file with a training a line, as JSON, to run instead of the curve's")
    options = parser.parse_args()
    options.stage(options)


if __name__ == "__main__":
    main()
