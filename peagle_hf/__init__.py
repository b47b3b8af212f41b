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

if TYPE_CHECKING:  # `as` makes them names of this package for type checkers
    from .cli.parsing import parse_arguments as parse_arguments
    from .console import command_line as command_line
    from .console import end_processes as end_processes
    from .data.collator import CODDataCollator as CODDataCollator
    from .data.dataset import HiddenStatesDataset as HiddenStatesDataset
    from .data.endpoint_states import Endpoint as Endpoint
    from .data.extract import ExtractArguments as ExtractArguments
    from .data.extract import extract as extract
    from .data.prepare import PrepareArguments as PrepareArguments
    from .data.prepare import prepare as prepare
    from .data.regenerate import RegenerateArguments as RegenerateArguments
    from .data.regenerate import regenerate as regenerate
    from .errors import PeagleError as PeagleError
    from .evaluation.acceptance import AcceptanceArguments as AcceptanceArguments
    from .evaluation.acceptance import acceptance as acceptance
    from .evaluation.benchmark import EvaluateArguments as EvaluateArguments
    from .evaluation.benchmark import evaluate as evaluate
    from .evaluation.plan import PlanArguments as PlanArguments
    from .evaluation.plan import plan as plan
    from .hub.push import PushArguments as PushArguments
    from .hub.push import push as push
    from .model.config import PeagleConfig as PeagleConfig
    from .model.drafter import PeagleForSpeculation as PeagleForSpeculation
    from .model.generation import draft_and_verify as draft_and_verify
    from .training.adapters import add_adapter as add_adapter
    from .training.adapters import load_adapter as load_adapter
    from .training.adapters import merge_adapter as merge_adapter
    from .training.adapters import save_adapter as save_adapter
    from .training.arguments import PeagleTrainingArguments as PeagleTrainingArguments
    from .training.export_callback import VllmExportCallback as VllmExportCallback
    from .training.initialization import start_linearly as start_linearly
    from .training.losses import register_loss as register_loss
    from .training.push_callback import PushToHubCallback as PushToHubCallback
    from .training.run import build_datasets as build_datasets
    from .training.run import build_drafter as build_drafter
    from .training.run import build_trainer as build_trainer
    from .training.run import checkpoint_to_resume as checkpoint_to_resume
    from .training.run import train as train
    from .training.trainer import PeagleTrainer as PeagleTrainer
    from .verifier.head import VerifierHead as VerifierHead
    from .verifier.parts import VerifierParts as VerifierParts
    from .verifier.parts import register_verifier as register_verifier


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
