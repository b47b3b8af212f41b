"""Which arguments of the Hugging Face Trainer work here, which are refused, and which need another one to matter."""

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from ..arguments import check_choices, check_ranges, check_types, default_of, flag_of, plain
from ..errors import PeagleError
from .optimizer import default_weight_decay

logger = logging.getLogger(__name__)

WORKS = frozenset(
    (
        *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "gradient_accumulation_steps"),
        *("max_grad_norm", "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend"),
        *("torch_compile_mode", "torch_empty_cache_steps", "logging_strategy", "logging_steps", "logging_first_step"),
        *("log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
        *("trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay"),
        *("per_device_eval_batch_size", "eval_on_start", "save_only_model", "save_strategy", "save_steps"),
        *("save_on_each_node", "save_total_limit", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
        *("hub_strategy", "hub_revision", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "use_cpu"),
        *("accelerator_config", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("remove_unused_columns", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug", "skip_memory_metrics"),
        *("enable_jit_checkpoint", "do_train", "do_eval", "resume_from_checkpoint", "local_rank"),
    )
)
"""Arguments of the Trainer that do here what its documentation says, within `check_trainer_arguments`."""

HELP = {
    "gradient_checkpointing": "The older name of --activation-checkpointing.",
    "resume_from_checkpoint": "Go on from this checkpoint (default: from the newest one in the output folder).",
}
"""What `--help` says of arguments that do something else here than the Trainer's own help says."""

REFUSED = {
    "label_smoothing_factor": "the drafter learns from the verifier's distributions, which have no labels to smooth",
    "neftune_noise_alpha": "the embeddings are read beside the verifier's states, so noise on them alone misleads",
    "use_liger_kernel": "Liger has no kernels for a drafter; its own loss never makes the logits whole",
    "liger_kernel_config": "Liger has no kernels for a drafter",
    "use_cache": "training caches no keys and values; drafting always does",
    "train_sampling_strategy": "packed sequences are alike in length, and are shuffled with the seed",
    "length_column_name": "packed sequences are alike in length",
    "label_names": "the labels are always called labels",
    "average_tokens_across_devices": "labels are always counted over all processes, so that their number is free",
    "bf16_full_eval": "it would round the weights for good; validation runs in the precision of training",
    "fp16_full_eval": "it would round the weights for good; validation runs in the precision of training",
    "auto_find_batch_size": "--sequence-partitions auto fits a batch into the memory without changing it",
    "prediction_loss_only": "validation always counts acceptance, and never makes the logits whole",
    "eval_do_concat_batches": "validation keeps counts, not predictions",
    "eval_accumulation_steps": "validation keeps counts, not predictions",
    "eval_use_gather_object": "validation gathers counts, not objects",
    "include_for_metrics": "validation counts acceptance and never makes the logits whole",
    "batch_eval_metrics": "validation counts acceptance and never makes the logits whole",
    "hub_always_push": "training waits for each upload, so that none is ever left out",
    "ignore_data_skip": "a resumed run continues at the packed sequence where it stopped, which costs no time",
    "dataloader_in_order": "batches would come as the workers finish them, and no seed would fix a run",
    "ddp_static_graph": "what a batch's documents attend to changes the graph",
    "parallelism_config": "training runs on one process, or several with DDP, FSDP or DeepSpeed",
    "do_predict": "examples of the Trainer read it, and this training doesn't",
}
"""Arguments of the Trainer that have no meaning for a drafter or would do harm, and why."""

REFUSED_PARAMETERS = {
    "compute_loss_func": "losses are chosen by loss_fn; a new one is added with peagle_hf.register_loss",
    "compute_metrics": "validation counts acceptance and never makes the logits whole",
    "preprocess_logits_for_metrics": "validation counts acceptance and never makes the logits whole",
}
"""Parameters of the Trainer's constructor that `PeagleTrainer` doesn't take, and why."""


class Need(NamedTuple):
    """Arguments that do nothing unless a condition holds, and that condition, for the program and in words."""

    names: tuple[str, ...]
    holds: Callable[[Any], bool]
    words: str


def _in_steps(name: str) -> Callable[[Any], bool]:
    return lambda args: getattr(args, name) == "steps"


_NO_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
NEEDS = (
    Need(("lora_alpha", "lora_dropout", "lora_modules_to_save"), lambda args: args.lora_r is not None, "--lora-r"),
    Need(
        ("token_freq_path",),
        lambda args: args.draft_vocab_size is not None or args.from_pretrained,
        "--draft-vocab-size",
    ),
    Need(
        ("dpace_alpha",),
        lambda args: args.per_position_loss_weight == "dpace",
        "--per-position-loss-weight dpace",
    ),
    Need(
        ("vllm_endpoint", "on_generate"),
        lambda args: args.on_missing == "generate",
        "--on-missing generate",
    ),
    Need(
        ("server_hidden_states_path", "request_timeout", "max_retries"),
        lambda args: args.asks_servers,
        "--on-missing generate and --vllm-endpoint",
    ),
    Need(
        ("verifier_device",),
        lambda args: args.runs_verifier,
        "--on-missing generate, which runs the verifier in this process without --vllm-endpoint",
    ),
    Need(
        ("memory_budget",),
        lambda args: args.memory_report or args.sequence_partitions == "auto",
        "--sequence-partitions auto or --memory-report",
    ),
    Need(
        ("keep_attention", "activation_checkpointing_kwargs"),
        lambda args: args.activation_checkpointing,
        "--activation-checkpointing",
    ),
    Need(("logging_steps",), _in_steps("logging_strategy"), "--logging-strategy steps"),
    Need(("eval_steps",), _in_steps("eval_strategy"), "--eval-strategy steps"),
    Need(("save_steps",), _in_steps("save_strategy"), "--save-strategy steps"),
    Need(
        ("eval_delay", "eval_on_start", "metric_for_best_model"),
        lambda args: args.eval_strategy != "no",
        "validation: neither --eval-strategy no nor --train-data-ratio 1",
    ),
    Need(
        ("save_total_limit", "save_only_model"),
        lambda args: args.save_strategy != "no",
        "checkpoints: --save-strategy epoch or steps",
    ),
    Need(("warmup_steps",), lambda args: args.lr_scheduler_type not in _NO_WARMUP, "a schedule with a warm-up"),
    Need(
        ("optim_target_modules",),
        lambda args: is_low_rank(args.optim),
        "an --optim that projects gradients, such as galore_adamw",
    ),
    Need(("hub_strategy",), lambda args: args.push_to_hub, "--push-to-hub"),
    Need(("run_name", "project"), lambda args: args.report_to, "--report-to with a tracker"),
    Need(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda args: "trackio" in args.report_to,
        "--report-to trackio",
    ),
    Need(
        ("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        lambda args: args.dataloader_num_workers > 0,
        "--dataloader-num-workers",
    ),
    Need(
        ("fsdp_config",),
        lambda args: args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        "--fsdp",
    ),
)
"""Arguments that are named in a warning where they have no effect."""

CONTRADICTIONS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda args: args.max_steps == 0 or args.max_steps < -1,
        "--max-steps is {args.max_steps} but must be at least 1 (-1: as many as --epochs).",
    ),
    (
        lambda args: (
            args.sequence_partitions != "auto"
            and not (args.sequence_partitions.isdecimal() and int(args.sequence_partitions))
        ),
        "--sequence-partitions is {args.sequence_partitions!r}. Give a number of parts from 1 on, or auto.",
    ),
    (
        lambda args: args.remove_unused_columns,
        "--remove-unused-columns must stay False: the collator needs all columns of a sample.",
    ),
    (
        lambda args: args.lora_r is not None and args.from_pretrained is None,
        "--lora-r adapts a trained drafter: name it with --from-pretrained.",
    ),
    (
        lambda args: args.lora_r is not None and args.train_head,
        "--train-head trains the head itself. Beside --lora-r name it with --lora-modules-to-save.",
    ),
    (
        lambda args: args.fp16 and args.bf16,
        "--fp16 and --bf16 are both on. Choose one of them.",
    ),
    (
        lambda args: args.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1,
        "--ddp-backend is {args.ddp_backend}, but this is one process, which has nobody to talk to. Leave it out, or "
        "start several with torchrun.",
    ),
    (
        lambda args: args.memory_report and args.dry_run,
        "--memory-report and --dry-run each print something else and stop. Choose one of them.",
    ),
    (
        lambda args: args.resume_from_checkpoint and not args.resume,
        "--no-resume starts afresh, but --resume-from-checkpoint names {args.resume_from_checkpoint}. Leave one out.",
    ),
    (
        lambda args: args.train_data_ratio == 1 and plain(args.eval_strategy) == "steps",
        "--train-data-ratio 1 leaves nothing to validate on, but --eval-strategy is steps. Lower the ratio, or leave "
        "the strategy out.",
    ),
    (
        lambda args: (
            plain(args.save_strategy) == "best" and (args.train_data_ratio == 1 or plain(args.eval_strategy) == "no")
        ),
        "--save-strategy best saves what validates best, but nothing is validated, so nothing would be left of the "
        "training. Pass --save-strategy epoch, or validate: lower --train-data-ratio, leave --eval-strategy out.",
    ),
    (
        lambda args: (
            not args.from_pretrained
            and (args.down_sample_ratio_min or 0) > (0.7 if args.down_sample_ratio is None else args.down_sample_ratio)
        ),
        "--down-sample-ratio-min is {args.down_sample_ratio_min}, above --down-sample-ratio (default 0.7), which would "
        "then do nothing. Lower the one or raise the other.",
    ),
)
"""Values that are refused, alone or together, and the message; `args` in it stands for all arguments."""

_RANGES = {
    **dict.fromkeys(("num_layers", "num_depths", "max_anchors", "sliding_window", "draft_vocab_size"), (1, math.inf)),
    **dict.fromkeys(("lora_r", "per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "total_seq_len"), (1, math.inf)),
    **dict.fromkeys(("mask_token_id", "max_retries", "dataloader_num_workers", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("max_grad_norm", "warmup_steps", "eval_delay", "target_layer_ids"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "down_sample_ratio": (0, 1),
    "down_sample_ratio_min": (0, 1),
    "dpace_alpha": (0, 1),
    "train_data_ratio": (0, 1),
}
"""The least and the greatest values of arguments that are numbers."""
_ABOVE_0 = (
    *("num_train_epochs", "learning_rate", "depth_loss_decay", "dpace_alpha", "logging_steps", "save_steps"),
    *("eval_steps", "memory_budget", "train_data_ratio", "down_sample_ratio", "request_timeout", "lora_alpha"),
)

_CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "early_stop", "debug", "offload"}
_ACCELERATOR = {"non_blocking", "use_configured_state"}


@contextmanager
def refused_arguments() -> Iterator[None]:
    """Raise the Trainer's errors about arguments and missing libraries as `PeagleError`."""
    try:
        yield
    except PeagleError:
        raise
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise PeagleError(f"The Trainer refuses these arguments: {' '.join(str(error).split())}") from error


def is_given(args: TrainingArguments, name: str) -> bool:
    """Whether an argument has another value than its default."""
    (field,) = (one for one in fields(args) if one.name == name)
    value, default = getattr(args, name), default_of(field)
    return value is not None and value != default


def check_names_of_trainer(args: TrainingArguments) -> None:
    """Refuse arguments of the Trainer that can't be used here, and those that this version doesn't know.

    Raises:
        PeagleError: such an argument is given; the message names its flag and the reason.
    """
    trainers_own = {field.name for field in fields(TrainingArguments)}
    for name in sorted(trainers_own - WORKS):
        if is_given(args, name):
            reason = REFUSED.get(name, "it is new in this transformers, and this peagle_hf was made before it")
            raise PeagleError(f"{flag_of(name)} can't be used here: {reason}.")


def check_own_values(args: Any) -> None:
    """Refuse numbers out of their ranges, what is no number where one is needed, and what is none of the choices.

    Raises:
        PeagleError: there is such a value; the message names its flag and the range or the choices.
    """
    check_choices(args)
    check_types(args)
    check_ranges(args, _RANGES)
    for name in _ABOVE_0:
        value = getattr(args, name)
        is_unused = name == "num_train_epochs" and args.max_steps > 0
        if value is not None and not is_unused and not 0 < value < math.inf:
            raise PeagleError(f"{flag_of(name)} is {value} but must be above 0.")


def check_trial(args: Any, before: Mapping[str, Any]) -> None:
    """Refuse what a trial of a search has set and training wouldn't heed; an optimizer gets its own weight decay.

    Args:
        args: a `PeagleTrainingArguments` as the trial has changed it.
        before: its values until then.

    Raises:
        PeagleError: names the flag and the reason.
    """
    changed = {name for name, value in vars(args).items() if value != before.get(name)}
    for name in sorted(changed & REFUSED.keys()):
        raise PeagleError(f"{flag_of(name)} can't be used here: {REFUSED[name]}.")
    check_own_values(args)
    if "optim" in changed and "weight_decay" not in changed and args.as_given["weight_decay"] is None:
        args.weight_decay = default_weight_decay(args.optim, args.lora_r)


def check_contradictions(args: TrainingArguments) -> None:
    """Refuse values that are impossible, alone or together (see `CONTRADICTIONS`).

    Raises:
        PeagleError: there are such values; the message names their flags.
    """
    for holds, message in CONTRADICTIONS:
        if holds(args):
            raise PeagleError(message.format(args=args))


def warn_of_unused(args: TrainingArguments) -> None:
    """Name arguments that have no effect beside the others (see `NEEDS`); one file may hold them for several runs."""
    for names, holds, words in NEEDS:
        for name in names:
            if is_given(args, name) and not holds(args):
                logger.warning("%s %s has no effect without %s.", flag_of(name), getattr(args, name), words)


def check_values(args: Any) -> None:
    """Refuse values that the Trainer would ignore, or notice only after everything is loaded.

    Args:
        args: a `PeagleTrainingArguments` that the Trainer's own `__post_init__` has been through.

    Raises:
        PeagleError: there is such a value; the message names its flag and what it takes.
    """
    if args.fp16 and args.device.type == "cpu":
        raise PeagleError("--fp16 needs a GPU: a CPU would train in float32. Leave it out, or use --bf16.")
    seen = args.include_num_input_tokens_seen
    if seen not in ("no", "all"):
        raise PeagleError(
            f"--include-num-input-tokens-seen is {seen!r}. Give all or no: there is no padding to leave out."
        )
    if "tpu_metrics_debug" in [option.value for option in args.debug]:
        raise PeagleError("--debug tpu_metrics_debug is for TPUs, which drafters aren't trained on.")
    unknown = set(args.activation_checkpointing_kwargs or {}) - _CHECKPOINTING
    if unknown:
        raise PeagleError(
            f"--activation-checkpointing-kwargs has {', '.join(sorted(unknown))}. It takes "
            f"{', '.join(sorted(_CHECKPOINTING))}; all layers are checkpointed."
        )
    default = AcceleratorConfig()
    for name, value in vars(args.accelerator_config).items():
        if name not in _ACCELERATOR and value != getattr(default, name):
            raise PeagleError(
                f"--accelerator-config sets {name}, but may set {' and '.join(sorted(_ACCELERATOR))} only: data are "
                "shared between processes by the trainer itself, and accumulated by --gradient-accumulation-steps."
            )
    _check_compiler(args)
    if args.dataloader_multiprocessing_context not in (None, *torch.multiprocessing.get_all_start_methods()):
        raise PeagleError(
            f"--dataloader-multiprocessing-context is {args.dataloader_multiprocessing_context!r} but must be one of "
            f"{', '.join(torch.multiprocessing.get_all_start_methods())}."
        )


def _check_compiler(args: TrainingArguments) -> None:
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    backends = [one.value.lower() for one in DynamoBackend if one is not DynamoBackend.NO]
    if backend is not None and backend.lower() not in backends:
        raise PeagleError(f"--torch-compile-backend is {backend!r} but must be one of {', '.join(backends)}.")
    if mode is not None:
        modes = ["default", *sorted(torch._inductor.list_mode_options())]
        if mode not in modes or (backend or "inductor").lower() != "inductor":
            raise PeagleError(
                f"--torch-compile-mode {mode} is none of the backend {backend}. inductor has {', '.join(modes)}; other "
                "backends have none."
            )


def is_low_rank(optim: str) -> bool:
    """Whether an optimizer of the Trainer works on projections of the gradients (GaLore, APOLLO)."""
    return str(getattr(optim, "value", optim)).startswith(("galore", "apollo"))


def check_optimizer(args: TrainingArguments) -> None:
    """Refuse an optimizer of the Trainer that isn't installed, and options that it doesn't read.

    Args:
        args: with the name of one of the Trainer's own optimizers as `optim`.

    Raises:
        PeagleError: the optimizer isn't installed or doesn't read an option; the message names it.
    """
    # Importing it takes seconds, so it is imported only when it is needed.
    from transformers import Trainer

    if is_low_rank(args.optim) and args.optim_target_modules is None:
        raise PeagleError(f"--optim {plain(args.optim)} needs --optim-target-modules, for example all-linear.")
    if is_low_rank(args.optim) or args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
        # The Trainer needs the model to choose these optimizers, so they are checked when it is built.
        return
    with refused_arguments():
        wanted = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    options = [one for one in (args.optim_args or "").replace(" ", "").split(",") if one]
    changes = {one: ("optim_args", ",".join(other for other in options if other != one) or None) for one in options}
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        (field,) = (one for one in fields(args) if one.name == name)
        if is_given(args, name):
            changes[flag_of(name)] = (name, default_of(field))
    for given, (name, value) in changes.items():
        changed = copy.copy(args)
        setattr(changed, name, value)
        if Trainer.get_optimizer_cls_and_kwargs(changed)[1] == wanted:
            raise PeagleError(f"--optim {plain(args.optim)} takes no {given}, or that is its default. Leave it out.")


def check_scheduler(args: TrainingArguments) -> None:
    """Refuse a schedule that lacks arguments of its own before anything is loaded.

    Raises:
        PeagleError: an argument is missing; the message names it.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)])
    kwargs: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, kwargs)
    except (TypeError, ValueError) as error:
        raise PeagleError(
            f"--lr-scheduler-type {plain(args.lr_scheduler_type)} needs other --lr-scheduler-kwargs than "
            f"{args.lr_scheduler_kwargs}: {error}. Give them as JSON, such as '{{\"num_decay_steps\": 100}}'."
        ) from error


def check_tracker(name: str) -> None:
    """Refuse a tracker of `report_to` that the Trainer doesn't know or that can't be used here.

    Raises:
        PeagleError: the tracker is unknown, or its library isn't installed.
    """
    if name not in INTEGRATION_TO_CALLBACK:
        raise PeagleError(f"report_to names {name!r}, which is none of {', '.join(INTEGRATION_TO_CALLBACK)}.")
    # transformers leaves these two out of its list of installed trackers, even where they are installed. If they are
    # not, the Trainer refuses them later.
    if name not in ("azure_ml", "flyte", *get_available_reporting_integrations()):
        raise PeagleError(
            f"report_to names {name}, which isn't installed, or not set up. Run `pip install {name}`, or train without "
            "it: --report-to none."
        )


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16 itself, rather than by way of float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
