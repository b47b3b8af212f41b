"""`peagle-hf acceptance`: estimate acceptance from cached hidden states, without generation or a server."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arguments import Arguments, check_ranges
from ..console import number_of, progress_bar
from ..data.cache_manifest import check_cache
from ..data.cache_storage import cache_folder
from ..data.collator import CODDataCollator
from ..data.contexts import CONTEXTS, context_number, drafted_contexts
from ..data.dataset import HiddenStatesDataset
from ..data.partition import partition_every_slot
from ..data.prepared_dataset import split_rows
from ..errors import PeagleError
from ..files import write_json
from ..hub.training_json import read_record
from ..model.config import PeagleConfig
from ..model.drafter import PeagleForSpeculation
from ..model.served_checkpoint import (
    DRAFTER_HELP,
    VERIFIER_HELP,
    check_checkpoint,
    drafter_folder,
    drafter_name,
    verifier_of,
)
from ..training.metrics import count_by_position, drafts_in_text
from ..training.objective import Objective
from ..verifier.head import VerifierHead
from ..verifier.loading import load_verifier_config
from .sampled_acceptance import METHODS, SamplingObjective, expected_drafts

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class AcceptanceArguments(Arguments):
    """Arguments of `peagle-hf acceptance`."""

    model: str = field(metadata={"aliases": ["--drafter"], "help": DRAFTER_HELP})
    data_path: str = field(metadata={"help": "Folder of `peagle-hf prepare`, of text that the verifier wrote."})
    output: str = field(metadata={"help": "File for the report, such as acceptance.json."})
    hidden_states_path: str | None = field(
        default=None, metadata={"help": "Folder of `peagle-hf extract`. Default: hidden_states in the data path."}
    )
    verifier: str | None = field(default=None, metadata={"help": VERIFIER_HELP})
    num_speculative_tokens: int | None = field(
        default=None, metadata={"help": "K, the tokens to draft at a time; default: the K that it was trained with."}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "The temperature, above 0, at which acceptance by sampling is estimated too, without top-p "
            "and top-k."
        },
    )
    train_data_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Measure on the samples that a training with this ratio used for validation. Default: all samples."
        },
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of that training, which determines its validation samples. Default: the one in the drafter's "
            "training.json."
        },
    )
    skip_rows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of samples of the prepared dataset to leave out, such as those of extract --skip-rows."
        },
    )
    total_seq_len: int = field(
        default=8192, metadata={"help": "Positions in a packed sequence; longer samples are cut."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the drafter and the verifier's head: float32, bfloat16 or float16."},
    )
    verifier_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the verifier."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the verifier."})

    GROUPS: ClassVar = {
        "Input and output": (
            "model",
            "data_path",
            "hidden_states_path",
            "output",
            "verifier",
            "verifier_revision",
            "trust_remote_code",
        ),
        "What is measured": ("num_speculative_tokens", "temperature", "train_data_ratio", "seed", "skip_rows"),
        "Computation": ("total_seq_len", "dtype"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"num_speculative_tokens": (1, math.inf), "total_seq_len": (1, math.inf)})
        if not 0 < self.temperature < math.inf:
            raise PeagleError(
                f"--temperature is {self.temperature} but must be above 0: greedy acceptance is always estimated."
            )
        if self.train_data_ratio is not None and not 0 < self.train_data_ratio < 1:
            raise PeagleError(
                f"--train-data-ratio is {self.train_data_ratio} but must be above 0 and below 1: with 1 there are no "
                "validation samples. Leave it out to measure on all samples."
            )
        if Path(self.output).is_dir():
            raise PeagleError(f"--output {self.output} is a folder. Name a JSON file for the report.")
        if self.dtype not in DTYPES:
            raise PeagleError(f"--dtype is {self.dtype!r} but must be {', '.join(DTYPES)}.")


def acceptance(arguments: AcceptanceArguments) -> dict[str, Any]:
    """Measure a drafter on cached samples; write, log and return the report.

    At every position that is trained on, the K tokens that the drafter proposes are compared with the verifier's most
    likely token in its whole vocabulary. The report has, with the names of `evaluate`,

    - `acceptance_length` and `per_position_acceptance` of the drafts that decoding the text would make (see
      `metrics.count_drafts`), and `conditional_acceptance`: drafts accepted at position k / drafts that reach it,
      because all before it are accepted; with the counts `num_drafts`, `reached`, `accepted`;
    - `by_context`: the same for the drafts in each range of positions in the context (see `data.contexts`); the counts
      of all ranges sum to the whole;
    - `sampled`: the same (without counts) as expected at `temperature` where tokens are sampled, if drafted ones are
      drawn from the drafter's distribution (`probabilistic`) or are its most likely ones (`greedy`): see
      `sampled_acceptance`. The text should be sampled at that temperature too;
    - `every_anchor`: the same with a draft at every position that is trained on, and `accuracy`: share of the slots of
      depth k that are right, whatever was proposed before them.

    Raises:
        PeagleError: the checkpoint, the verifier or the cache can't be read, or they don't fit each other.
    """
    folder = drafter_folder(arguments.model)
    name, link = drafter_name(arguments.model, folder)
    config = check_checkpoint(folder)
    verifier = verifier_of(folder, config, arguments.verifier)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    config.num_depths = arguments.num_speculative_tokens or config.num_depths
    drafter = _load_drafter(folder, config, dtype)
    source = (arguments.verifier_revision, arguments.trust_remote_code)
    cache = cache_folder(arguments.data_path, arguments.hidden_states_path)
    layer_ids = config.eagle_aux_hidden_state_layer_ids
    check_cache(cache, verifier, load_verifier_config(verifier, *source), layer_ids, arguments.verifier_revision)
    head = VerifierHead.from_pretrained(verifier, dtype, *source)
    objective = SamplingObjective(drafter, head, temperature=arguments.temperature)
    rows = _kept_back(arguments, folder) if arguments.train_data_ratio is not None else None
    skipped = arguments.skip_rows or []
    dataset = HiddenStatesDataset(arguments.data_path, cache, arguments.total_seq_len, rows, skip_rows=skipped)
    counters, drafts, expected = count(drafter, objective, dataset)
    accuracy = counters[1].double() / counters[0].clamp(min=1)
    report = {
        "drafter": name,
        "drafter_link": link,
        "verifier": verifier,
        "data_path": arguments.data_path,
        "num_rows": dataset.num_samples,
        "skipped_rows": sorted(set(skipped)),
        "num_speculative_tokens": config.num_depths,
        "dtype": arguments.dtype,
        **_summarize(drafts.sum(0)),
        "by_context": {name: _summarize(counts) for name, counts in zip(CONTEXTS, drafts, strict=True)},
        "sampled": {"temperature": arguments.temperature}
        | {method: rates_by_position(*expected[method].tolist()) for method in METHODS},
        "every_anchor": _summarize(counters[2:]) | {"accuracy": accuracy.tolist()},
    }
    write_json(arguments.output, report)
    print(table(report))
    logger.info("\nWritten to %s.", arguments.output)
    return report


def _load_drafter(folder: Path, config: PeagleConfig, dtype: torch.dtype) -> PeagleForSpeculation:
    """A drafter of which nothing is trained, so that no gradient of the head is formed and its memory is shared."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drafter = PeagleForSpeculation.from_pretrained(folder, config=config, dtype=dtype, device_map=device)
    if device == "cuda":
        drafter.set_attn_implementation("flex_attention")
    drafter.requires_grad_(False)
    return drafter


