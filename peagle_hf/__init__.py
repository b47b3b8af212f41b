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
    "Endpoint": "data.endpoint_states",
    "EvaluateArguments": "evaluation.benchmark",
    "ExtractArguments": "data.extract",
    "HiddenStatesDataset": "data.dataset",
    "PeagleConfig": "model.config",
    "PeagleError": "errors",
    "PeagleForSpeculation": "model.drafter",
    "PeagleTrainer": "training.trainer",
    "PeagleTrainingArguments": "training.arguments",
    "PlanArguments": "evaluation.plan",
    "PrepareArguments": "data.prepare",
    "PushArguments": "hub.push",
    "PushToHubCallback": "training.push_callback",
    "RegenerateArguments": "data.regenerate",
    "VerifierHead": "verifier.head",
    "VerifierParts": "verifier.parts",
    "VllmExportCallback": "training.export_callback",
    "acceptance": "evaluation.acceptance",
    "add_adapter": "training.adapters",
    "build_datasets": "training.run",
    "build_drafter": "training.run",
    "build_trainer": "training.run",
    "checkpoint_to_resume": "training.run",
    "draft_and_verify": "model.generation",
    "command_line": "console",
    "end_processes": "console",
    "evaluate": "evaluation.benchmark",
    "extract": "data.extract",
    "load_adapter": "training.adapters",
    "merge_adapter": "training.adapters",
    "parse_arguments": "cli.parsing",
    "plan": "evaluation.plan",
    "prepare": "data.prepare",
    "push": "hub.push",
    "regenerate": "data.regenerate",
    "register_loss": "training.losses",
    "register_verifier": "verifier.parts",
    "save_adapter": "training.adapters",
    "start_linearly": "training.initialization",
    "train": "training.run",
}

__all__ = [*_MODULE_OF]


# PeagleConfig and PeagleForSpeculation register themselves with the Auto classes when they are imported. The program
# `peagle-hf` leaves that to the command that it runs: importing torch and transformers takes seconds.
if Path(sys.argv[0]).stem != "peagle-hf":
    import_module(".model.drafter", __name__)

if TYPE_CHECKING:
    from .cli.parsing import parse_arguments
    from .console import command_line, end_processes
    from .data.collator import CODDataCollator
    from .data.dataset import HiddenStatesDataset
    from .data.endpoint_states import Endpoint
    from .data.extract import ExtractArguments, extract
    from .data.prepare import PrepareArguments, prepare
    from .data.regenerate import RegenerateArguments, regenerate
    from .errors import PeagleError
    from .evaluation.acceptance import AcceptanceArguments, acceptance
    from .evaluation.benchmark import EvaluateArguments, evaluate
    from .evaluation.plan import PlanArguments, plan
    from .hub.push import PushArguments, push
    from .model.config import PeagleConfig
    from .model.drafter import PeagleForSpeculation
    from .model.generation import draft_and_verify
    from .training.adapters import add_adapter, load_adapter, merge_adapter, save_adapter
    from .training.arguments import PeagleTrainingArguments
    from .training.export_callback import VllmExportCallback
    from .training.initialization import start_linearly
    from .training.losses import register_loss
    from .training.push_callback import PushToHubCallback
    from .training.run import build_datasets, build_drafter, build_trainer, checkpoint_to_resume, train
    from .training.trainer import PeagleTrainer
    from .verifier.head import VerifierHead
    from .verifier.parts import VerifierParts, register_verifier


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
