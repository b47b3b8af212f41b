"""`PeagleTrainer`: the Hugging Face Trainer over packed sequences.

What it overrides of the Trainer is in its class below. The rest of its work is elsewhere in this package: at the events
of the loop in `current_run`, before the first step in `resuming`, checkpoints in `saving`, validation in `validation`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..console import is_quiet
from ..cpu import keep_freed_memory
from ..data.collator import CODDataCollator
from ..data.dataset import HiddenStatesDataset
from ..data.errors import RowError, on_all_processes
from ..data.packing import EpochSampler
from ..errors import PeagleError
from ..files import check_writable
from ..model.config import PeagleConfig
from ..model.drafter import PeagleForSpeculation
from ..processes import lost_process_explained, on_first, together
from ..verifier.head import VerifierHead
from .argument_rules import check_trial, refused_arguments
from .arguments import PeagleTrainingArguments
from .checkpoints import checkpoints_by_step, metric_name
from .current_run import VALIDATION_OWED, CurrentRun, NothingLeft
from .export_callback import VllmExportCallback
from .model_setup import build_objective, configure_drafter, in_float32
from .optimizer import MUON, make_muon, require_trained
from .publishing import make_repo, upload, write_card
from .push_callback import PushToHubCallback
from .record import describe_training
from .resuming import checkpoint_to_go_on_from, note_best, only_training
from .saving import complete_saved_model, save_checkpoint
from .sequence_partitions import Partitioner, without_reduction
from .sharding import gradient_norm, require_whole_weights
from .time_left import TimeLeft
from .trainer_checks import (
    check_collator,
    check_dataset,
    check_drafter,
    check_given,
    check_made,
    check_metric,
    check_named,
    check_there_is_a_step,
    name_metric,
)
from .validation import FailingTogether, Validation


class PeagleTrainer(Trainer):
    """`transformers.Trainer` for `PeagleForSpeculation`.

    Takes the Trainer's arguments but those for other losses and metrics. `data_collator` defaults to the model's
    `CODDataCollator`; `model_init` may give drafters of different configurations; of several `eval_dataset` the first
    one's metric makes the best checkpoint, unless `metric_for_best_model` names another's (`<name>_loss`).

    Logs also `accuracy_d`, `acceptance_d` and `acceptance_length` (see `metrics.summarize`), over all steps since the
    last log and all ranks; in evaluation with the prefix `eval_`. In training also `tokens_per_second`, `loader_wait`
    and `memory_gib` (see `throughput.Throughput`), and `minutes_left` (see `time_left.TimeLeft`).

    Evaluation drops no slot: every trained position starts a rollout of all K depths. `eval_acceptance_d` and
    `eval_acceptance_length` are of the drafts that decoding the text would make (see `metrics.count_drafts`),
    `eval_anchor_acceptance_length` is the mean over all positions. `eval_loss` is the mean over all slots, so that it
    depends neither on COD's ratios nor on the seed. The training loss is another number: depths count as often as they
    are sampled, and each slot by its weight (see `losses.survival_weights`), which grows as the drafter improves.

    Attributes:
        current_run: the state of the current, or last, call of `train`.
        time_left: how long its steps take.
        own_optimizer: the class of an optimizer that the user has given; None if the arguments choose it.
    """

    args: PeagleTrainingArguments
    model: nn.Module
    hub_model_id: str | None  # type: ignore[assignment]
    train_sampler: EpochSampler

    def __init__(
        self,
        model: PeagleForSpeculation | nn.Module | None = None,
        args: PeagleTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        verifier_head: VerifierHead | None = None,
        **refused: Any,
    ):
        check_made(self, refused)
        check_given(args, model, optimizers, processing_class)
        args = name_metric(args or PeagleTrainingArguments(), eval_dataset)
        for one in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            check_dataset(one)
        if args.should_save:
            check_writable(args.output_dir)
        own_callbacks: list[Any] = [*(callbacks or [])]
        if not any(one is VllmExportCallback or isinstance(one, VllmExportCallback) for one in own_callbacks):
            own_callbacks.insert(0, VllmExportCallback())
        given = optimizer_cls_and_kwargs[0] if optimizer_cls_and_kwargs else type(optimizers[0])
        self.own_optimizer = None if given is type(None) else given.__name__
        self._collator_is_own, self._verifier_head = data_collator is None, verifier_head
        config = getattr(model, "config", None)
        if args.push_to_hub and args.process_index == 0 and config is not None:  # the Trainer makes it unchecked
            make_repo(args, config.verifier_name_or_path)
        with refused_arguments():
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                model_init=model_init and in_float32(model_init),
                callbacks=own_callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        if is_quiet():
            self.remove_callback(PrinterCallback)
        require_whole_weights(self)
        if args.device.type == "cpu":
            keep_freed_memory()
        self.label_names = ["labels"]
        self.validation: Validation | None = None
        self._completed: tuple[Any, Iterator[dict[str, Any]]] | None = None
        self.configure_model()
        check_metric(args, self.config.num_depths, eval_dataset)
        self.current_run = CurrentRun(self)
        self.time_left = TimeLeft(self)
        self.callback_handler.callbacks[:0] = [self.current_run, self.time_left]
        if args.push_to_hub:
            names = (args.verifier_name, args.hub_private_repo, args.hub_revision, args.hub_token)
            self.add_callback(PushToHubCallback(self.hub_model_id or "", *names))

    @property
    def config(self) -> PeagleConfig:
        """The drafter's configuration."""
        return cast(PeagleConfig, self.accelerator.unwrap_model(self.model).config)

    @property
    def export_callback(self) -> VllmExportCallback:
        for one in self.callback_handler.callbacks:
            if isinstance(one, VllmExportCallback):
                return one
        raise PeagleError(
            "The VllmExportCallback, by which checkpoints are saved, was removed from the trainer. Leave it there; "
            'with save_strategy="no" it saves nothing.'
        )

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights or of the optimizer's states."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def optimizer_cls_and_kwargs(self) -> tuple[Any, dict[str, Any]] | None:
        """The optimizer for the Trainer to make, where it isn't one of its own: the user's, or Muon with AdamW."""
        if self._optimizer_cls_and_kwargs is not None or self.optimizer is not None or self.args.optim != MUON:
            return self._optimizer_cls_and_kwargs
        return lambda: make_muon, {"args": self.args}

    @optimizer_cls_and_kwargs.setter
    def optimizer_cls_and_kwargs(self, given: tuple[Any, dict[str, Any]] | None) -> None:
        self._optimizer_cls_and_kwargs = given

    def configure_model(self) -> None:
        """Set up what depends on the model and on the arguments, either of which a trial of a search may change."""
        check_drafter(self.model)
        args = self.args
        if self._collator_is_own:
            self.data_collator = CODDataCollator.from_config(self.config, seed=args.seed)
        check_collator(self.data_collator, self.config.num_depths)
        self.eval_collator = self.data_collator
        if isinstance(self.data_collator, CODDataCollator):
            self.eval_collator = replace(self.data_collator, every_slot=True)
        configure_drafter(self.model, args)
        # The attribute isn't called "objective", because a hyperparameter search keeps its score under that name.
        drafter = self.accelerator.unwrap_model(self.model)
        self.distillation = build_objective(drafter, args, self._verifier_head, getattr(self, "distillation", None))
        self._verifier_head = self.distillation.verifier_head
        self._partitioner = Partitioner(args, self.config, self.accelerator, self.is_sharded)
        self._eval_loaders: dict[int, DataLoader] = {}

    def record(self) -> dict[str, Any]:
        """How the drafter was trained so far, for its card; each checkpoint holds it as `training.json`.

        `data` is what `prepare.json` says of the training data, `chat_template` and `chat_template_kwargs` how its
        chats became text (the template only if one was chosen), `seconds` the wall time with validation and saving,
        over all resumed parts, `validation` the metrics of this very step; each is None if unknown.
        """
        return describe_training(self)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; `resume_from_checkpoint` takes a folder of a checkpoint, `checkpoint_best`, or True (newest).

        Raises:
            PeagleError: the folder can't be resumed from, the output folder has checkpoints of another run, a loss or
                a gradient is no finite number, or the device's memory is too small; says what would help.
            RowError: a sample's hidden states can't be had; the last step is saved, and a rerun resumes there.
        """
        run = self.current_run
        with only_training(self.args):
            folder = checkpoint_to_go_on_from(self, resume_from_checkpoint, trial)
            with together():
                check_there_is_a_step(self.args, self.train_dataset)
            run.begin(folder, trial)
            vars(self).pop("train_sampler", None)
            if self.own_optimizer is None:
                # The optimizer is made anew, because the arguments may differ from those of an earlier call.
                self.optimizer = None
            with lost_process_explained(), run.failures_explained():
                if trial is None and self.model_init is None:  # with model_init the model is made later
                    run.restore()
                with run.going_on(ignore_keys_for_eval) as view:
                    try:
                        return super().train(view, trial, ignore_keys_for_eval)
                    except NothingLeft:
                        return self._finalize_training(trial, 0, time.time())
                    finally:
                        self._completed = None  # a reference to it would keep the loader workers alive

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """Over packed sequences that are asked for with their epoch; validation drops nothing of them.

        In place of `Trainer._get_dataloader` of transformers 5.17 to 5.24, from which all loaders come. An argument for
        samplers, and one for another collator in validation, would replace it.
        """
        check_dataset(dataset, may_lack=False)
        # This is the first call of the Trainer after the model and the arguments of a trial are known.
        if is_training:
            require_trained(self.model)
            self.configure_model()
            self.current_run.on_arguments_known()
        elif id(dataset) in self._eval_loaders:
            return self._eval_loaders[id(dataset)]
        dataset.check_layers(self.config.eagle_aux_hidden_state_layer_ids)
        # Fillers make the number of packed sequences equal for all processes. Otherwise accelerate would repeat some.
        multiple = self.args.world_size * batch_size if self.args.world_size > 1 else 1
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = EpochSampler(len(dataset), seed, multiple, shuffle=is_training)
        if is_training:
            self.train_sampler = sampler
            return super()._get_dataloader(dataset, description, batch_size, lambda _: sampler, True)
        given = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            loader = super()._get_dataloader(dataset, description, batch_size, lambda _: sampler)
        finally:
            self.data_collator, self.args.dataloader_drop_last = given
        # Validation passes a key, prediction on a test set doesn't.
        if self.args.dataloader_persistent_workers and dataloader_key is not None:
            self._eval_loaders[id(dataset)] = loader
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        check_named(eval_dataset, self.eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """Like the Trainer's, but if a sample fails on one process, all processes raise its `RowError`.

        States that a verifier in this process computes are those of the next step while this one is trained on.
        """
        if self._completed is None or self._completed[0] is not epoch_iterator:
            dataset = cast(HiddenStatesDataset, self.train_dataset)
            ahead = self.args.gradient_accumulation_steps
            self._completed = epoch_iterator, dataset.completed(epoch_iterator, ahead)
        completed = self._completed[1]
        with self.current_run.throughput.waiting():
            batches = on_all_processes(lambda: list(islice(completed, num_batches)))
            return super().get_batch_samples(iter(batches), num_batches, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward, part by part with `sequence_partitions`; gradients are reduced with the last part."""
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != -100).sum()
        run, step = self.current_run, self.state.global_step + 1
        run.throughput.positions += inputs["input_ids"].numel()
        *others, last = self._partitioner.parts(inputs, is_training=True)
        loss = torch.zeros((), device=self.args.device)
        for part in others:
            with without_reduction(self.accelerator, model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        loss = loss + super().training_step(model, last, num_items_in_batch)
        run.nan_check.note_loss(step, loss)
        # With float16 the gradient scaler expects infinities and skips the steps that have them.
        if self.accelerator.sync_gradients and not self.args.fp16:
            run.nan_check.note_gradient(step, gradient_norm(self, model))
        if run.nan_check.is_full:
            run.require_finite()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, or of a part of one in training; in `evaluation_loop` its sums are kept."""
        if self.validation is not None:
            parts = self._partitioner.parts(inputs, is_training=False)
            measured = [self.distillation(model, part) for part in parts]
            loss = self.validation.add(measured)
            return (loss, measured) if return_outputs else loss
        outputs = self.distillation(model, inputs, num_items_in_batch)
        if model.training:
            self.current_run.counters += outputs.counters
        # DDP averages the gradients of all processes, but num_items_in_batch counts the labels of all of them.
        is_shared = self.args.average_tokens_across_devices and num_items_in_batch is not None
        loss = outputs.loss * (self.accelerator.num_processes if is_shared else 1)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Like `Trainer.evaluation_loop`, with the drafter's metrics; the batches' logits are never kept."""
        run = self.current_run
        if self.is_in_train:
            run.require_finite()
        self.validation = validation = Validation(self.config.num_depths, self.args.device)
        batches = cast(DataLoader, FailingTogether(dataloader))
        try:
            output = super().evaluation_loop(batches, description, True, ignore_keys, metric_key_prefix)
        except RowError:
            if self.is_in_train:
                run.owes_validation = True
                self.state.log_history.append({"step": self.state.global_step, VALIDATION_OWED: True})
            raise
        finally:
            self.validation = None
        metrics = validation.metrics(lambda sums: self.accelerator.reduce(sums, reduction="sum"))
        if self.is_in_train:
            run.require_finite_validation(metrics["loss"])
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint (see `saving`).

        In place of `Trainer._save_checkpoint` of transformers 5.17 to 5.24, whose folders have other files, and are
        half written under their own name. An event of the Trainer for writing a checkpoint would replace it.
        """
        self.current_run.require_finite()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder = Path(self._get_output_dir(trial))
        save_checkpoint(self, run_folder)
        note_best(self, on_first(lambda: checkpoints_by_step(run_folder)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like the Trainer's, with the records of the training; of an adapter with `mask_hidden`."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            complete_saved_model(self, Path(output_dir or self.args.output_dir), is_checkpoint=_internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Like the Trainer's, with `save_on_each_node` also on other nodes than the first.

        There `save_pretrained` of transformers (5.19, for example) writes nothing, although the Trainer calls it.
        """
        drafter = vars(self.accelerator.unwrap_model(self.model))
        drafter["should_save_on_this_rank"] = lambda is_main_process: is_main_process
        try:
            super()._save(output_dir, state_dict)
        finally:
            del drafter["should_save_on_this_rank"]

    def _hp_search_setup(self, trial: Any) -> None:
        """Like the Trainer's, with the checks of the arguments that a trial sets."""
        before = dict(vars(self.args))
        super()._hp_search_setup(trial)
        check_trial(self.args, before)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Like the Trainer's, but the objective defaults to `metric_for_best_model`, to be improved."""
        compute_objective = compute_objective or (lambda metrics: metrics[metric_name(self.args)])
        direction = direction or ("maximize" if self.args.greater_is_better else "minimize")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    def create_model_card(  # type: ignore[override]
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
    ) -> None:
        """Write the drafter's card (see `hub.card.model_card`) as `README.md` into the output folder.

        Args:
            finetuned_from: the verifier's name on the hub.
        """
        if self.is_world_process_zero():
            write_card(self, finetuned_from, tags, dataset, name=model_name, license=license, language=language)

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
        return upload(self, commit_message or "Upload the drafter", blocking, token, revision, private, **kwargs)
