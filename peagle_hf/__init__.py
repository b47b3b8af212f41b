"""Train P-EAGLE drafters for speculative decoding with the Hugging Face Trainer."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("peagle-hf")
except PackageNotFoundError:
    __version__ = "0.0.0"

_MODULE_OF = {
    "AcceptanceArguments": "evaluation.acceptance",
    "CODDataCollator": "data.collator",
    "Endpoint": "data.served_states",
    "EvaluateArguments": "evaluation.benchmark",
    "ExtractArguments": "data.extract",
    "HiddenStatesDataset": "data.dataset",
    "PeagleConfig": "configuration_peagle",
    "PeagleError": "errors",
    "PeagleForSpeculation": "modeling_peagle",
    "PeagleTrainer": "trainer",
    "PeagleTrainingArguments": "training_args",
    "PrepareArguments": "data.prepare",
    "PushArguments": "hub",
    "PushToHubCallback": "hub",
    "RegenerateArguments": "data.regenerate",
    "VerifierHead": "target",
    "VerifierParts": "target",
    "VllmExportCallback": "callbacks",
    "acceptance": "evaluation.acceptance",
    "add_adapter": "adapters",
    "build_datasets": "training",
    "build_drafter": "training",
    "checkpoint_to_resume": "training",
    "draft_and_verify": "generation",
    "command_line": "console",
    "end_processes": "console",
    "evaluate": "evaluation.benchmark",
    "extract": "data.extract",
    "load_adapter": "adapters",
    "merge_adapter": "adapters",
    "parse_arguments": "cli.parsing",
    "prepare": "data.prepare",
    "push": "hub",
    "regenerate": "data.regenerate",
    "register_verifier": "target",
    "save_adapter": "adapters",
    "start_linearly": "linear_start",
    "train": "training",
}

__all__ = [*_MODULE_OF]


# PeagleConfig and PeagleForSpeculation register themselves with the Auto classes when they are imported. The program
# `peagle-hf` leaves that to the command that it runs: importing torch and transformers takes seconds.
if Path(sys.argv[0]).stem != "peagle-hf":
    import_module(".modeling_peagle", __name__)

if TYPE_CHECKING:
    from .adapters import add_adapter, load_adapter, merge_adapter, save_adapter
    from .callbacks import VllmExportCallback
    from .cli.parsing import parse_arguments
    from .configuration_peagle import PeagleConfig
    from .console import command_line, end_processes
    from .data.collator import CODDataCollator
    from .data.dataset import HiddenStatesDataset
    from .data.extract import ExtractArguments, extract
    from .data.prepare import PrepareArguments, prepare
    from .data.regenerate import RegenerateArguments, regenerate
    from .data.served_states import Endpoint
    from .errors import PeagleError
    from .evaluation.acceptance import AcceptanceArguments, acceptance
    from .evaluation.benchmark import EvaluateArguments, evaluate
    from .generation import draft_and_verify
    from .hub import PushArguments, PushToHubCallback, push
    from .linear_start import start_linearly
    from .modeling_peagle import PeagleForSpeculation
    from .target import VerifierHead, VerifierParts, register_verifier
    from .trainer import PeagleTrainer
    from .training import build_datasets, build_drafter, checkpoint_to_resume, train
    from .training_args import PeagleTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
