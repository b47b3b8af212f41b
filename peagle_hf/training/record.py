"""Records of a training: `run.json`, the inputs of a run, and `training.json`, how a drafter was trained so far.

`run.json` is written into the output folder before the first step, and into each checkpoint, so that a checkpoint has
it wherever it is copied. Nothing is compared by a path: data, verifier, cache and drafter are compared by content.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import SchedulerType, Trainer
from transformers.training_args import OptimizerNames

from .. import __version__
from ..arguments import plain
from ..console import number_of
from ..data.cache_manifest import Manifest
from ..data.dataset import HiddenStatesDataset
from ..data.prepared_dataset import read_chat_options, read_prepare_record, rows_fingerprint
from ..data.tokenizer import ChatOptions
from ..errors import PeagleError
from ..files import read_json, write_json
from ..fingerprint import weights_of
from ..model.served_checkpoint import RUN_RECORD
from ..redaction import public_settings
from .arguments import PeagleTrainingArguments
from .optimizer import MUON
from .sharding import sharding_of

if TYPE_CHECKING:
    from .trainer import PeagleTrainer

FORMAT_VERSION = 1

_NO_SETTINGS_OF_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}
_PATHS = ("data_path", "hidden_states_path", "output_dir", "from_pretrained", "token_freq_path")


@dataclass(frozen=True)
class RunRecord:
    """The inputs of a run, as JSON values; a field that is None isn't known and isn't compared.

    Attributes:
        arguments: all of `PeagleTrainingArguments` but secrets; paths as seen from the output folder.
        data: fingerprint of the prepared samples (see `data.prepared_dataset.rows_fingerprint`).
        samples: number and digest of those that are trained on.
        validation_samples: the same of those that it validates on, by the name of the data set.
        packing: number and digest of the packed sequences.
        verifier: its fingerprint or commit (see `fingerprint.weights_of`).
        hidden_states: what the cache's manifest says of its states.
        start: fingerprint of the drafter that `from_pretrained` names, "new" without it.
        draft_vocabulary: digest of its tokens.
        trained: number and digest of the names and shapes of the parameters that are trained.
        adapter: PEFT's settings of a LoRA adapter, "none" without one.
        optimizer: the class of an optimizer that was given to the trainer, a subclass's method that makes it, or the
            name of `optim`.
        optimizer_settings: of each parameter group as the optimizer was made, without its parameters.
        schedule: class and settings of the learning-rate schedule as it was made.
        rows_per_step: packed sequences in an optimizer step: processes x batch size x accumulation steps.
        processes: their number.
        sharding: how weights and optimizer are divided among processes: "none", "FSDP2", "ZeRO-2 of 4 processes" …
        precision: of the computation.
        device: its name.
        versions: of the libraries.
        changes: settings that changed when the run was resumed: {"step": …, "<field>": [before, after]}.
    """

    arguments: dict[str, Any]
    data: str | None = None
    samples: str | None = None
    validation_samples: str | dict[str, str] | None = None
    packing: str | None = None
    verifier: str | None = None
    hidden_states: dict[str, Any] | None = None
    start: str | None = None
    draft_vocabulary: str | None = None
    trained: str | None = None
    adapter: dict[str, Any] | str | None = None
    optimizer: str | None = None
    optimizer_settings: list[dict[str, Any]] | None = None
    schedule: dict[str, Any] | None = None
    rows_per_step: int | None = None
    processes: int | None = None
    sharding: str | None = None
    precision: str | None = None
    device: str | None = None
    versions: dict[str, str] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "RunRecord":
        """The record in a checkpoint or an output folder.

        Raises:
            PeagleError: the record is missing or damaged, or a later version wrote it.
        """
        path = Path(folder) / RUN_RECORD
        remedy = "Copy it from another checkpoint of the same run, or start anew with --no-resume."
        content = read_json(path, remedy)
        if content.get("format_version", 0) > FORMAT_VERSION:
            raise PeagleError(
                f"{path} was written by a later version of peagle_hf. Update peagle_hf to resume this run."
            )
        known = {one.name for one in fields(cls)}
        if not isinstance(content.get("arguments"), dict):
            raise PeagleError(f"{path} is damaged: it has no arguments. {remedy}")
        return cls(**{name: value for name, value in content.items() if name in known})

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder, atomically."""
        write_json(Path(folder) / RUN_RECORD, asdict(self))


def arguments_of(args: PeagleTrainingArguments) -> dict[str, Any]:
    """All arguments as JSON values, without secrets, with paths as they are seen from the output folder."""
    values: dict[str, Any] = public_settings({name: plain(value) for name, value in args.to_dict().items()})
    for name in _PATHS:
        value = values.get(name)
        if value is not None and os.path.exists(value):
            values[name] = _relative(value, args.output_dir or ".")
    return dict(json.loads(json.dumps(values, default=str)))