def _kept_back(arguments: AcceptanceArguments, folder: Path) -> list[int]:
    """Numbers of the samples on which the training of this drafter validated."""
    seed = arguments.seed
    if seed is None:
        seed = (read_record(folder) or {}).get("seed")
        if seed is None:
            raise PeagleError(
                f"{arguments.model} has no training.json with the seed of its training, which determines the "
                "validation samples. Pass --seed."
            )
    assert arguments.train_data_ratio is not None
    return split_rows(arguments.data_path, arguments.train_data_ratio, seed)[1]


@torch.no_grad()
def count(
    drafter: PeagleForSpeculation, objective: Objective, dataset: HiddenStatesDataset
) -> tuple[Tensor, Tensor, dict[str, NDArray[np.float64]]]:
    """Count over all slots, none dropped.

    Returns:
        `metrics.count_by_depth` [4, K], `metrics.count_by_position` of the drafts in each of `CONTEXTS` [C, 2, K], and
        by method what `sampled_acceptance.expected_drafts` [2, K] expects; nothing if it is no `SamplingObjective`.
    """
    drafter.eval()
    num_depths = drafter.config.num_depths
    collator = CODDataCollator.from_config(drafter.config, every_slot=True)
    counters = torch.zeros(4, num_depths, dtype=torch.long)
    by_context = torch.zeros(len(CONTEXTS), 2, num_depths, dtype=torch.long)
    methods = METHODS if isinstance(objective, SamplingObjective) else ()
    expected = {method: np.zeros((2, num_depths)) for method in methods}
    for number in progress_bar(range(len(dataset)), desc="Measuring", unit="sequence"):
        outcomes, places, chances = [], [], []
        for part in partition_every_slot(collator([dataset[number]])):
            tensors = {name: value.to(drafter.device) for name, value in part.items() if name != "max_length"}
            output = objective(drafter, tensors | {"max_length": part["max_length"]})
            assert output.outcomes is not None  # with the drafter in evaluation mode there are outcomes
            counters += output.counters.cpu()
            outcomes.append(output.outcomes.cpu())
            if isinstance(objective, SamplingObjective):
                of_part = objective.by_anchor(tensors, num_depths)
                places.append(of_part[0].cpu())
                chances.append(of_part[1].cpu())
        drafts = drafts_in_text(torch.cat(outcomes, dim=1))
        # The draft after anchor i begins with token i + 2 of the sample (see `model.slots`).
        contexts = torch.tensor([context_number(place + 2) for place in drafts[0].tolist()])
        for number, counts in enumerate(by_context):
            counts += count_by_position(drafts[:, contexts == number], num_depths)
        for method, chances_MK in zip(methods, torch.cat(chances, dim=1) if chances else (), strict=True):
            expected[method] += expected_drafts(torch.cat(places, dim=1), chances_MK)
    return counters, by_context, expected


