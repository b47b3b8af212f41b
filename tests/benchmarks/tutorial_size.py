"""The tutorial's run at its own size: time, speed, memory and disk of each step, on one or several GPUs.

    python tests/benchmarks/tutorial_size.py all --folder /data/tutorial --results results --gpus 4 --minutes 30

Makes a verifier of Qwen3-8B's size with random weights (`model`) and 5,000 conversations of ShareGPT's lengths
(`chats`; see `tutorial_inputs`), then runs the tutorial's own commands: `prepare`, `extract`, `train`. Each step can be
run alone. `all` runs what isn't complete yet, and stops at `--minutes`; the same command goes on from there. What is
known so far is in RESULTS/results.json after every step and every line of a training's log. `scaling` trains for some
steps on 1, 2, 4 … GPUs with DDP and with FSDP2, without those that the results have already. `report` prints a table of
one or more results files, in which what is calculated and not measured is in italics. `--tiny` shrinks everything for a
test of this script itself.

Arguments after `--` go to `peagle-hf train`.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from timed_command import Timed, run_together
from tutorial_inputs import facts_of_verifier, make_verifier, write_chats
from tutorial_report import EPOCHS, report

from peagle_hf.data.cache_storage import cached_rows
from peagle_hf.errors import PeagleError
from peagle_hf.files import write_json

STEPS = ("model", "chats", "prepare", "extract", "train")
CONVERSATIONS, LENGTH, LAYERS, DEPTHS = 5000, 4096, 4, 4
"""The tutorial's, like `EPOCHS`."""
LOGGED = 10
"""Steps between two lines of a training's log, the default of `peagle-hf train`."""
SAVED = 250
"""Steps between two checkpoints of a training that may be stopped at `--minutes`."""
CHECKPOINT_GIB = 19
"""Of a drafter with 4 layers for Qwen3-8B and the states of Muon, by calculation. Two are kept while one is written."""
STORAGES = ("plain", "fp8-learnt")
"""From the largest to the smallest."""
FSDP2 = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"


