"""`PeagleTrainer`: the Hugging Face Trainer over packed rows."""

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Any, cast

import torch
import transformers
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import BestRun, EvalLoopOutput, HPSearchBackend, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from .. import __version__
from ..console import is_quiet
from ..cpu import keep_freed_memory
from ..data.collator import CODDataCollator
from ..data.dataset import EpochSampler, HiddenStatesDataset
from ..data.errors import RowError, on_all_processes
from ..data.partition import partition, partition_by_slots, partition_every_slot, without_labels
from ..data.prepared_dataset import read_chat_options, read_prepare_record
from ..data.tokenizer import ChatOptions
from ..errors import PeagleError
from ..files import check_writable, write_json, writing
from ..hub.card import model_card
from ..hub.push import PushArguments, open_repo, push
from ..hub.training_json import RECORD, read_record
from ..model.config import PeagleConfig
from ..model.drafter import PeagleForSpeculation, PeagleLayer
from ..processes import lost_process_explained, on_first, require_same, together
from ..training.push_callback import PushToHubCallback
from ..verifier.head import VerifierHead
from ..verifier.loading import hub_verifier
from .adapters import merge_adapter, save_adapter
from .argument_rules import REFUSED_PARAMETERS, refused_arguments
from .arguments import PeagleTrainingArguments
from .checkpoints import (
    ADAPTER,
    BEST,
    FULL_PRECISION,
    OPTIMIZER,
    WEIGHTS,
    best_checkpoint,
    check_resumed,
    checkpoint_name,
    checkpoints_by_step,
    finish_checkpoint,
    folders_of_run,
    metric_name,
    newest_checkpoint,
    put_in_place,
    recover,
    release,
    remains_of_run,
    resumable_folder,
    scores_by_step,
    step_of_best,
    trainer_state,
    trainer_view,
)
from .export import VllmExportCallback
from .memory import report, rows_that_fit
from .metrics import COUNTERS, count_drafts, is_metric, metric_names, summarize
from .nan_check import NanCheck, listed, rows_of
from .objective import Objective, load_head
from .optimizer import MUON, MuonWithAdamW, set_rates, set_settings, settings_of, settings_of_schedule
from .record import (
    RunRecord,
    check_resume,
    describe_run,
    note_settings,
    only_training,
    packing_of,
    record_of_earlier_version,
)
from .sharding import gather_optimizer_state, scatter_optimizer_state, scatter_weights, sharding_of
from .throughput import Pace
from .warm_start import configuration_changes

logger = logging.getLogger(__name__)

VALIDATION_OWED = "validation_owed"
"""In the log history of a checkpoint: its step's validation ended with a row that failed, and is still to be done."""


class _FailingTogether:
    """A data loader, but if a row of one process fails, all processes raise its `RowError` (see `on_all_processes`)."""

    def __init__(self, dataloader: DataLoader):
        self._dataloader = dataloader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self._dataloader)
        while (batch := on_all_processes(lambda: next(batches, None))) is not None:
            yield batch


def check_dataset(dataset: Any) -> None:
    """Refuse a data set that a trainer can't ask for packed sequences.

    Raises:
        PeagleError: says what to give instead.
    """
    if dataset is not None and not isinstance(dataset, HiddenStatesDataset):
        raise PeagleError(
            f"A {type(dataset).__name__} can't be trained or measured on: packed sequences are asked for with their "
            "epoch. Give a HiddenStatesDataset; its argument rows chooses from the prepared ones, and "
            "build_datasets(args) splits by train_data_ratio."
        )