def _summarize(counts_2K: Tensor) -> dict[str, Any]:
    reached, accepted = counts_2K.tolist()
    return {**rates_by_position(reached, accepted), "num_drafts": reached[0], "reached": reached, "accepted": accepted}


def rates_by_position(reached: Sequence[float], accepted: Sequence[float]) -> dict[str, Any]:
    """Acceptance length, and acceptance by position of all drafts and of those that reach it, from counts by position.

    A position that no draft reaches counts as never accepted.
    """
    conditional = [taken / met if met else 0.0 for met, taken in zip(reached, accepted, strict=True)]
    by_position = list(accumulate(conditional, mul))
    return {
        "acceptance_length": 1 + sum(by_position),
        "per_position_acceptance": by_position,
        "conditional_acceptance": conditional,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    every, link, sampled = report["every_anchor"], report["drafter_link"], report["sampled"]
    names = ("reached", "accepted", "conditional_acceptance", "per_position_acceptance")
    columns = zip(*(report[name] for name in names), every["per_position_acceptance"], every["accuracy"], strict=True)
    return "\n".join(
        [
            f"Drafter            {report['drafter']}{f', which {link} links to' if link else ''}, "
            f"{number_of(report['num_speculative_tokens'], 'token')} at a time",
            f"Verifier           {report['verifier']}, {report['dtype']}",
            f"Measured           {number_of(report['num_rows'], 'sample')} of {report['data_path']}, from cached "
            "hidden states",
            "",
            f"Acceptance length  {report['acceptance_length']:6.3f}, in {number_of(report['num_drafts'], 'draft')}",
            f"At every position  {every['acceptance_length']:6.3f}, in {every['num_drafts']}",
            f"Temperature {sampled['temperature']:<7g}{sampled['probabilistic']['acceptance_length']:6.3f} expected "
            f"with probabilistic drafts, {sampled['greedy']['acceptance_length']:.3f} with greedy ones",
            "",
            "Position    Reached   Accepted  Conditional  By position  At every position  Accuracy",
            *(
                f"{place:>8} {reached:>10} {accepted:>10} {conditional:>12.1%} {rate:>12.1%} {everywhere:>18.1%} "
                f"{accuracy:>9.1%}"
                for place, (reached, accepted, conditional, rate, everywhere, accuracy) in enumerate(columns, start=1)
            ),
            *_context_lines(report),
        ]
    )


def _context_lines(report: dict[str, Any]) -> list[str]:
    """A table of the acceptance length by position in the context, if drafts are in several ranges."""
    rows = [
        f"{name:>8} {figures['num_drafts']:>10} {figures['acceptance_length']:>18.3f}"
        for name, figures in drafted_contexts(report).items()
    ]
    return ["", " Context     Drafts  Acceptance length", *rows] if rows else []
