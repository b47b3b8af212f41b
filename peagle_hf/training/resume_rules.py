"""The rules of resuming: which arguments and inputs may differ from the earlier part of the run, and which may not."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import flag_of
from ..console import number_of
from ..errors import PeagleError
from .record import RunRecord

logger = logging.getLogger(__name__)

FREE, REFUSED, EQUIVALENT = "free", "refused", "equivalent"
BY_CONTENT = "refused by content"
"""Refused as well, but not because the argument differs: the record compares what the argument leads to."""


def _names(rule: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), rule)


ON_RESUME: dict[str, str] = {
    # The schedule and the settings of the optimizer, which take effect from the resumed step on.
    **_names(FREE, "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_grad_norm"),
    **_names(FREE, "weight_decay adam_beta1 adam_beta2 adam_epsilon num_train_epochs max_steps"),
    # Validation, saving, logging and uploads.
    **_names(FREE, "do_eval eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size"),
    **_names(FREE, "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object prediction_loss_only"),
    **_names(FREE, "bf16_full_eval fp16_full_eval batch_eval_metrics include_for_metrics do_predict"),
    **_names(FREE, "metric_for_best_model greater_is_better load_best_model_at_end"),
    **_names(FREE, "save_strategy save_steps save_total_limit save_only_model save_on_each_node export_dtype"),
    **_names(FREE, "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_on_each_node"),
    **_names(FREE, "log_level log_level_replica disable_tqdm include_num_input_tokens_seen"),
    **_names(FREE, "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"),
    **_names(FREE, "skip_memory_metrics push_to_hub hub_token hub_private_repo hub_model_id hub_strategy"),
    **_names(FREE, "hub_always_push hub_revision verifier_name output_dir enable_jit_checkpoint"),
    # How it is computed, with the same result up to rounding.
    **_names(FREE, "use_cpu tf32 torch_compile torch_compile_backend torch_compile_mode"),
    **_names(FREE, "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing"),
    **_names(FREE, "activation_checkpointing_kwargs keep_attention sequence_partitions memory_budget"),
    **_names(FREE, "torch_empty_cache_steps use_cache full_determinism debug"),
    **_names(FREE, "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers"),
    **_names(FREE, "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order"),
    **_names(FREE, "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend"),
    **_names(FREE, "ddp_timeout local_rank fsdp fsdp_config deepspeed parallelism_config"),
    # Where hidden states come from, and how servers are asked. The samples themselves are compared by content.
    **_names(FREE, "on_missing vllm_endpoint on_generate server_hidden_states_path request_timeout max_retries"),
    **_names(FREE, "verifier_device"),
    **_names(FREE, "skip_rows"),  # all other samples keep their places in the order
    # Arguments that matter for one start of a run only.
    **_names(FREE, "resume resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint do_train"),
    **_names(FREE, "memory_report dry_run linear_start trust_remote_code"),
    # What decides which samples a step trains on.
    **_names(EQUIVALENT, "per_device_train_batch_size gradient_accumulation_steps"),
    **_names(REFUSED, "seed data_seed train_data_ratio total_seq_len dataloader_drop_last auto_find_batch_size"),
    **_names(REFUSED, "train_sampling_strategy length_column_name accelerator_config"),
    **_names(REFUSED, "remove_unused_columns label_names average_tokens_across_devices"),
    # What decides the loss, the kind of optimizer and the precision.
    **_names(REFUSED, "loss_fn depth_loss_decay per_position_loss_weight dpace_alpha optim optim_args bf16 fp16"),
    **_names(REFUSED, "optim_target_modules label_smoothing_factor neftune_noise_alpha use_liger_kernel"),
    **_names(REFUSED, "liger_kernel_config"),
    # What decides the drafter and which of its weights are trained.
    **_names(REFUSED, "speculator_type train_head lora_r lora_alpha lora_dropout lora_modules_to_save"),
    **_names(BY_CONTENT, "data_path hidden_states_path verifier_name_or_path verifier_revision from_pretrained"),
    **_names(BY_CONTENT, "token_freq_path num_layers draft_arch draft_vocab_size mask_token_id target_layer_ids"),
    **_names(BY_CONTENT, "norm_before_residual norm_before_fc fc_norm sliding_window embed_requires_grad"),
    **_names(BY_CONTENT, "num_depths down_sample_ratio down_sample_ratio_min max_anchors"),
}
"""The rule for each argument whose value differs when a run is resumed.