def name_metric(args: PeagleTrainingArguments, validations: Mapping[str, Any]) -> PeagleTrainingArguments:
    """The arguments with `metric_for_best_model` under the name of the first validation, unless it names one's."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if not validations or not is_metric(metric):
        return args
    args = copy.copy(args)  # the user's own stay as they are
    args.metric_for_best_model = f"{next(iter(validations))}_{metric}"
    logger.info("The best checkpoint is that with the best eval_%s.", args.metric_for_best_model)
    return args


class PeagleTrainer(Trainer):
    """`transformers.Trainer` for `PeagleForSpeculation`.

    Takes the Trainer's arguments but those for other losses and metrics. `data_collator` defaults to the model's
    `CODDataCollator`; `model_init` may give drafters of different configurations; of several `eval_dataset` the first
    one's metric makes the best checkpoint, unless `metric_for_best_model` names another's (`<name>_loss`).

    Logs, beside the Trainer's metrics, `accuracy_d`, `acceptance_d` and `acceptance_length` (see `metrics.summarize`),
    over all steps since the last log and all ranks; in evaluation with the prefix `eval_`. In training also
    `tokens_per_second`, `loader_wait` and `memory_gib` (see `pace.Pace`).

    Evaluation drops no row: every learnt position starts a rollout of all K depths. `eval_acceptance_d` and
    `eval_acceptance_length` are of the drafts that decoding the text would make (see `metrics.count_drafts`),
    `eval_anchor_acceptance_length` is the mean over all positions. `eval_loss` is the mean over all rows, so that it
    depends neither on COD's ratios nor on the seed; the training loss, in which depths count as often as they are
    sampled, is another number.
    """

    args: PeagleTrainingArguments
    model: nn.Module
    hub_model_id: str | None  # type: ignore[assignment]

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
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        verifier_head: VerifierHead | None = None,
        **refused: Any,
    ):
        for name in refused:
            reason = REFUSED_PARAMETERS.get(name, "neither this trainer nor the Trainer has it")
            raise PeagleError(f"PeagleTrainer can't be given {name}: {reason}.")
        args = args or PeagleTrainingArguments()
        if isinstance(eval_dataset, dict):
            args = name_metric(args, eval_dataset)
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            check_dataset(dataset)
        if args.should_save:
            check_writable(args.output_dir)
        if not any(isinstance(one, VllmExportCallback) for one in callbacks or []):
            callbacks = [VllmExportCallback(args.export_dtype), *(callbacks or [])]
        with refused_arguments():
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
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        if is_quiet():
            self.remove_callback(PrinterCallback)
        if self._saves_shards:
            raise PeagleError(
                "Checkpoints would hold shards of the weights, which neither vLLM nor a resume on other processes can "
                "read. Save whole weights: with FSDP set fsdp_state_dict_type to FULL_STATE_DICT, with ZeRO-3 "
                "zero3_save_16bit_model (stage3_gather_16bit_weights_on_model_save) to true."
            )
        if isinstance(self.model, PeftModel) and self.is_sharded:
            raise PeagleError("An adapter can't be merged out of shards. Train it with DDP instead of FSDP or ZeRO.")
        self._verifier_head = verifier_head
        self._collator_is_own = data_collator is None
        self._own_optimizer = None if optimizers[0] is None else type(optimizers[0]).__name__
        if optimizer_cls_and_kwargs is not None:
            self._own_optimizer = optimizer_cls_and_kwargs[0].__name__
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._resumed_from: Path | None = None
        self._run: RunRecord | None = None
        self._run_before: RunRecord | None = None
        self._superseded: list[Path] = []
        if args.push_to_hub:
            self.add_callback(
                PushToHubCallback(
                    self.hub_model_id or "",
                    args.verifier_name,
                    args.hub_private_repo,
                    args.hub_revision,
                    args.hub_token,
                )
            )
        if args.device.type == "cpu":
            keep_freed_memory()
        self._take_up_model()
        self._check_metric()

    def _take_up_model(self) -> None:
        """Set up what depends on the model or on arguments that a hyperparameter search may change."""
        if not any(isinstance(module, PeagleForSpeculation) for module in self.model.modules()):
            raise PeagleError(f"PeagleTrainer trains a PeagleForSpeculation, not a {type(self.model).__name__}.")
        self.config: PeagleConfig = self.accelerator.unwrap_model(self.model).config
        if self._collator_is_own:
            self.data_collator = CODDataCollator.from_config(self.config, seed=self.args.seed)
        self.eval_collator = self.data_collator
        if isinstance(self.data_collator, CODDataCollator):
            self.eval_collator = replace(self.data_collator, every_slot=True)
        if is_deepspeed_zero3_enabled():
            from deepspeed.utils import set_z3_leaf_modules

            # Shards are gathered a layer at a time: hooks on the modules within would be in the way of the compiler.
            set_z3_leaf_modules(self.model, [PeagleLayer])
        for module in self.model.modules():
            if isinstance(module, PeagleForSpeculation) and self.args.device.type == "cuda":
                module.set_attn_implementation("flex_attention")
            if isinstance(module, PeagleLayer):
                module.keep_attention = self.args.keep_attention
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()  # of a served checkpoint: small steps would round to nothing
        # Not "objective": a hyperparameter search of the Trainer keeps its score under that name.
        self.distillation: Objective = self._build_objective()
        self.__dict__.pop("_eval_dataloaders", None)  # persistent workers, which have the collator of an earlier model
        self._nan_check = NanCheck()
        self._train_counters = self._no_counters()
        self._pace = Pace(self.args.device)
        self.__dict__.pop("_rows_that_fit", None)

    def _build_objective(self) -> Objective:
        """The objective that the arguments describe, with the head of the drafter's verifier."""
        args, drafter = self.args, self.accelerator.unwrap_model(self.model)
        if isinstance(drafter, PeftModel):
            drafter = drafter.get_base_model()
        if self._verifier_head is None:
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            self._verifier_head = load_head(drafter, dtype, args.verifier_revision, args.trust_remote_code)
        dpace_alpha = args.dpace_alpha if args.per_position_loss_weight == "dpace" else None
        return Objective(drafter, self._verifier_head, args.loss_fn, args.depth_loss_decay, dpace_alpha)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """As the Trainer's, but the objective defaults to `metric_for_best_model`, to be improved."""
        return super().hyperparameter_search(
            hp_space,
            compute_objective or (lambda metrics: metrics[metric_name(self.args)]),
            n_trials,
            direction or ("maximize" if self.args.greater_is_better else "minimize"),
            backend,
            hp_name,
            **kwargs,
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """Called at each start of training, after `model_init` and with a trial's arguments set."""
        super()._hp_search_setup(trial)
        run_folder = Path(self._get_output_dir(trial))
        earlier = [] if self._resumed_from else folders_of_run(run_folder)
        if earlier and self.args.resume:
            raise PeagleError(
                f"Training begins anew, but {earlier[-1]} is of an earlier run, with which its checkpoints would mix. "
                "Go on from it with trainer.train(resume_from_checkpoint=True), name another output_dir, or pass "
                "--no-resume (resume=False) for its checkpoints to take the place of those."
            )
        self._superseded = [] if self._resumed_from else remains_of_run(run_folder)
        self._take_up_model()
        self._take_up_run()
        self._run_folder = str(run_folder)
        self._export_callback.run_folder = run_folder

    @property
    def _export_callback(self) -> VllmExportCallback:
        return next(one for one in self.callback_handler.callbacks if isinstance(one, VllmExportCallback))

    def _take_up_run(self) -> None:
        """Describe the run (see `run_record`) and compare it with that of the checkpoint that it goes on from.

        Raises:
            PeagleError: it is another run; on all processes.
        """
        folder = self._resumed_from
        remedy = "Give each machine the same prepared data and cache, and the same arguments."
        require_same(packing_of(self.train_dataset), "The packed sequences to train on are", remedy)

        def compare() -> tuple[RunRecord | None, RunRecord]:
            now = describe_run(
                self.args,
                self.config,
                self.accelerator.unwrap_model(self.model),
                self.train_dataset,
                self.eval_dataset,
                self._own_optimizer or str(OptimizerNames(self.args.optim).value if self.args.optim != MUON else MUON),
                sharding_of(self.accelerator.state, self.args.world_size),
                self._device_name(),
            )
            if folder is None:
                return None, now
            before = RunRecord.read(folder) or record_of_earlier_version(read_record(folder) or {})
            others = configuration_changes(folder, self.config, bool(before.verifier and now.verifier))
            return before, check_resume(folder, before, now, trainer_state(folder)["global_step"], others)

        self._run_before, self._run = on_first(compare)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As the Trainer's; then the record of the run is complete, and is written before the first step."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if self._run is not None and self.optimizer is not None:
            settings = settings_of(self.optimizer), settings_of_schedule(schedule)
            self._run = note_settings(self._run, self._run_before, *settings)
            if self.args.should_save:
                self._run.write(self._run_folder)
        return schedule

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's, and under FSDP2 from the whole weights that every checkpoint has."""
        if not self._is_fsdp2:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return scatter_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, also from another sharding; settings that are others than before take effect."""
        if checkpoint is None:
            return
        schedule: Any = self.lr_scheduler
        if self.is_sharded and not self._is_fsdp2:
            super()._load_optimizer_and_scheduler(checkpoint)
            schedule = getattr(schedule, "scheduler", schedule)
            saved = schedule.state_dict()
        else:
            self._load_optimizer(Path(checkpoint))
            saved = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        before, now = self._run_before, self._run
        if before is None or now is None or now.optimizer_settings is None:
            return
        if before.optimizer_settings is not None:
            set_settings(self.optimizer, before.optimizer_settings, now.optimizer_settings)
        rates = [group["lr"] for group in now.optimizer_settings]
        was = [group["lr"] for group in before.optimizer_settings or now.optimizer_settings]
        is_other = before.schedule not in (None, now.schedule) or rates != was
        set_rates(self.optimizer, schedule, rates, saved, is_other, self.state.global_step)

    def _load_optimizer(self, checkpoint: Path) -> None:
        path, optimizer = checkpoint / OPTIMIZER_NAME, self._bare_optimizer()
        if not path.exists():
            raise PeagleError(
                f"{checkpoint} has no {OPTIMIZER_NAME}: under FSDP earlier versions saved the optimizer's states in "
                "another way. Start from its weights alone with --from-pretrained and another --save-path."
            )
        is_read = not self._is_fsdp2 or self.args.process_index == 0
        on_gpu = self.args.device.type == "cuda"  # where states are copied from a file that all processes share
        try:
            state = torch.load(path, map_location="cpu", mmap=on_gpu, weights_only=True) if is_read else {}
            if self._is_fsdp2:
                scatter_optimizer_state(self.model, optimizer, state)
            else:
                optimizer.load_state_dict(state)
        except (ValueError, KeyError, IndexError) as error:
            raise PeagleError(
                f"The optimizer's states in {self._resumed_from}/{OPTIMIZER} are those of other parameters or of "
                f"another optimizer than this run has ({' '.join(str(error).split())[:200]}). Resume with the "
                "arguments of that run, or train anew with --no-resume or another --save-path."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's; under FSDP2 in the same files as those of one process, from which any number goes on."""
        if not self._is_fsdp2:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = gather_optimizer_state(self.model, self._bare_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _bare_optimizer(self) -> Any:
        """The optimizer without what accelerate puts around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _is_fsdp2(self) -> bool:
        return self.is_fsdp_enabled and sharding_of(self.accelerator.state, self.args.world_size) == "FSDP2"

    def _init_training_state(  # type: ignore[no-untyped-def]
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """As the Trainer, but the best so far is found anew: the metric may be another, and a folder may be gone."""
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        state = self.state
        if resume_from_checkpoint is None:
            return epochs_trained, steps_trained
        if state.global_step >= max_steps:
            if self.is_world_process_zero():
                logger.info(
                    "Nothing is left to train: the checkpoint is of step %d, and these arguments end at step %d. "
                    "Training goes on with more --epochs, or a higher --max-steps.",
                    state.global_step,
                    max_steps,
                )
            epochs_trained, steps_trained = num_train_epochs, 0  # else the Trainer would take one step more
        found = on_first(lambda: checkpoints_by_step(self._get_output_dir(trial)))
        scores = scores_by_step(self.args, state)
        if self.args.load_best_model_at_end:
            scores = {step: score for step, score in scores.items() if step in found}
        before, best = state.best_global_step, step_of_best(self.args, scores)
        state.best_global_step = best
        state.best_metric = None if best is None else scores[best]
        self._note_best(found)
        if best != before and self.is_world_process_zero():
            logger.info("The best so far is another by %s: that of step %s.", metric_name(self.args), best)
        return epochs_trained, steps_trained

    def _note_best(self, found: dict[int, Path]) -> None:
        best = best_checkpoint(self.args, self.state, found)
        self.state.best_model_checkpoint = None if best is None else str(best)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; `resume_from_checkpoint` takes a folder of a checkpoint, `checkpoint_best`, or True (newest).

        Raises:
            PeagleError: the folder can't be resumed from, the output folder has other checkpoints than those that lead
                to it, a loss or a gradient is no finite number (see `nan_check`), or the device's memory is too small;
                says what would help.
            RowError: a row's hidden states can't be had; what was trained is saved, and a rerun goes on from there.
        """
        with only_training(self.args):
            folder = on_first(lambda: self._resumable(resume_from_checkpoint, trial))
            with together():
                if folder is not None and not folder.is_dir():
                    raise PeagleError(
                        f"The first process goes on from {folder}, which isn't there for this one. All processes need "
                        "the same output folder: name one on a disk that all machines share, or copy it to each."
                    )
                self._check_there_is_a_step()
            self._resumed_from = folder
            self._seconds_before = (read_record(folder) or {}).get("seconds", 0.0) if folder else 0.0
            self._started = time.monotonic()
            if self._own_optimizer is None:
                self.optimizer = None  # it is made anew, since arguments may differ from those of an earlier call
            with lost_process_explained():
                return self._train(folder, trial, ignore_keys_for_eval)

    def _resumable(self, resume_from_checkpoint: str | bool | None, trial: Any) -> Path | None:
        """The checkpoint that training goes on from, if it does."""
        if trial is not None and not resume_from_checkpoint:
            return None  # a trial's folder may be named after parameters that are chosen later
        run_folder = Path(self._get_output_dir(trial))
        recover(run_folder)
        if resume_from_checkpoint is True:
            newest = newest_checkpoint(run_folder)
            if newest is None:
                raise PeagleError(f"{self.args.output_dir} has no checkpoint to resume from. Leave out the resuming.")
            resume_from_checkpoint = str(newest)
        if not resume_from_checkpoint:
            return None
        folder = resumable_folder(resume_from_checkpoint)
        check_resumed(folder, run_folder)
        return folder

    def _train(self, checkpoint: Path | None, trial: Any, ignore_keys_for_eval: list[str] | None) -> Any:
        self._owes_validation = False
        if checkpoint is not None and self.args.eval_strategy != IntervalStrategy.NO:
            state = trainer_state(checkpoint)
            self._owes_validation = any(
                VALIDATION_OWED in entry and entry["step"] == state["global_step"] for entry in state["log_history"]
            )
        evaluates_first = self.args.eval_on_start
        self.args.eval_on_start = evaluates_first or self._owes_validation
        try:
            if checkpoint is None:
                return super().train(None, trial, ignore_keys_for_eval)
            with self._view(checkpoint) as view:
                return super().train(str(view), trial, ignore_keys_for_eval)
        except torch.OutOfMemoryError as error:
            raise PeagleError(
                f"The memory of {self.args.device} is too small: {str(error).splitlines()[0]}\n"
                f"{report(self.args.memory_plan(self.config), self.args.usable_memory())}"
            ) from error
        except RowError as error:
            raise error.ended(self._save_what_was_trained(trial)) from error
        finally:
            self.args.eval_on_start = evaluates_first

    def _save_what_was_trained(self, trial: Any) -> str:
        """Save the last finished step, which the next run goes on from, on all processes; says so in a clause."""
        step, output = self.state.global_step, self._get_output_dir(trial)
        if step == 0:
            return "Training ended before its first step"
        is_saved = not self._superseded and step in checkpoints_by_step(output)  # else those are of an earlier run
        if not broadcast_object_list([is_saved])[0]:
            try:
                self._save_checkpoint(self.model, trial)
            except (PeagleError, OSError) as error:
                return f"Training ended after step {step}, which could not be saved ({str(error).removesuffix('.')})"
        folder = broadcast_object_list([str(checkpoints_by_step(output).get(step))])[0]
        return (
            f"Training ended after step {step}{', in its validation' if self._owes_validation else ''}, and is saved "
            f"in {folder}, from which the same command{'' if self.args.resume else ' without --no-resume'} goes on"
        )

    def _check_there_is_a_step(self) -> None:
        size = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else math.inf
        if size == 0:
            raise PeagleError(
                "The training dataset has no packed sequence, so no step would be taken. Prepare more data."
            )
        batch = self.args.per_device_train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and size < batch:
            raise PeagleError(
                f"There are {size} packed sequences, but a batch on all processes takes {batch}, and "
                "--dataloader-drop-last leaves out a smaller one: no step would be taken. Leave that flag out, lower "
                "--per-device-train-batch-size or --total-seq-len, or prepare more data."
            )

    def _check_metric(self) -> None:
        """Refuse a `metric_for_best_model` that no validation gives before the first step, not after an epoch."""
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        known = metric_names(self.config.num_depths)
        if isinstance(self.eval_dataset, dict):
            known = [f"{name}_{one}" for name in self.eval_dataset for one in known]
        if metric and metric not in known and self.eval_dataset is not None:
            raise PeagleError(
                f"--metric-for-best-model is {metric!r}, which no validation gives. Take one of {', '.join(known)}."
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """Like `Trainer.get_batch_samples`, but if a row of one process fails, all processes raise its `RowError`."""
        with self._pace.waiting():
            batches = on_all_processes(lambda: list(islice(epoch_iterator, num_batches)))
            return super().get_batch_samples(iter(batches), num_batches, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise PeagleError(
                "No weight of the drafter is to be trained: none has requires_grad. Set it on those that are."
            )
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and self.args.optim == MUON:
            args = self.args
            self.optimizer = MuonWithAdamW(
                (self.model if model is None else model).named_parameters(),
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        with refused_arguments():
            return super().create_optimizer(model)

    def training_step(  # type: ignore[no-untyped-def]
        self, model, inputs, num_items_in_batch=None
    ):
        """Forward and backward, part by part with `sequence_partitions`; gradients are reduced with the last part."""
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != -100).sum()
        self._pace.positions += inputs["input_ids"].numel()
        *others, last = self._parts(inputs)
        loss = torch.zeros((), device=self.args.device)
        for part in others:
            with self._without_reduction(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        loss = loss + super().training_step(model, last, num_items_in_batch)
        self._nan_check.note_loss(self.state.global_step + 1, loss)
        if self._nan_check.is_full:
            self._require_finite()
        return loss

    def _get_grad_norm(  # type: ignore[no-untyped-def]
        self, model, grad_norm=None
    ):
        """As `Trainer._get_grad_norm` of transformers 5.17 to 5.24, the only place that has the norm of each step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # whose scaler tries for infinities, and leaves out the steps that bring them
            self._nan_check.note_gradient(self.state.global_step + 1, norm)
        return norm

    def _require_finite(self) -> None:
        """End training if a loss or a gradient since the last call was NaN or infinite.

        Raises:
            PeagleError: names the step, its samples, and the checkpoint from before it.
        """
        bad = self._nan_check.first_bad()
        if bad is None:
            return
        samples = ""
        if isinstance(self.train_dataset, HiddenStatesDataset):
            rows = rows_of(bad, self.train_dataset, self._train_sampler, self.args)
            samples = f", which was made from the samples {listed(rows)} of {self.train_dataset.data_path}"
        what = "gradient" if bad.batch is None else "loss"
        raise PeagleError(
            f"Training ended at step {bad.step}, whose {what} is not a finite number{samples}. This step isn't saved; "
            f"{self._newest_words()}. Look at these samples, lower --learning-rate, or set a lower --max-grad-norm."
        )

    def _newest_words(self) -> str:
        newest = newest_checkpoint(self._export_callback.run_folder or self.args.output_dir)
        return f"the newest checkpoint is {newest}" if newest and not self._superseded else "no step was saved before"

    def _parts(self, inputs: dict[str, Any], is_training: bool = True) -> list[dict[str, Any]]:
        if self.args.sequence_partitions == "auto":
            parts = partition_by_slots(inputs, self._rows_that_fit)
        else:
            num_parts = int(self.args.sequence_partitions)
            parts = partition(inputs, num_parts) if is_training else partition_every_slot(inputs, num_parts)
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
    def _saves_shards(self) -> bool:
        state = self.accelerator.state
        if self.is_fsdp_enabled:
            return "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type)
        if self.is_deepspeed_enabled:
            config = state.deepspeed_plugin.hf_ds_config
            gathers = config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
            return config.is_zero3() and not gathers
        return False

    @cached_property
    def _rows_that_fit(self) -> int:
        budget = self.args.usable_memory()
        if budget is None:
            raise PeagleError(
                "sequence_partitions is auto, but how much memory a CPU may use is for you to say: pass "
                "--memory-budget with a number of GiB."
            )
        return rows_that_fit(self.args.memory_plan(self.config), budget)

    def compute_loss(  # type: ignore[no-untyped-def]
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        outputs = self.distillation(model, inputs, num_items_in_batch)
        if model.training:
            self._train_counters += outputs.counters
        # The losses of all processes are averaged, but num_items_in_batch is a sum over them.
        is_shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        loss = outputs.loss * (self.accelerator.num_processes if is_shared else 1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(  # type: ignore[no-untyped-def]
        self, model, inputs, prediction_loss_only, ignore_keys=None
    ):
        inputs = self._prepare_inputs(inputs)
        sums, outcomes = torch.zeros_like(self._eval_loss), []
        for part in self._parts(inputs, is_training=False):
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.distillation(model, part)
            learnt = outputs.counters[COUNTERS.index("learnt")].sum()
            self._eval_counters += outputs.counters
            assert outputs.outcomes is not None  # the drafter is in evaluation
            outcomes.append(outputs.outcomes)
            sums += torch.stack([outputs.loss.double() * learnt, learnt.double()])
        self._eval_loss += sums
        self._eval_drafts += count_drafts(torch.cat(outcomes, dim=1), self.config.num_depths)
        return sums[0] / sums[1].clamp(min=1), None, None

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, Dataset):
            # With persistent workers the Trainer would take the loader of the data set that it first validated on.
            return self.get_test_dataloader(eval_dataset)
        with self._every_slot():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        check_dataset(test_dataset)
        with self._every_slot():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_slot(self) -> Iterator[None]:
        """Loaders made here drop no row, neither by COD nor for a batch that isn't full."""
        collator, self.data_collator = self.data_collator, self.eval_collator
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.is_in_train:
            self._require_finite()
        self._eval_counters, self._eval_drafts = self._no_counters(), self._no_counters()[:2]
        self._eval_loss = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        try:
            output = super().evaluation_loop(
                cast(DataLoader, _FailingTogether(dataloader)),
                description,
                prediction_loss_only,
                ignore_keys,
                metric_key_prefix,
            )
        except RowError:
            if self.is_in_train:
                self._owes_validation = True
                self.state.log_history.append({"step": self.state.global_step, VALIDATION_OWED: True})
            raise
        loss, learnt = self.accelerator.reduce(self._eval_loss, reduction="sum").tolist()
        metrics = {"loss": loss / max(learnt, 1.0)}
        if self.is_in_train and not math.isfinite(loss):
            raise PeagleError(
                f"Training ended at the validation of step {self.state.global_step}, whose loss is not a finite "
                f"number. This step isn't saved; {self._newest_words()}. Lower --learning-rate or "
                "--max-grad-norm."
            )
        counters = self.accelerator.reduce(self._eval_counters, reduction="sum")
        drafts = self.accelerator.reduce(self._eval_drafts, reduction="sum")
        metrics |= summarize(torch.cat([counters[:2], drafts]))
        metrics["anchor_acceptance_length"] = summarize(counters)["acceptance_length"]
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})

    def _evaluate(  # type: ignore[no-untyped-def]
        self, trial, ignore_keys_for_eval, skip_scheduler=False
    ):
        """Like `Trainer._evaluate`, but first do the validation that a failed row ended in an earlier run.

        The choice of the best checkpoint and saving follow, as if the step that is resumed from had just ended.
        """
        if not (skip_scheduler and self._owes_validation):
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._owes_validation = False
        self.state.log_history = [entry for entry in self.state.log_history if VALIDATION_OWED not in entry]
        epoch = float(self.state.epoch or 0.0)
        if math.isclose(epoch, round(epoch)):
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self.control.should_evaluate = True
        self.control.should_save = self.args.save_strategy != SaveStrategy.NO
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, trial, epoch, ignore_keys_for_eval, time.time()
        )
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train:
            self._require_finite()
        if "loss" in logs:
            logs |= summarize(self.accelerator.reduce(self._train_counters, reduction="sum"))
            self._train_counters = self._no_counters()
            logs |= self._pace.take(self.accelerator.gather)
        super().log(logs, start_time)

    def _no_counters(self) -> torch.Tensor:
        return torch.zeros(len(COUNTERS), self.config.num_depths, dtype=torch.long, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        train_dataset = train_dataset if train_dataset is not None else self.train_dataset
        self._train_sampler = self._sampler(train_dataset, self.args.per_device_train_batch_size, shuffle=True)
        return self._train_sampler

    def _run_epoch(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the Trainer, which can't tell the sampler its epoch where rows are skipped and processes share them."""
        self._train_sampler.set_epoch(kwargs["epoch"])
        view = kwargs["resume_from_checkpoint"]
        if view is not None and not self.args.auto_find_batch_size:  # which may load it again
            release(Path(view))
        return super()._run_epoch(**kwargs)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        return self._sampler(eval_dataset, self.args.per_device_eval_batch_size, shuffle=False)

    def _sampler(self, dataset: Any, batch_size: int, shuffle: bool) -> EpochSampler:
        dataset.check_layers(self.config.eagle_aux_hidden_state_layer_ids)
        # Without fillers accelerate would repeat rows until all processes have equally many.
        processes = self.args.world_size
        multiple = processes * batch_size if processes > 1 else 1
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(dataset), seed, multiple, shuffle)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint (see `checkpoints`) under a hidden name, and give it its name when it is complete.

        In place of `Trainer._save_checkpoint` of transformers 5.17 to 5.24, whose parts it calls.
        """
        self._require_finite()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder = Path(self._get_output_dir(trial))
        folder = run_folder / checkpoint_name(self.state, self.control.should_training_stop)
        same_step = folder.with_name(f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            self._keep_best(folder)
        with self._written_to(folder, [same_step, *self._superseded]) as temporary:
            # A process that fails must not leave the others waiting for it in the next part.
            with together():
                self.save_model(str(temporary / self._weights_folder), _internal_call=True)
            if not self.args.save_only_model:
                with together():
                    self._save_optimizer_and_scheduler(str(temporary))
                self._save_scaler(str(temporary))
                self._save_rng_state(str(temporary))
            if self.args.should_save:
                self._save_state(temporary / TRAINER_STATE_NAME)
        self._superseded = []
        self._note_best(on_first(lambda: checkpoints_by_step(run_folder)))

    def _keep_best(self, folder: Path) -> None:
        """Rename the best checkpoint if it has the name of the one to be saved: a run had ended within this epoch."""
        best = self.state.best_global_step
        if self._superseded or best in (None, self.state.global_step) or not folder.exists():
            return
        if trainer_state(folder)["global_step"] == best:
            folder.rename(folder.with_name(f"checkpoint-{best}"))

    @contextmanager
    def _written_to(self, folder: Path, superseded: Sequence[Path] = ()) -> Iterator[Path]:
        """A hidden folder, the same one on all processes, that becomes `folder` when the block has ended well.

        Args:
            superseded: removed then, as is an older `folder`.
        """
        temporary = folder.with_name(f".{folder.name}.{broadcast_object_list([token_hex(4)])[0]}.tmp")
        with writing(folder):
            try:
                with together():
                    yield temporary
                with together():
                    if self.args.should_save:
                        merged = merge_adapter(self.model) if isinstance(self.model, PeftModel) else None
                        finish_checkpoint(temporary, self._export_callback.dtype, merged)
                        put_in_place(temporary, folder, superseded)
            except BaseException:
                if self.args.should_save:
                    shutil.rmtree(temporary, ignore_errors=True)
                raise

    @property
    def _weights_folder(self) -> str:
        return ADAPTER if isinstance(self.model, PeftModel) else FULL_PRECISION

    def _save_state(self, path: Path) -> None:
        """Like the end of `Trainer._save_checkpoint`, but without the path of the best: folders may be moved."""
        saved: Any = self.state.stateful_callbacks
        for one in (*self.callback_handler.callbacks, self.control):
            if isinstance(one, ExportableState):
                name = type(one).__name__
                if isinstance(saved.get(name), list):
                    saved[name].append(one.state())
                else:
                    saved[name] = one.state()
        self.state.best_model_checkpoint = None
        self.state.save_to_json(str(path))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As the Trainer, with the record of the training; of an adapter the adapter alone, in PEFT's layout."""
        if not self.args.should_save:  # from transformers 5.23 on all processes are called
            return
        super()._save(output_dir, state_dict)
        folder = str(output_dir or self.args.output_dir)
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder)
        write_json(Path(folder) / RECORD, self.record())
        if self._run is not None:
            self._run.write(folder)

    def _view(self, checkpoint: Path) -> AbstractContextManager[Path]:
        return trainer_view(checkpoint, Path(self.args.output_dir), isinstance(self.model, PeftModel))

    def _load_best_model(self) -> None:
        """Like `Trainer._load_best_model` of transformers 5.17 to 5.24, which looks for files of other names."""
        best = str(self.state.best_model_checkpoint)
        with together():
            if not Path(best).is_dir():
                raise PeagleError(
                    f"The best checkpoint {best} isn't there for this process. Name an output folder that all machines "
                    "share, or leave --load-best-model-at-end out."
                )
        with self._view(Path(best)) as view:
            if self._is_fsdp2:
                scatter_weights(self.model, view / WEIGHTS)
                return
            self.state.best_model_checkpoint = str(view)
            try:
                super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = best

    def record(self) -> dict[str, Any]:
        """How the drafter was trained so far, for its card; each checkpoint holds it as `training.json`.

        `data` is what `prepare.json` says of the training data, `chat_template` and `chat_template_kwargs` how its
        chats became text (the template only if one was chosen), `seconds` the wall time with validation and saving,
        over all resumed parts, `validation` the metrics of this very step; each is None if unknown.
        """
        args, dataset = self.args, self.train_dataset
        origin: dict[str, Any] = {}
        options: ChatOptions | None = None
        if isinstance(dataset, HiddenStatesDataset) and (origin := read_prepare_record(dataset.data_path)):
            options = read_chat_options(dataset.data_path)
        measured = [entry for entry in self.state.log_history if entry["step"] == self.state.global_step]
        schedule = f"{SchedulerType(args.lr_scheduler_type).value} from {args.learning_rate:g}"
        name = "Muon and AdamW" if args.optim == MUON else OptimizerNames(args.optim).value
        optimizer = f"{name}, {schedule}"
        return {
            "data": {name: origin[name] for name in ("data", "counts") if name in origin} or None,
            "chat_template": options and options.template,
            "chat_template_kwargs": options and options.kwargs,
            "loss": args.loss_fn,
            "depth_loss_decay": args.depth_loss_decay,
            "dpace_alpha": args.dpace_alpha if args.per_position_loss_weight == "dpace" else None,
            "epochs": self.state.epoch or 0.0,
            "steps": self.state.global_step,
            "rows_per_step": args.world_size * args.train_batch_size * args.gradient_accumulation_steps,
            "total_seq_len": getattr(dataset, "total_seq_len", None),
            "optimizer": f"{self._own_optimizer}, given to the trainer" if self._own_optimizer else optimizer,
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            "seed": args.seed,
            "skipped_rows": sorted(set(args.skip_rows or ())),
            "device": self._device_name(),
            "processes": args.world_size,
            "seconds": self._seconds_before + time.monotonic() - self._started,
            "validation": {
                name.removeprefix("eval_"): value
                for entry in measured
                for name, value in entry.items()
                if name.startswith(("eval_loss", "eval_accuracy", "eval_acceptance"))
            }
            or None,
            "versions": {
                "peagle_hf": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        }

    def _device_name(self) -> str:
        on_gpu = self.args.device.type == "cuda"
        return torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository on the hub, and so find out before training whether an upload will be possible.

        Raises:
            PeagleError: the verifier is a local path, or the hub can't be used.
        """
        if self.is_world_process_zero():
            config = self.accelerator.unwrap_model(self.model).config
            self.hub_model_id = open_repo(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                hub_verifier(config.verifier_name_or_path, self.args.verifier_name),
                self.args.hub_private_repo if private is None else private,
                token or self.args.hub_token,
            )
            self.push_in_progress = None

    def create_model_card(  # type: ignore[override]
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
    ) -> None:
        """Write the drafter's card (see `model_card.model_card`) as `README.md` into the output folder.

        Args:
            finetuned_from: the verifier's name on the hub.
        """
        if not self.is_world_process_zero():
            return
        output = Path(self.args.output_dir)
        verifier: str | None
        try:
            verifier = hub_verifier(self.config.verifier_name_or_path, finetuned_from or self.args.verifier_name)
        except PeagleError:
            verifier = None
        model_card(
            self.config,
            self.hub_model_id or output.absolute().name,
            verifier,
            read_record(output / BEST) or self.record(),
            name=model_name,
            license=license,
            language=language,
            tags=[tags] if isinstance(tags, str) else tags or [],
            datasets=[dataset] if isinstance(dataset, str) else dataset or [],
        ).save(output / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload `checkpoint_best`, or the model as it is now if nothing was saved (see `hub.push`).

        Args:
            kwargs: for `create_model_card`.

        Returns:
            The commit, or a future of it if not `blocking`; None but on the first process.

        Raises:
            PeagleError: the hub refuses; says how to do it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        folder = self._servable_folder()
        if not self.is_world_process_zero():
            return None
        assert self.hub_model_id is not None
        self.create_model_card(**kwargs)
        arguments = PushArguments(
            model=str(folder),
            repo_id=self.hub_model_id,
            verifier_name=self.args.verifier_name,
            private=bool(self.args.hub_private_repo if private is None else private),
            revision=revision or self.args.hub_revision,
        )
        card = ModelCard.load(Path(self.args.output_dir) / "README.md")
        upload = partial(push, arguments, token, commit_message or "Upload the drafter", card)
        return upload() if blocking else HfApi().run_as_future(upload)

    def _servable_folder(self) -> Path:
        """On all processes: `checkpoint_best`, or the model as it is now, exported."""
        output = Path(self.args.output_dir)
        if broadcast_object_list([(output / BEST).exists()])[0]:
            return output / BEST
        with self._written_to(output / "exported") as temporary:
            self.save_model(str(temporary / self._weights_folder), _internal_call=True)
        return output / "exported"