class Benchmark:
    """The folder, the settings and the results so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder: Path = options.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options.results.mkdir(parents=True, exist_ok=True)
        self.file = options.results.absolute() / "results.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.keep_settings()
        self.results |= machine()
        self.deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
        self.verifier, self.data = self.folder / "verifier", self.folder / "data"
        self.cache = (options.hidden_states or self.data / "hidden_states").absolute()
        self.length, self.logged, self.saved = (256, 1, 2) if options.tiny else (LENGTH, LOGGED, SAVED)

    def keep_settings(self) -> None:
        """Note what the folder and the results are made with.

        Raises:
            SystemExit: they were made with other settings, so that their parts would be taken for those of these.
        """
        settings = {name: getattr(self.options, name) for name in ("tiny", "conversations", "tokenizer")}
        record = self.folder / "settings.json"
        earlier = json.loads(record.read_text()) if record.exists() else {}
        for file, made in ((record, earlier), (self.file, self.results.get("settings", {}))):
            for name in settings:
                if made and made.get(name) != settings[name]:
                    raise SystemExit(
                        f"{file} was made with {name} {made.get(name)}, and now {name} is {settings[name]}. Give the "
                        "same again, or name another --folder and other --results."
                    )
        write_json(record, settings)
        self.results["settings"] = settings

    def save(self, step: str, facts: dict[str, Any]) -> None:
        self.results[step] = facts
        write_json(self.file, self.results)

    def is_complete(self, step: str) -> bool:
        """Whether a step has been run to its end as it is asked for now, and what it made is still in the folder."""
        facts = self.results.get(self.key(step), {})
        made = {"model": self.verifier, "chats": self.folder / "chats.jsonl", "prepare": self.data}
        made |= {"extract": self.cache, "train": self.folder / f"checkpoints-{self.options.gpus}"}
        return bool(facts.get("complete")) and made[step].exists() and facts.get("asked") == self.asked(step)

    def asked(self, step: str) -> list[Any] | None:
        """The options that decide how much of a step is run."""
        options = self.options
        if step == "extract":
            return [options.storage, options.max_samples]
        return [options.epochs, options.max_steps, options.extra] if step == "train" else None

    @property
    def config(self) -> dict[str, Any]:
        """Of the verifier."""
        return json.loads((self.verifier / "config.json").read_text())

    def key(self, step: str) -> str:
        server = ", vLLM server" if step == "extract" and self.options.endpoint else ""
        return f"{step}, {self.options.gpus} GPUs{server}" if step in ("extract", "train") else step

    def run(self, step: str, commands: list[tuple[list[str], dict[str, str]]], **options: Any) -> Timed:
        for command, _ in commands[:1]:
            print(f"[{step}] {' '.join(command)}", flush=True)
        return run_together(commands, self.file.with_name(f"{step}.log"), self.deadline, **options)

    def model(self) -> None:
        start, facts = time.monotonic(), {}
        if not self.verifier.exists():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # its memory on the GPU is free when it ends
                arguments = (self.verifier, self.options.tokenizer, self.options.tiny)
                pool.submit(make_verifier, *arguments).result()
            facts = {"seconds": round(time.monotonic() - start, 1)}
        facts |= facts_of_verifier(self.verifier) | self.disk(self.verifier) | {"complete": True}
        self.save("model", self.results.get("model", {}) | facts)

    def chats(self) -> None:
        start, file = time.monotonic(), self.folder / "chats.jsonl"
        longest = self.length if self.options.tiny else 2 * self.length
        count = round(1.2 * self.options.conversations)  # those that begin with too long a question are left out
        facts = write_chats(file, self.verifier, count, longest)
        self.save("chats", facts | {"complete": True, "seconds": round(time.monotonic() - start, 1)})

    def prepare(self) -> None:
        command = [*PROGRAM, "prepare", "--model", str(self.verifier), "--data", str(self.folder / "chats.jsonl")]
        command += ["--output", str(self.data), "--max-samples", str(self.options.conversations)]
        command += ["--seq-length", str(self.length), "--num-workers", str(self.options.num_workers), "--overwrite"]
        timed = self.run("prepare", [(command, {})])
        facts = timed.facts() | {"complete": timed.returncode == 0}
        if facts["complete"]:
            lengths = self.lengths()
            facts |= {"samples": len(lengths), "tokens": sum(lengths), "tokens_per_s": sum(lengths) / timed.seconds}
            facts |= {"learnt": sum(map(sum, self.masks())), "longest": max(lengths)}
        self.save("prepare", facts | self.disk(self.data))

    def extract(self) -> None:
        """Cache the states of all samples, on every GPU a share; or of as many as `--max-samples`, to see the speed.

        With `--endpoint` one process asks the servers, which have the GPUs.
        """
        before, lengths, gpus = cached_rows(self.cache), self.lengths(), self.options.gpus
        storage, fits = (self.options.storage, True) if self.options.storage else self.storage_that_fits()
        wanted = self.options.max_samples or (len(lengths) if fits else len(lengths) // 10)
        if len(before) >= wanted:
            print("The samples are cached already, so there is no speed of extraction to measure.")
            facts = {"complete": True, "asked": self.asked("extract")}
            self.save(self.key("extract"), self.results.get(self.key("extract"), {}) | facts)
            return
        command = ["extract", "--model", str(self.verifier), "--preprocessed-data", str(self.data)]
        command += ["--output", str(self.cache), "--storage", storage, "--validate-outputs"]
        command += ["--max-samples", str(min(wanted, len(lengths)))]
        if self.options.endpoint:
            start = ([*PROGRAM, *command, "--endpoint", self.options.endpoint], {})
        else:
            start = self.on_gpus(gpus, command)
        timed = self.run("extract", [start])
        made = sum(lengths[row] for row in cached_rows(self.cache) - before)
        earlier = self.results.get(self.key("extract"), {})
        facts = timed.facts() | {"complete": timed.returncode == 0 and not timed.cut, "storage": storage}
        facts["asked"] = self.asked("extract")
        if earlier.get("tokens") and not earlier["complete"]:
            made, facts["seconds"] = made + earlier["tokens"], facts["seconds"] + earlier["seconds"]
        facts |= {"samples": len(cached_rows(self.cache)), "of_samples": len(lengths), "tokens": made}
        facts["of_tokens"] = sum(lengths)
        # The last line with a speed, without the loading of the verifier, is that of all processes.
        speeds = [float(found[1]) for _, line in timed.lines if (found := re.search(r": (\d+) tokens/s\.$", line))]
        facts["tokens_per_s"] = speeds[-1] if speeds else made / facts["seconds"]
        facts |= self.mfu(facts["tokens_per_s"] * self.verifier_flops() / gpus) | self.disk(self.cache)
        self.save(self.key("extract"), facts)

    def train(self) -> None:
        """Train with the tutorial's flags; samples that aren't cached are generated in the process."""
        options, missing = self.options, len(cached_rows(self.cache)) < len(self.lengths())
        output = f"checkpoints-{options.gpus}"
        flags = ["--epochs", str(options.epochs), "--on-missing", "generate" if missing else "raise"]
        flags += ["--save-total-limit", "2", *(["--max-steps", str(options.max_steps)] if options.max_steps else [])]
        if self.deadline is not None:  # so that the same command can go on within an epoch
            flags += ["--save-strategy", "steps", "--save-steps", str(self.saved)]
        flags = self.train_flags(output, flags)
        planned = self.planned_steps(options.gpus)
        key, attempts = self.key("train"), self.results.get(self.key("train"), {}).get("attempts", [])
        facts = {"steps_an_epoch": planned, "epochs": options.epochs, "generated": missing, "gpus": options.gpus}
        facts["asked"] = self.asked("train")

        def note(timed: Timed) -> bool:
            if timed.lines[-1][1].startswith("{'"):
                seen = training_facts(timed, self.logged) | {"seconds": timed.lines[-1][0], "cut": True}
                self.save(key, facts | {"complete": False, "attempts": [*attempts, seen]})
            return False

        timed = self.run("train", [self.on_gpus(options.gpus, flags)], is_enough=note)
        facts |= {"complete": timed.returncode == 0 and not timed.cut} | self.disk(self.folder / output)
        facts["attempts"] = [*attempts, training_facts(timed, self.logged) | timed.facts()]
        flops = self.flops_a_step(options.gpus)
        known = [one for one in facts["attempts"] if one.get("step_s")]
        if known:
            step = max(known, key=lambda one: one["logged_steps"])["step_s"]
            facts |= {"step_s": step, "flops_a_step": flops} | self.mfu(flops / step)
        self.save(key, facts)

    def scaling(self) -> None:
        """Short trainings on 1, 2, 4 … GPUs: DDP, and FSDP2; each is stopped when enough steps are logged."""
        counts = [2**power for power in range(8) if 2**power <= self.options.gpus]
        wanted = max(3, self.options.scaling_steps // self.logged)
        kinds = [(count, kind) for count in counts for kind in ("ddp", "fsdp2") if count > 1 or kind == "ddp"]
        for count, kind in kinds:
            if kind == "fsdp2" and not gpu_names():  # accelerate has no FSDP on CPUs
                continue
            if self.results.get("scaling", {}).get(f"{kind}, {count}", {}).get("step_s"):
                continue
            runs = self.folder / "scaling"
            shutil.rmtree(runs, ignore_errors=True)
            flags = ["--no-linear-start", "--eval-strategy", "no", "--epochs", "99", "--on-missing", "skip"]
            flags = self.train_flags("scaling", flags)
            timed = self.run(
                f"scaling-{kind}-{count}",
                [self.on_gpus(count, flags, fsdp=kind == "fsdp2")],
                is_enough=lambda timed: len(loss_lines(timed)) >= wanted,
            )
            facts = training_facts(timed, self.logged) | timed.facts()
            if facts.get("step_s"):
                facts |= self.mfu(self.flops_a_step(count) / facts["step_s"])
            self.save("scaling", self.results.get("scaling", {}) | {f"{kind}, {count}": facts})
        shutil.rmtree(self.folder / "scaling", ignore_errors=True)

    def all(self) -> None:
        for step in (*STEPS, *["scaling"] * self.options.scaling):
            if self.deadline is not None and time.monotonic() > self.deadline - 15:
                print(f"No time is left for {step}. The same command goes on there.")
                break
            if not self.is_complete(step):
                getattr(self, step)()
            if step != "scaling" and not self.is_complete(step):
                print(f"{step} isn't complete.")
                break
        print(report([self.results]))

    def train_flags(self, output: str, others: list[str]) -> list[str]:
        flags = ["train", "--verifier-name-or-path", str(self.verifier), "--data-path", str(self.data)]
        flags += ["--hidden-states-path", str(self.cache), "--save-path", str(self.folder / output)]
        flags += ["--speculator-type", "peagle", "--num-layers", str(LAYERS), "--num-depths", str(DEPTHS)]
        flags += ["--down-sample-ratio", "0.7", "--down-sample-ratio-min", "0.2", "--no-norm-before-residual"]
        flags += ["--scheduler-type", "cosine", "--lr", "6e-4", "--total-seq-len", str(self.length)]
        return [*flags, "--logging-steps", str(self.logged), *others, *self.options.extra]

    def on_gpus(self, count: int, command: list[str], fsdp: bool = False) -> tuple[list[str], dict[str, str]]:
        start = PROGRAM
        if fsdp:
            start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes"]
            start += [str(count), "-m", "peagle_hf"]
        elif count > 1:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            start += ["-m", "peagle_hf"]
        return [*start, *command], {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}

    def lengths(self) -> list[int]:
        from peagle_hf.data.prepared_dataset import load_prepared

        return list(load_prepared(self.data).with_format(None)["seq_len"])

    def masks(self) -> Any:
        from peagle_hf.data.prepared_dataset import load_prepared

        return load_prepared(self.data).with_format(None)["loss_mask"]

    def storage_that_fits(self) -> tuple[str, bool]:
        """The largest kind of storage that fits on the disk beside the checkpoints, by extract's own prediction.

        Returns:
            Its name, and whether it fits; if none does, the smallest.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free / 2**30
        if not self.options.tiny and self.cache.stat().st_dev == self.folder.stat().st_dev:
            free -= CHECKPOINT_GIB * min(self.options.epochs, 3)
        printed = ""
        for storage in STORAGES:
            # The first answer names the sizes of smaller kinds too; a program of its own takes long to start.
            found = re.search(rf"\b{storage} \([\d.]+ KiB a token, ([\d.]+) GiB", printed)
            if found is None:
                command = [*PROGRAM, "extract", "--model", str(self.verifier), "--preprocessed-data", str(self.data)]
                command += ["--output", str(self.cache), "--storage", storage, "--dry-run"]
                printed = subprocess.run(command, capture_output=True, text=True).stdout
                found = re.search(r"would write ([\d.]+) GiB", printed)
            if found is None:  # the cache holds another kind of states
                continue
            print(f"{storage} needs {found[1]} GiB; {free:.0f} GiB can be used.", flush=True)
            if float(found[1]) < free:
                return storage, True
        return STORAGES[-1], False

    def packed(self) -> list[list[int]]:
        """The rows of each packed sequence that training plans."""
        import torch

        from peagle_hf.data.dataset import first_fit
        from peagle_hf.data.prepared_dataset import split_rows

        lengths, (rows, _) = self.lengths(), split_rows(self.data, 0.9, 42)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42)).tolist()
        shuffled = [rows[index] for index in order]
        sizes = [min(lengths[row] - 2, self.length) for row in shuffled]
        return [[shuffled[index] for index in bin_] for bin_ in first_fit(sizes, self.length)]

    def planned_steps(self, gpus: int) -> int:
        return -(-len(self.packed()) // gpus)

    def flops_a_step(self, gpus: int, count: int = 40) -> float:
        """Necessary operations of one GPU's step (see `training_step.flops`), the mean of some packed sequences."""
        import torch
        from training_step import Case, Sizes, flops

        from peagle_hf import CODDataCollator
        from peagle_hf.data.prepared_dataset import load_prepared
        from peagle_hf.model.slots import target_tokens

        config = self.config
        sizes = Sizes(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["vocab_size"],
            LAYERS,
        )
        data, collator = load_prepared(self.data).with_format(None), CODDataCollator(DEPTHS)
        packs = self.packed()
        found = []
        for pack in packs[:: max(1, len(packs) // count)]:
            documents = []
            for row in pack:
                tokens, mask = (torch.tensor(data[row][name]) for name in ("input_ids", "loss_mask"))
                targets = int(target_tokens(mask.bool()).sum())
                states = {"hidden_states": torch.zeros(len(tokens), 0), "target_states": torch.zeros(targets, 0)}
                documents.append({"sample_id": row, "input_ids": tokens, "loss_mask": mask} | states)
            batch = collator([{"epoch": 0, "documents": documents}])
            found.append(flops(sizes, Case(self.length, self.length, DEPTHS, sizes.vocab), batch))
        return statistics.mean(found)

    def verifier_flops(self) -> float:
        """Operations for one token of the verifier: its layers' products and half of the attention's square."""
        config, lengths = self.config, self.lengths()
        size, query = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
        key = config["num_key_value_heads"] * config["head_dim"]
        products = size * (2 * query + 2 * key) + 3 * size * config["intermediate_size"]
        seen = sum(length**2 for length in lengths) / sum(lengths) / 2
        return config["num_hidden_layers"] * (2 * products + 4 * query * seen)

    def mfu(self, flops_per_s: float) -> dict[str, float]:
        from training_step import PEAK_FLOPS

        peak = next((value for name, value in PEAK_FLOPS.items() if name in self.results["device"]), None)
        return {"mfu": round(flops_per_s / peak, 3)} if peak else {}

    def disk(self, folder: Path) -> dict[str, float]:
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
        return {"disk_gib": round(sum(sizes) / 2**30, 2)}


PROGRAM = [sys.executable, "-m", "peagle_hf"]


def gpu_names() -> list[str]:
    """Without a context of CUDA in this process, which would take memory of a GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []


def machine() -> dict[str, Any]:
    names = gpu_names()
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"device": f"{len(names)} x {names[0]}" if names else "CPU", "versions": versions, "cores": os.cpu_count()}


def loss_lines(timed: Timed) -> list[tuple[float, dict[str, Any]]]:
    """The lines of a training's log with a loss, with the second in which each came."""
    found = []
    for second, line in timed.lines:
        if line.startswith("{'"):
            values = ast.literal_eval(line)
            if "loss" in values:
                found.append((second, values))
    return found


def training_facts(timed: Timed, each: int) -> dict[str, Any]:
    """Seconds of a step, speed and start of a training from its log.

    A step's time is the median over the intervals between two lines, but for the first, in which kernels are still
    compiled, and those with a validation. `start_s` is what everything up to the second line took longer than such
    steps, `epoch_end_s` what an interval with the end of an epoch did.

    Args:
        each: steps between two lines.
    """
    losses = loss_lines(timed)
    facts: dict[str, Any] = {"logged_steps": each * len(losses)}
    gaps = [(earlier[0], later[0]) for earlier, later in pairwise(losses)]
    ends = [second for second, line in timed.lines if line.startswith("{'eval_")]
    plain = [gap for gap in gaps[1:] if not any(gap[0] < second <= gap[1] for second in ends)]
    if not plain:
        return facts
    step = statistics.median(end - begin for begin, end in plain) / each
    longer = [end - begin - each * step for begin, end in gaps[1:] if (begin, end) not in plain]
    facts |= {"step_s": step, "start_s": losses[1][0] - 2 * each * step}
    if len(ends) > 1:  # whole epochs, each with its validation and saving
        facts["epoch_s"] = (ends[-1] - ends[0]) / (len(ends) - 1)
    facts["tokens_per_s"] = statistics.median(float(values["tokens_per_second"]) for _, values in losses[2:])
    facts["loader_wait"] = statistics.median(float(values["loader_wait"]) for _, values in losses[2:])
    facts["epoch_end_s"] = statistics.mean(longer) if longer else None
    if "memory_gib" in losses[-1][1]:
        facts["torch_gib"] = float(losses[-1][1]["memory_gib"])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=[*STEPS, "scaling", "all", "report"])
    parser.add_argument("--folder", type=Path, default=Path("tutorial_size"), help="for everything large")
    parser.add_argument("--results", type=Path, default=Path("."), help="folder for results.json and the logs")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="report: results of other machines too")
    parser.add_argument("--gpus", type=int, default=max(1, len(gpu_names())), help="how many to use (default: all)")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="to run; the report is of 5")
    parser.add_argument("--max-steps", type=int, help="of training")
    parser.add_argument(
        "--max-samples",
        type=int,
        help="to extract, if not all; training generates the others itself (default: all, or a tenth, which shows the "
        "speed, where the disk is too small)",
    )
    parser.add_argument("--num-workers", type=int, default=1, help="processes that prepare (default: the tutorial's 1)")
    parser.add_argument("--storage", help="of the cache (default: the largest of plain and fp8-learnt that fits)")
    parser.add_argument(
        "--endpoint",
        help="extract from these vLLM servers; start one before, with --gpus GPUs: peagle-hf launch-vllm "
        "FOLDER/verifier --hidden-states-path FOLDER/data/hidden_states",
    )
    parser.add_argument("--hidden-states", type=Path, help="folder of the cache (default: in --folder)")
    parser.add_argument("--tokenizer", help="a folder or hub name (default: one is trained on the spot)")
    parser.add_argument("--scaling", action="store_true", help="all: also compare numbers of GPUs, DDP and FSDP2")
    parser.add_argument("--scaling-steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no step runs on without us
    options.extra = sys.argv[split + 1 :]
    if options.step == "report":
        files = [options.results / "results.json", *options.compare]
        for file in files:
            if not file.is_file():
                sys.exit(f"{file} isn't there. Name the folder with --results, other machines' files with --compare.")
        print(report([json.loads(file.read_text()) for file in files]))
    else:
        try:
            getattr(Benchmark(options), options.step)()
        except PeagleError as error:
            sys.exit(f"{options.step}: {error}")


if __name__ == "__main__":
    main()
