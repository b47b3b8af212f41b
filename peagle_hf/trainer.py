"""`PeagleTrainer`: the Hugging Face Trainer over packed rows, and the functions that `peagle-hf train` is made of."""

import ctypes
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from .adapters import add_adapter, merge_adapter, save_adapter
from .callbacks import (
    MERGED,
    VllmExportCallback,
    checkpoints_by_step,
    drafter_folder,
    remove_checkpoints,
    resumable_folder,
)
from .configuration_peagle import PeagleConfig
from .data.cache import Manifest
from .data.collator import CODDataCollator
from .data.dataset import EpochSampler, HiddenStatesDataset, learnt_share, split_rows
from .data.partition import partition, partition_by_rows, partition_every_row, without_labels
from .errors import PeagleError
from .losses import parse_loss
from .memory import GIB, MemoryPlan, device_memory, report, rows_that_fit
from .metrics import COUNTERS, count_drafts, summarize
from .modeling_peagle import PeagleForSpeculation, PeagleLayer
from .target import draft_vocabulary, load_token_freq, load_verifier_config
from .training_args import PeagleTrainingArguments

logger = logging.getLogger(__name__)


class PeagleTrainer(Trainer):
    """`transformers.Trainer` for `PeagleForSpeculation`.

    Takes the Trainer's own arguments; `data_collator` defaults to the model's `CODDataCollator`. Logs, beside the
    Trainer's metrics, `accuracy_d`, `acceptance_d` and `acceptance_length` (see `metrics.summarize`), over all steps
    since the last log and all ranks; in evaluation with the prefix `eval_`.

    Evaluation drops no row: every learnt position starts a rollout of all K depths. `eval_acceptance_d` and
    `eval_acceptance_length` are of the drafts that decoding the text would make (see `metrics.count_drafts`),
    `eval_anchor_acceptance_length` is the mean over all positions. `eval_loss` is the mean over all rows, so that it
    depends neither on COD's ratios nor on the seed; the training loss, in which depths count as often as they are
    sampled, is another number.
    """

    args: PeagleTrainingArguments
    model: nn.Module

    def __init__(
        self,
        model: PeagleForSpeculation | nn.Module | None = None,
        args: PeagleTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = args or PeagleTrainingArguments()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise PeagleError(
                f"{args.n_gpu} GPUs are visible to one process, which would copy the model at every step. Start one "
                "process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
            )
        if isinstance(self.model, PeftModel) and self.is_sharded:
            raise PeagleError("An adapter can't be merged out of shards. Train it with DDP instead of FSDP or ZeRO.")
        self.config: PeagleConfig = self.accelerator.unwrap_model(self.model).config
        if data_collator is None:
            self.data_collator = CODDataCollator.from_config(self.config, seed=args.seed)
        self.eval_collator = self.data_collator
        if isinstance(self.data_collator, CODDataCollator):
            self.eval_collator = replace(self.data_collator, every_row=True)
        if args.device.type == "cpu":
            keep_freed_memory()
        for module in self.model.modules():
            if isinstance(module, PeagleForSpeculation):
                module.loss_weights = parse_loss(args.loss_fn)
            if isinstance(module, PeagleLayer):
                module.keep_attention = args.keep_attention
        self._train_counters = self._no_counters()
        self._eval_counters = self._no_counters()
        self._eval_drafts = self._no_counters()[:2]
        self._eval_loss = torch.zeros(2, dtype=torch.float64, device=args.device)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; `resume_from_checkpoint` takes a `checkpoint-N`, an epoch folder, `checkpoint_best`, or True (newest).

        Raises:
            PeagleError: the folder can't be resumed from, or the device's memory is too small; says what would help.
        """
        if resume_from_checkpoint is True:
            newest = checkpoints_by_step(self._get_output_dir(trial))
            if not newest:
                raise PeagleError(f"{self.args.output_dir} has no checkpoint to resume from. Leave out the resuming.")
            resume_from_checkpoint = str(newest[-1])
        if resume_from_checkpoint:
            folder = resumable_folder(resume_from_checkpoint)
            check_same_configuration(folder, self.config)
            resume_from_checkpoint = str(folder)
        try:
            return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        except torch.OutOfMemoryError as error:
            raise PeagleError(
                f"The memory of {self.args.device} is too small: {str(error).splitlines()[0]}\n"
                f"{report(self._memory_plan, memory_budget(self.args))}"
            ) from error

    def training_step(  # type: ignore[no-untyped-def]
        self, model, inputs, num_items_in_batch=None
    ):
        """Forward and backward, part by part with `sequence_partitions`; gradients are reduced with the last part."""
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != -100).sum()
        *others, last = self._parts(inputs)
        loss = torch.zeros((), device=self.args.device)
        for part in others:
            with self._without_reduction(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _parts(self, inputs: dict[str, Any], is_training: bool = True) -> list[dict[str, Any]]:
        if self.args.sequence_partitions == "auto":
            parts = partition_by_rows(inputs, self._rows_that_fit)
        else:
            num_parts = int(self.args.sequence_partitions)
            parts = partition(inputs, num_parts) if is_training else partition_every_row(inputs, num_parts)
        if self.is_sharded:
            # Every pass gathers the shards of all processes, so all must run equally many.
            counts = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
            parts = [without_labels(parts[0])] * (int(counts.max()) - len(parts)) + parts
        return parts

    @contextmanager
    def _without_reduction(self, model: nn.Module) -> Iterator[None]:
        """Gradients stay on the process, as in all but the last step of gradient accumulation."""
        state = self.accelerator.gradient_state
        if not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights or of the optimizer's states."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _memory_plan(self) -> MemoryPlan:
        return memory_plan(self.args, self.config)

    @cached_property
    def _rows_that_fit(self) -> int:
        budget = memory_budget(self.args)
        if budget is None:
            raise PeagleError(
                "sequence_partitions is auto, but how much memory a CPU may use is for you to say: pass "
                "--memory-budget with a number of GiB."
            )
        return rows_that_fit(self._memory_plan, budget)

    def compute_loss(  # type: ignore[no-untyped-def]
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._train_counters += outputs.counters
        return (loss, outputs) if return_outputs else loss

    def prediction_step(  # type: ignore[no-untyped-def]
        self, model, inputs, prediction_loss_only, ignore_keys=None
    ):
        inputs = self._prepare_inputs(inputs)
        sums, outcomes = torch.zeros_like(self._eval_loss), []
        for part in self._parts(inputs, is_training=False):
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**part)
            learnt = outputs.counters[COUNTERS.index("learnt")].sum()
            self._eval_counters += outputs.counters
            outcomes.append(outputs.outcomes)
            sums += torch.stack([outputs.loss.double() * learnt, learnt.double()])
        self._eval_loss += sums
        self._eval_drafts += count_drafts(torch.cat(outcomes, dim=1), self.config.num_depths)
        return sums[0] / sums[1].clamp(min=1), None, None

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_counters, self._eval_drafts = self._no_counters(), self._no_counters()[:2]
        self._eval_loss = torch.zeros_like(self._eval_loss)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss, learnt = self.accelerator.reduce(self._eval_loss, reduction="sum").tolist()
        metrics = {"loss": loss / max(learnt, 1.0)}
        counters = self.accelerator.reduce(self._eval_counters, reduction="sum")
        drafts = self.accelerator.reduce(self._eval_drafts, reduction="sum")
        metrics |= summarize(torch.cat([counters[:2], drafts]))
        metrics["anchor_acceptance_length"] = summarize(counters)["acceptance_length"]
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= summarize(self.accelerator.reduce(self._train_counters, reduction="sum"))
            self._train_counters = self._no_counters()
        super().log(logs, start_time)

    def _no_counters(self) -> torch.Tensor:
        return torch.zeros(len(COUNTERS), self.config.num_depths, dtype=torch.long, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        train_dataset = train_dataset if train_dataset is not None else self.train_dataset
        return self._sampler(train_dataset, self.args.per_device_train_batch_size, shuffle=True)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return self._sampler(eval_dataset, self.args.per_device_eval_batch_size, shuffle=False)

    def _sampler(self, dataset: Any, batch_size: int, shuffle: bool) -> Sampler:
        # Without fillers accelerate would repeat rows until all processes have equally many.
        processes = self.args.world_size
        multiple = processes * batch_size if processes > 1 else 1
        return EpochSampler(len(dataset), self.args.seed, multiple, shuffle)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Epoch folders hard-link the files of a checkpoint, so an old one of this name is never written into.
        if self.args.should_save:
            shutil.rmtree(
                Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}", ignore_errors=True
            )
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As the Trainer; with an adapter, the adapter and in a folder beside it the merged drafter."""
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            folder = output_dir or self.args.output_dir
            save_adapter(self.model, folder)
            merge_adapter(self.model).save_pretrained(Path(folder) / MERGED)


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed instead of giving it back to the kernel, which clears it each time.

    For training on a CPU under Linux's glibc, where a step is about a tenth faster with it; elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # from <malloc.h>
        for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            mallopt(parameter, value)


def check_same_configuration(folder: Path, config: PeagleConfig) -> None:
    """Refuse to resume a checkpoint of another drafter or of other sampling.

    Raises:
        PeagleError: names the fields that differ.
    """
    differences = config.differences(PeagleConfig.from_pretrained(drafter_folder(folder)))
    if differences:
        listed = ", ".join(f"{name} (there {theirs!r}, here {ours!r})" for name, (ours, theirs) in differences.items())
        raise PeagleError(
            f"{folder} is from a run with another configuration: {listed}. Resume with the same arguments, train into "
            "another --output-dir, or start from its weights alone with --from-pretrained."
        )


def build_config(args: PeagleTrainingArguments) -> PeagleConfig:
    """The configuration that the arguments describe, or that of `from_pretrained` with the arguments' sampling.

    Raises:
        PeagleError: no verifier is named.
    """
    verifier = _verifier(args)
    sampling: dict[str, Any] = {
        "num_depths": args.num_depths,
        "down_sample_ratio": args.down_sample_ratio,
        "down_sample_ratio_min": args.down_sample_ratio_min,
        "max_anchors": args.max_anchors,
        "embed_requires_grad": args.embed_requires_grad,
    }
    if args.from_pretrained:
        saved = PeagleConfig.from_pretrained(args.from_pretrained)
        return PeagleConfig.from_dict({**saved.to_dict(), **sampling})
    manifest = Manifest.read(_cache_folder(args))
    return PeagleConfig.from_verifier(
        verifier,
        num_layers=args.num_layers,
        draft_arch=args.draft_arch,
        draft_vocab_size=args.draft_vocab_size,
        mask_token_id=args.mask_token_id,
        target_layer_ids=args.target_layer_ids or (manifest.aux_layer_ids if manifest else None),
        norm_before_residual=args.norm_before_residual,
        norm_before_fc=args.norm_before_fc,
        sliding_window=args.sliding_window,
        revision=args.verifier_revision,
        trust_remote_code=args.trust_remote_code,
        **sampling,
    )


def build_drafter(args: PeagleTrainingArguments) -> PeagleForSpeculation | PeftModel:
    """The drafter that the arguments describe, new or from `from_pretrained`, with its verifier's head attached.

    With `lora_r` it comes with an adapter on all of its linear layers (see `adapters`).

    Raises:
        PeagleError: no verifier is named, or the cache was made by another one.
    """
    set_seed(args.seed)
    verifier, config = _verifier(args), build_config(args)
    if args.from_pretrained:
        drafter = PeagleForSpeculation.from_pretrained(args.from_pretrained, config=config, dtype=torch.float32)
    else:
        drafter = PeagleForSpeculation(config)
        if drafter.d2t is not None:
            frequencies = load_token_freq(args.token_freq_path or Path(args.data_path) / "token_freq.pt")
            drafter.set_draft_vocabulary(*draft_vocabulary(frequencies, config.draft_vocab_size, config.vocab_size))
    if args.device.type == "cuda":
        drafter.set_attn_implementation("flex_attention")
    cache = _cache_folder(args)
    manifest = Manifest.read(cache)
    if manifest is not None:
        target = load_verifier_config(verifier, args.verifier_revision, args.trust_remote_code)
        manifest.check(Manifest.of(verifier, target, config.eagle_aux_hidden_state_layer_ids), cache)
    drafter.load_verifier(
        verifier,
        initialize=not args.from_pretrained,
        train_head=args.train_head,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        revision=args.verifier_revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.lora_r is None:
        return drafter
    return add_adapter(
        drafter,
        LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules="all-linear",
            modules_to_save=args.lora_modules_to_save,
        ),
    )


def _verifier(args: PeagleTrainingArguments) -> str:
    if not args.verifier_name_or_path:
        raise PeagleError("No verifier is named. Pass --verifier-name-or-path with the model to draft for.")
    return args.verifier_name_or_path


def _cache_folder(args: PeagleTrainingArguments) -> str | Path:
    return args.hidden_states_path or Path(args.data_path) / "hidden_states"


def build_datasets(args: PeagleTrainingArguments) -> tuple[HiddenStatesDataset, HiddenStatesDataset | None]:
    """The training and validation rows that the arguments describe; no validation with `train_data_ratio` 1."""
    train_rows, eval_rows = split_rows(args.data_path, args.train_data_ratio, args.seed)

    def dataset(rows: list[int]) -> HiddenStatesDataset:
        return HiddenStatesDataset(
            args.data_path, args.hidden_states_path, args.total_seq_len, rows, args.on_missing, args.seed
        )

    return dataset(train_rows), dataset(eval_rows) if eval_rows else None


def memory_plan(args: PeagleTrainingArguments, config: PeagleConfig) -> MemoryPlan:
    """What the arguments mean for memory; for a CPU, or without mixed precision, it is an estimate from below."""
    checkpointing = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    is_prepared = (Path(args.data_path) / "token_freq.pt").exists()
    return MemoryPlan(
        config,
        positions=args.per_device_train_batch_size * args.total_seq_len,
        learnt_share=learnt_share(args.data_path) if is_prepared else MemoryPlan.learnt_share,
        optimizer=str(args.optim),
        checkpointing=("keep_attention" if args.keep_attention else "whole") if checkpointing else "none",
        partitions=1 if args.sequence_partitions == "auto" else int(args.sequence_partitions),
        accumulates=args.gradient_accumulation_steps > 1,
        train_head=args.train_head,
    )


def memory_budget(args: PeagleTrainingArguments) -> int | None:
    """Bytes that a process may use on its device; None where nobody has said."""
    return device_memory(args.device) if args.memory_budget is None else round(args.memory_budget * GIB)


def train(args: PeagleTrainingArguments) -> PeagleTrainer | None:
    """Train a drafter on cached hidden states, going on from the output folder's newest checkpoint if there is one.

    With `memory_report` print the prediction instead and return None.
    """
    if args.memory_report:
        print(report(memory_plan(args, build_config(args)), memory_budget(args)))
        return None
    drafter = build_drafter(args)
    train_dataset, eval_dataset = build_datasets(args)
    trainer = PeagleTrainer(
        model=drafter,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[VllmExportCallback(args.export_dtype)],
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    return trainer


def checkpoint_to_resume(args: PeagleTrainingArguments) -> str | None:
    """The checkpoint that a run with these arguments goes on from: the named one, else the newest, else none.

    With `resume` off, the checkpoints in the output folder are removed.
    """
    if args.resume_from_checkpoint:
        return str(resumable_folder(args.resume_from_checkpoint))
    if not args.resume:
        if args.should_save:
            remove_checkpoints(args.output_dir)
        return None
    found = checkpoints_by_step(args.output_dir)
    if found:
        logger.info("Resuming from %s; pass --no-resume to start afresh.", found[-1])
    return str(found[-1]) if found else None