`FREE`: it takes effect from the resumed step on, and the log says so. `REFUSED`: the run isn't resumed. `EQUIVALENT`:
it is taken if each step still has the same samples: 1 process with 2 accumulation steps and 2 processes with 1 have.
"""

_UNMENTIONED = {
    *("output_dir", "run_name", "project", "resume", "resume_from_checkpoint", "local_rank", "disable_tqdm"),
    *("hub_token", "dry_run", "memory_report", "eval_on_start"),
}
"""Free arguments that the log doesn't mention when they change."""

_REMEDY = (
    "Give the earlier values again to go on with that run. To train with the new ones start another run: in the same "
    "folder with --no-resume, with another --save-path, or from this checkpoint's weights with --from-pretrained."
)


def changes_between(before: RunRecord, now: RunRecord) -> tuple[dict[str, list[Any]], list[str]]:
    """Compare two records: allowed differences as [before, now] by name, and refused differences as phrases."""
    taken: dict[str, list[Any]] = {}
    refused: list[str] = []
    for name in sorted(before.arguments.keys() & now.arguments.keys()):
        old, new = before.arguments[name], now.arguments[name]
        rule = ON_RESUME.get(name, REFUSED)
        # Another version of a library may have added keys, so only the common ones are compared.
        if isinstance(old, dict) and isinstance(new, dict):
            common = old.keys() & new.keys()
            old, new = ({key: one[key] for key in sorted(common)} for one in (old, new))
        if old == new or rule == BY_CONTENT:
            continue
        if rule == REFUSED:
            refused.append(f"{flag_of(name)} was {_shown(old)}, is {_shown(new)}")
        elif name not in _UNMENTIONED:
            taken[name] = [old, new]
    named = {name for name in before.arguments if any(phrase.startswith(f"{flag_of(name)} ") for phrase in refused)}
    for name, words in _WORDS.items():
        old, new = getattr(before, name), getattr(now, name)
        if old is not None and new is not None and old != new and not named & _EXPLAINED_BY.get(name, set()):
            refused.append(f"{words} {_shown(old)}, {_shown(new)} now")
            named.add(name)
    if before.hidden_states and now.hidden_states and not refused:
        refused += [
            f"the {name} of the hidden states was {_shown(old)}, is {_shown(new)}"
            for name, old in before.hidden_states.items()
            if old is not None and (new := now.hidden_states.get(name)) is not None and new != old
        ]
    refused += _other_steps(before, now, taken)
    refused += _other_sharding(before, now)
    for name in ("device", "processes", "sharding", "versions"):
        old, new = getattr(before, name), getattr(now, name)
        if old is not None and old != new:
            taken[name] = [old, new]
    return taken, refused


_WORDS = {
    "data": "the prepared samples were",
    "samples": "the training samples among them were",
    "validation_samples": "the validation samples among them were",
    "packing": "the packed sequences were",
    "verifier": "the verifier's weights were",
    "start": "the drafter of --from-pretrained was",
    "draft_vocabulary": "the draft vocabulary was",
    "adapter": "the adapter was",
    "trained": "the trained parameters were",
    "optimizer": "the optimizer was",
    "precision": "the precision was",
}
"""Fields of the record that must stay, with the words that name them in a message."""

_ROWS = {"seed", "train_data_ratio", "total_seq_len"}
_ADAPTER = {"lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save"}
_EXPLAINED_BY = {
    "samples": {*_ROWS, "data"},
    "validation_samples": {*_ROWS, "data", "samples"},
    "packing": {*_ROWS, "data", "samples"},
    "draft_vocabulary": {"data"},
    "adapter": _ADAPTER,
    "trained": {*_ADAPTER, "train_head", "adapter"},
    "optimizer": {"optim"},
    "precision": {"bf16", "fp16"},
}
"""Arguments and fields whose difference explains that of a field, of which no more need be said then."""