def describe_run(trainer: "PeagleTrainer") -> RunRecord:
    """The record of a run that is about to start or to go on; reads the prepared samples once.

    The settings of optimizer and schedule come later (see `resume_rules.note_settings`).
    """
    args, dataset, config = trainer.args, trainer.train_dataset, trainer.config
    evaluated: Any = trainer.eval_dataset
    if isinstance(evaluated, Mapping):
        evaluated = {str(name): _samples(one) for name, one in evaluated.items()}
    elif evaluated is not None:
        evaluated = _samples(evaluated)
    manifest: Any = None
    if isinstance(dataset, HiddenStatesDataset):
        manifest = Manifest.read(dataset.hidden_states_path)
    model = trainer.accelerator.unwrap_model(trainer.model)
    start = args.from_pretrained
    return RunRecord(
        arguments=arguments_of(args),
        data=rows_fingerprint(dataset.data_path) if isinstance(dataset, HiddenStatesDataset) else None,
        samples=_samples(dataset),
        validation_samples=evaluated,
        packing=packing_of(dataset),
        verifier=_weights(config.verifier_name_or_path, args.verifier_revision),
        hidden_states=manifest and {"dtype": manifest.dtype, "storage": manifest.storage},
        start="new" if start is None else _weights(start, None) or start,
        draft_vocabulary=_draft_vocabulary(model),
        trained=_trained(model),
        adapter=_adapter(model),
        optimizer=trainer.own_optimizer
        or _own_method(trainer, "create_optimizer")
        or (MUON if args.optim == MUON else str(OptimizerNames(args.optim).value)),
        rows_per_step=args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps,
        processes=args.world_size,
        sharding=sharding_of(trainer),
        precision=_precision(args),
        device=_device_name(args),
        versions=_versions(),
    )


def describe_training(trainer: "PeagleTrainer") -> dict[str, Any]:
    """The content of `training.json`: see `PeagleTrainer.record`."""
    args, dataset, state, run = trainer.args, trainer.train_dataset, trainer.state, trainer.current_run
    origin: dict[str, Any] = {}
    options: ChatOptions | None = None
    if isinstance(dataset, HiddenStatesDataset) and (origin := read_prepare_record(dataset.data_path)):
        options = read_chat_options(dataset.data_path)
    optimizer = "Muon and AdamW" if args.optim == MUON else OptimizerNames(args.optim).value
    optimizer = _own_method(trainer, "create_optimizer") or optimizer
    schedule = f"{SchedulerType(args.lr_scheduler_type).value} from {args.learning_rate:g}"
    schedule = _own_method(trainer, "create_scheduler") or schedule
    validation = {
        name.removeprefix("eval_"): value
        for entry in state.log_history
        if entry["step"] == state.global_step
        for name, value in entry.items()
        if name.startswith(("eval_loss", "eval_accuracy", "eval_acceptance"))
    }
    return {
        "data": {name: origin[name] for name in ("data", "counts") if name in origin} or None,
        "chat_template": options and options.template,
        "chat_template_kwargs": options and options.kwargs,
        "loss": args.loss_fn,
        "depth_loss_decay": args.depth_loss_decay,
        "dpace_alpha": trainer.distillation.dpace_alpha,
        "epochs": state.epoch or 0.0,
        "steps": state.global_step,
        "rows_per_step": args.world_size * args.train_batch_size * args.gradient_accumulation_steps,
        "total_seq_len": getattr(dataset, "total_seq_len", None),
        "optimizer": f"{own}, given to the trainer" if (own := trainer.own_optimizer) else f"{optimizer}, {schedule}",
        "precision": _precision(args),
        "seed": args.seed,
        "skipped_rows": sorted(set(args.skip_rows or ())),
        "device": _device_name(args),
        "processes": args.world_size,
        "seconds": run.seconds_before + time.monotonic() - run.started,
        "validation": validation or None,
        "versions": _versions(),
    }


def _own_method(trainer: "PeagleTrainer", name: str) -> str | None:
    """A method that a subclass has in place of the Trainer's, such as `MyTrainer.create_optimizer`, else None."""
    own = trainer.__class__  # of a weak proxy, type() would be another
    return None if getattr(own, name) is getattr(Trainer, name) else f"{own.__name__}.{name}"


def _precision(args: PeagleTrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _device_name(args: PeagleTrainingArguments) -> str:
    on_gpu = args.device.type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {number_of(torch.get_num_threads(), 'thread')}"


def _versions() -> dict[str, str]:
    return {"peagle_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}


def _samples(dataset: Any) -> str | None:
    if isinstance(dataset, HiddenStatesDataset):
        rows = sorted(row for packed in dataset.plan for row in packed)
        return f"{len(rows)} ({_digest(rows)})"
    return f"{len(dataset)} items" if isinstance(dataset, Sized) else None


def packing_of(dataset: Any) -> str | None:
    """Number and digest of the packed sequences of a dataset; None of other datasets."""
    if not isinstance(dataset, HiddenStatesDataset):
        return None
    return f"{len(dataset.plan)} ({_digest(dataset.plan)})"


def _weights(name_or_path: str | None, revision: str | None) -> str | None:
    return weights_of(name_or_path, revision) if name_or_path else None


def _draft_vocabulary(model: nn.Module) -> str | None:
    d2t = next((buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "d2t"), None)
    return "all tokens" if d2t is None else f"{d2t.numel()} tokens ({_digest(d2t.tolist())})"


def _trained(model: nn.Module) -> str:
    shapes = sorted((name, list(one.shape)) for name, one in model.named_parameters() if one.requires_grad)
    return f"{len(shapes)} ({_digest(shapes)})"


def _adapter(model: nn.Module) -> dict[str, Any] | str:
    if not isinstance(model, PeftModel):
        return "none"
    config: Any = model.peft_config[model.active_adapter]
    if not isinstance(config, LoraConfig):  # other kinds of adapters have other settings
        settings = {name: value for name, value in config.to_dict().items() if name not in _NO_SETTINGS_OF_ADAPTER}
        plain_settings = json.dumps(
            settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
        )
        return dict(json.loads(plain_settings))
    modules = config.target_modules
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "modules": sorted(modules) if isinstance(modules, set | list) else modules,
        "modules_to_save": sorted(config.modules_to_save or []),
    }


def _relative(path: str, folder: str) -> str:
    try:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:  # the folder is on another drive of Windows
        return path


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