def _other_steps(before: RunRecord, now: RunRecord, taken: dict[str, list[Any]]) -> list[str]:
    """Refuse steps that would have other samples; `taken` holds changes of batch size and accumulation."""
    if before.rows_per_step is None or now.rows_per_step is None:
        return []
    described = [
        f"{number_of(one.rows_per_step or 0, 'packed sequence')} a step (processes: {one.processes or '?'} x "
        f"--per-device-train-batch-size {one.arguments.get('per_device_train_batch_size', '?')} x "
        f"--gradient-accumulation-steps {one.arguments.get('gradient_accumulation_steps', '?')})"
        for one in (before, now)
    ]
    if before.rows_per_step != now.rows_per_step:
        per_device = now.rows_per_step // now.arguments["gradient_accumulation_steps"]
        steps, rest = divmod(before.rows_per_step, per_device)
        advice = "" if rest else f": with --gradient-accumulation-steps {steps} each step has the same ones"
        return [f"there were {described[0]}, there are {described[1]} now{advice}"]
    divided = ("per_device_train_batch_size", "gradient_accumulation_steps")
    is_other = before.processes != now.processes or any(name in taken for name in divided)
    if is_other and (now.arguments.get("lora_dropout") or now.arguments.get("dataloader_drop_last")):
        dropout = "--lora-dropout would drop other values" if now.arguments.get("lora_dropout") else ""
        reason = dropout or "--dataloader-drop-last would leave out other sequences"
        return [f"there were {described[0]}, there are {described[1]} now: as many, but {reason}"]
    return []


def _other_sharding(before: RunRecord, now: RunRecord) -> list[str]:
    """Refuse optimizer states that can't be divided anew: those of ZeRO and of FSDP1 are in shards."""
    old, new = before.sharding, now.sharding
    if old is None or new is None or old == new or not any("ZeRO" in one or one == "FSDP1" for one in (old, new)):
        return []
    was, would_be = ("whole" if one == "none" else f"divided by {one}" for one in (old, new))
    return [f"the optimizer's states were {was}, would be {would_be} now, and can't be converted"]


def check_resume(folder: Path, before: RunRecord, now: RunRecord, step: int, others: Sequence[str] = ()) -> RunRecord:
    """Compare a run with the one that it goes on from, log what changed, and give its record from here on.

    Args:
        folder: the checkpoint.
        before: its record.
        step: its optimizer steps.
        others: more that differs and must not, as phrases.

    Raises:
        PeagleError: a setting differs that must not; the message names all of these and what to do.
    """
    taken, refused = changes_between(before, now)
    if refused := [*others, *refused]:
        raise PeagleError(f"{folder} can't be resumed, as it is of another run: {'; '.join(refused)}. {_REMEDY}")
    if taken:
        _log_changes(taken)
    changes = [*before.changes, *([{"step": step, **taken}] if taken else [])]
    return replace(now, changes=changes)


def note_settings(
    now: RunRecord, before: RunRecord | None, optimizer: list[dict[str, Any]], schedule: dict[str, Any]
) -> RunRecord:
    """Add the settings of the optimizer and the schedule to a record, and log those that changed."""
    taken: dict[str, list[Any]] = {}
    if before is not None and before.optimizer_settings is not None and before.schedule is not None:
        if len(before.optimizer_settings) != len(optimizer):
            raise PeagleError(
                f"The optimizer had {len(before.optimizer_settings)} groups of parameters and has {len(optimizer)} "
                f"now, so that its states can't be loaded. {_REMEDY}"
            )
        known = set(now.changes[-1]) if now.changes else set()
        for old, new in zip([*before.optimizer_settings, before.schedule], [*optimizer, schedule], strict=True):
            for name in sorted(old.keys() | new.keys()):
                if old.get(name) != new.get(name) and not _ALSO_CALLED.get(name, {name}) & known:
                    taken[name] = [old.get(name), new.get(name)]
    if taken:
        _log_changes(taken)
    changes = [*now.changes, *([taken] if taken else [])]
    return replace(now, optimizer_settings=optimizer, schedule=schedule, changes=changes)


_ALSO_CALLED = {
    "lr": {"learning_rate"},
    "betas": {"adam_beta1", "adam_beta2"},
    "eps": {"adam_epsilon"},
    "class": {"lr_scheduler_type"},
}
"""Settings of an optimizer or schedule that come from arguments, whose change is logged already."""


def _log_changes(taken: Mapping[str, list[Any]]) -> None:
    listed = ", ".join(f"{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in taken.items())
    logger.info("Changed since the run began, and in effect from here on: %s.", listed)


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
