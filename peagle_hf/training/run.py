"""`peagle-hf train`: builds the drafter, the data sets and the trainer that the arguments describe, and trains."""

import logging
import os
import time
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..console import less_verbose, number_of
from ..data.cache_manifest import Manifest, check_cache, check_folder
from ..data.cache_storage import cache_folder, cached_rows
from ..data.dataset import GENERATED_DTYPE, HiddenStatesDataset
from ..data.endpoint import endpoint_urls, served_model
from ..data.endpoint_folder import check_layers, remove_unfetched, require_layers, served_layers
from ..data.endpoint_states import Endpoint
from ..data.in_process_states import InProcessVerifier
from ..data.prepared_dataset import load_prepared, read_prepare_record, split_rows
from ..errors import PeagleError
from ..files import canonical_path, check_writable
from ..model.config import PeagleConfig
from ..model.drafter import PeagleForSpeculation
from ..processes import are_several, on_first, together
from ..verifier.draft_vocabulary import draft_vocabulary, load_token_freq
from ..verifier.head import VerifierHead
from ..verifier.loading import default_aux_layer_ids, load_verifier_config
from .adapters import add_adapter
from .arguments import PeagleTrainingArguments
from .checkpoints import newest_checkpoint, recover, resumable_folder
from .initialization import start_linearly
from .memory import report
from .model_setup import head_dtype
from .resuming import is_finished, only_training
from .time_left import BYTES_A_WEIGHT, FIRST_STEPS, pauses, planned_steps, save_seconds, validation_batches
from .trainer import PeagleTrainer
from .warm_start import continued_config, load_drafter, sampling, saved_config

logger = logging.getLogger(__name__)

TIMED_STEPS, VALIDATED_BATCHES = 5 * FIRST_STEPS, 8
"""Of a training whose time `memory_report` predicts."""


def train(args: PeagleTrainingArguments) -> PeagleTrainer | None:
    """Train a drafter on cached hidden states; resumes from the output folder's newest checkpoint if there is one.

    With `memory_report` or `dry_run`, print a prediction instead and return None; `memory_report` also trains for some
    steps, to see how long they take, and keeps nothing of it. Where the last step is done already in a folder that can
    only be read, the log says so, and None is returned too. Log lines are those of the first process of each machine.
    """
    with less_verbose(not args.should_log):
        return _train_or_predict(args)


def _train_or_predict(args: PeagleTrainingArguments) -> PeagleTrainer | None:
    if args.memory_report:
        config = build_config(args)
        if args.process_index == 0:
            print(report(args.memory_plan(config), args.usable_memory()))
        print_time(args, config)
        return None
    if args.dry_run:
        planned = plan(args)
        if args.process_index == 0:
            print(planned)
        return None
    if args.save_strategy == SaveStrategy.NO and not args.enable_jit_checkpoint:
        raise PeagleError(
            "--save-strategy no leaves nothing behind: the drafter would be lost when training ends. Leave the flag "
            "out, or train in Python with PeagleTrainer, which keeps the drafter in memory."
        )
    if on_first(lambda: _is_finished(args)):
        return None
    with only_training(args):
        return _train(args)


def _is_finished(args: PeagleTrainingArguments) -> bool:
    """Whether nothing can be trained further in an output folder that can only be read; see `resuming.is_finished`."""
    newest = newest_checkpoint(args.output_dir) if args.resume and not args.resume_from_checkpoint else None
    if newest is None or os.access(args.output_dir, os.W_OK):
        return False
    return is_finished(args, newest, build_config(args), len(_datasets(args, _source(args))[0]))


def _train(args: PeagleTrainingArguments) -> PeagleTrainer:
    resumed = checkpoint_to_resume(args)
    trainer = build_trainer(args, resumed)
    trainer.train(resume_from_checkpoint=resumed)
    if args.should_save and newest_checkpoint(args.output_dir) is None:
        raise PeagleError(
            f"Training ended after step {trainer.state.global_step}, but no checkpoint was saved, so nothing is left "
            "of it. Pass --save-strategy epoch."
        )
    return trainer


def build_trainer(
    args: PeagleTrainingArguments, resumed: str | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> PeagleTrainer:
    """The trainer of the run that the arguments describe, with its drafter and data sets, on all processes.

    Args:
        resumed: the checkpoint that it will go on from, if it does: then the drafter needs no linear start.

    Raises:
        PeagleError: see `build_drafter` and `build_datasets`; on all processes.
    """
    with together():
        drafter, head = _drafter_and_head(args)
        train_dataset, eval_dataset = build_datasets(args)
    if args.linear_start and not (args.from_pretrained or resumed):
        assert isinstance(drafter, PeagleForSpeculation)  # only a trained drafter gets an adapter
        with together():
            drafter.to(args.device)
            workers = args.dataloader_num_workers or 0, args.dataloader_multiprocessing_context
            start_linearly(drafter, train_dataset, head, *workers)
    return PeagleTrainer(
        model=drafter,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
        verifier_head=head,
    )


def plan(args: PeagleTrainingArguments) -> str:
    """A report of the data, steps and checkpoints of a training with these arguments, for `--dry-run`."""
    config = build_config(args)
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in PeagleForSpeculation(config).parameters())
    # The source of hidden states is only described here: no server is asked and no verifier is loaded.
    train_dataset, eval_dataset = _datasets(args, _source(args))
    packs = [len(dataset.plan) for dataset in (train_dataset, eval_dataset) if dataset]
    samples = [dataset.num_samples for dataset in (train_dataset, eval_dataset) if dataset]
    steps, steps_an_epoch = planned_steps(args, packs[0])
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    newest = newest_checkpoint(args.output_dir) if args.resume else None
    exported = num_weights * getattr(torch, args.export_dtype).itemsize
    to_resume = num_weights * BYTES_A_WEIGHT
    return "\n".join(
        [
            f"would train a drafter of {num_weights / 1e6:.1f} million weights for {_verifier(args)}: "
            f"{number_of(config.transformer_layer_config.num_hidden_layers, 'layer')}, K {config.num_depths}",
            f"would train on {number_of(samples[0], 'sample')} in {number_of(packs[0], 'packed sequence')} of "
            f"{args.total_seq_len} positions and validate on {sum(samples[1:])} in {sum(packs[1:])}",
            f"would take {number_of(steps, 'step')}, {steps_an_epoch} an epoch, of "
            f"{number_of(a_step, 'packed sequence')} each",
            f"would {f'go on from {newest}' if newest else f'write into {args.output_dir}'}: each exported checkpoint "
            f"takes {exported / 2**30:.2f} GiB, each one to resume from about {to_resume / 2**30:.2f} GiB more",
        ]
    )


def print_time(args: PeagleTrainingArguments, config: PeagleConfig) -> None:
    """Print how long a step and the whole training take on this device, from some steps on the cached data."""
    has_data = False
    try:
        if args.n_gpu > 1:
            raise PeagleError("show this process one GPU with CUDA_VISIBLE_DEVICES, or start it with torchrun.")
        # The data are checked before the drafter is built, which may need more memory than this machine has.
        with together():
            _datasets(args, _source(args))
        has_data = True
        with less_verbose(True):  # the log has named the mask token and the samples without states already
            times = _time_steps(args)
    except PeagleError as error:
        if has_data and are_several():
            # The other processes may wait for this one, so it must end with an error.
            raise
        times = f"How long training takes isn't measured: {error}"
    if args.process_index == 0:
        print(times)


def _time_steps(args: PeagleTrainingArguments) -> str:
    """Train and validate for some steps in a temporary folder, and say what the training takes at this speed."""
    brief = copy(args)
    brief.max_steps, brief.logging_strategy, brief.logging_steps = TIMED_STEPS, IntervalStrategy.STEPS, FIRST_STEPS
    brief.eval_strategy, brief.save_strategy, brief.load_best_model_at_end = IntervalStrategy.NO, SaveStrategy.NO, False
    brief.linear_start, brief.resume, brief.resume_from_checkpoint, brief.on_generate = False, False, None, "delete"
    brief.push_to_hub, brief.report_to = False, []
    # Persistent workers would keep the plan of the first validation, and the next one has another plan.
    brief.dataloader_persistent_workers = False
    with TemporaryDirectory() as folder:
        brief.output_dir = on_first(lambda: folder)
        trainer = build_trainer(brief)
        for shown in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(shown)
        trainer.train()
        step, steps_timed = trainer.time_left.step_seconds, len(trainer.time_left.counted)
        steps, steps_an_epoch = planned_steps(args, len(cast(HiddenStatesDataset, trainer.train_dataset)))
        state = TrainerState(max_steps=steps)
        state.compute_steps(args, steps)
        has_validation = trainer.eval_dataset is not None
        times = pauses(args, state, steps_an_epoch)
        validations, saves, save = times["evaluate"] * has_validation, times["save"], save_seconds(trainer.model)
        validation, validated = 0.0, []
        if validations:
            validation = _time_validation(trainer)
            batches = number_of(validation_batches(trainer), "batch", "batches")
            validated = [f"{f'a validation of {batches}':<44}{validation:>8.1f} s"]
    minutes = (steps * step + validations * validation + saves * save) / 60
    whole = f"{number_of(steps, 'step')}, {number_of(validations, 'validation')} and {number_of(saves, 'save')}"
    return "\n".join(
        [
            f"{f'a step here, mean of {steps_timed}':<44}{step * 1e3:>8.0f} ms",
            *validated,
            f"{'a save, by an estimate':<44}{save:>8.1f} s",
            f"{whole:<44}{minutes:>8.1f} minutes",
            "The start, with the compiling of kernels, comes on top.",
        ]
    )


def _time_validation(trainer: PeagleTrainer) -> float:
    """Seconds of a whole validation, from a few of its batches; the first one, which compiles, doesn't count."""
    dataset, batches = cast(HiddenStatesDataset, trainer.eval_dataset), validation_batches(trainer)
    at_once = trainer.args.world_size * trainer.args.per_device_eval_batch_size
    seconds = 0.0
    plan, few = dataset.plan, min(batches, VALIDATED_BATCHES)
    for number in (1, few):
        dataset.plan = plan[: number * at_once]
        start = time.perf_counter()
        trainer.evaluate()
        seconds = time.perf_counter() - start
    dataset.plan = plan
    return seconds * batches / few


def checkpoint_to_resume(args: PeagleTrainingArguments) -> str | None:
    """The checkpoint that a run with these arguments goes on from: the named one, else the newest, else none.

    With `resume` off, the checkpoints in the output folder stay until the new run has its first.

    Raises:
        PeagleError: the named one or the newest can't be resumed from, or the output folder holds the drafter that
            `from_pretrained` names.
    """
    with together():
        if args.should_save:
            check_writable(args.output_dir)
    # The first process decides, because each of several machines could choose another checkpoint.
    return on_first(lambda: _checkpoint_to_resume(args))


def _checkpoint_to_resume(args: PeagleTrainingArguments) -> str | None:
    recover(args.output_dir)
    if args.from_pretrained and Path(args.output_dir).resolve() in Path(args.from_pretrained).resolve().parents:
        raise PeagleError(
            f"The drafter {args.from_pretrained} lies in {args.output_dir}, where the new run's checkpoints would take "
            "its place. Name another --save-path; to go on with that run itself leave --from-pretrained out."
        )
    if args.resume_from_checkpoint:
        return str(resumable_folder(args.resume_from_checkpoint))
    if not args.resume:
        return None
    newest = newest_checkpoint(args.output_dir)
    if newest is None:
        return None
    logger.info("Resuming from %s; pass --no-resume to start afresh.", newest)
    return str(newest)


def build_config(args: PeagleTrainingArguments, earlier: str | None = None) -> PeagleConfig:
    """The configuration that the arguments describe, or that of `from_pretrained` with their sampling and verifier.

    Raises:
        PeagleError: no verifier is named, or the arguments ask for another drafter than `from_pretrained`.
    """
    verifier = _verifier(args)
    if args.from_pretrained:
        return continued_config(args, earlier or args.from_pretrained, verifier)
    return PeagleConfig.from_verifier(
        verifier,
        num_layers=args.num_layers,
        draft_arch=args.draft_arch,
        draft_vocab_size=args.draft_vocab_size,
        mask_token_id=args.mask_token_id,
        target_layer_ids=_layer_ids(args),
        norm_before_residual=args.norm_before_residual,
        norm_before_fc=args.norm_before_fc,
        fc_norm=args.fc_norm,
        sliding_window=args.sliding_window,
        revision=args.verifier_revision,
        trust_remote_code=args.trust_remote_code,
        **sampling(args),
    )


def build_drafter(args: PeagleTrainingArguments) -> PeagleForSpeculation | PeftModel:
    """The drafter that the arguments describe, new or from `from_pretrained`, with its verifier's head attached.

    With `lora_r` it comes with an adapter on all of its linear layers (see `adapters`).

    Raises:
        PeagleError: no verifier is named, or the cache was made by another one.
    """
    return _drafter_and_head(args)[0]


def _drafter_and_head(args: PeagleTrainingArguments) -> tuple[PeagleForSpeculation | PeftModel, VerifierHead]:
    """See `build_drafter`; and the verifier's head, so that the trainer need not read it again."""
    set_seed(args.seed)
    # A link such as checkpoint_best may move between reading the configuration and reading the weights, so it is
    # followed once.
    earlier = args.from_pretrained and str(canonical_path(args.from_pretrained))
    verifier, config = _verifier(args), build_config(args, earlier)
    if earlier:
        drafter = load_drafter(earlier, config)
    else:
        # Drawing the random weights of a large drafter takes a moment on a GPU and half a minute on a CPU.
        with args.device:
            drafter = PeagleForSpeculation(config)
        if drafter.d2t is not None:
            frequencies = load_token_freq(args.token_freq_path or Path(args.data_path) / "token_freq.pt")
            drafter.set_draft_vocabulary(*draft_vocabulary(frequencies, config.draft_vocab_size, config.vocab_size))
    target = load_verifier_config(verifier, args.verifier_revision, args.trust_remote_code)
    layer_ids = config.eagle_aux_hidden_state_layer_ids
    check_cache(_cache_folder(args), verifier, target, layer_ids, args.verifier_revision)
    head = drafter.load_verifier(
        verifier,
        initialize=not args.from_pretrained,
        train_head=args.train_head,
        dtype=head_dtype(args),
        revision=args.verifier_revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.lora_r is None:
        return drafter, head
    adapter = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",
        modules_to_save=args.lora_modules_to_save,
    )
    return add_adapter(drafter, adapter), head


def build_datasets(args: PeagleTrainingArguments) -> tuple[HiddenStatesDataset, HiddenStatesDataset | None]:
    """The training and validation data that the arguments describe; no validation with `train_data_ratio` 1.

    Raises:
        PeagleError: see `HiddenStatesDataset`; of missing states also if their source can't be had (`_ready_source`,
            `InProcessVerifier.load`).
    """
    source = _ready_source(args) if args.on_missing == "generate" else None
    datasets = _datasets(args, source)
    if isinstance(source, InProcessVerifier) and any(dataset.num_missing for dataset in datasets if dataset):
        source.load()
    return datasets


def _datasets(
    args: PeagleTrainingArguments, source: Endpoint | InProcessVerifier | None
) -> tuple[HiddenStatesDataset, HiddenStatesDataset | None]:
    train_rows, eval_rows = split_rows(args.data_path, args.train_data_ratio, args.seed)

    def dataset(rows: list[int]) -> HiddenStatesDataset:
        return HiddenStatesDataset(
            args.data_path,
            args.hidden_states_path,
            args.total_seq_len,
            rows,
            args.on_missing,
            args.seed,
            source if isinstance(source, Endpoint) else None,
            keep_generated=args.on_generate == "cache",
            skip_rows=args.skip_rows or (),
            verifier=source if isinstance(source, InProcessVerifier) else None,
        )

    return dataset(train_rows), dataset(eval_rows) if eval_rows else None


def _ready_source(args: PeagleTrainingArguments) -> Endpoint | InProcessVerifier | None:
    """What generates missing states: servers that were asked for their model and layers, or a verifier not loaded yet.

    Writes the cache's manifest if the states are to be kept.

    Raises:
        PeagleError: a server can't be reached, or runs another model or other layers, or its layers aren't known; the
            verifier's configuration can't be read; or the cache is of another verifier or other layers.
    """
    if args.asks_servers and args.target_layer_ids is None:
        require_layers(_server_folder(args))
    source = _source(args)
    if isinstance(source, Endpoint):
        served_model(source.urls, _verifier(args), args.request_timeout)
        check_layers(source.folder, source.layer_ids)
        remove_unfetched(source.folder, args.request_timeout)
    elif served_layers(_server_folder(args)) is not None:
        logger.info(
            "A vLLM server has used %s, but no --vllm-endpoint is given: the verifier runs in this process.",
            _server_folder(args),
        )
    _begin_cache(args)
    return source


def _begin_cache(args: PeagleTrainingArguments) -> None:
    """Write the manifest of a cache that generated states are to be kept in, unless it has one that fits."""
    if args.on_generate != "cache":
        return
    cache, verifier = Path(_cache_folder(args)), _verifier(args)
    existing = Manifest.read(cache)
    wanted = Manifest.of(
        verifier,
        load_verifier_config(verifier, args.verifier_revision, args.trust_remote_code),
        _layer_ids(args),
        args.verifier_revision,
        existing.dtype if existing else GENERATED_DTYPE,
        existing.storage if existing else "plain",
        read_prepare_record(args.data_path),
    )
    check_folder(cache, wanted, cached_rows(cache))
    if existing is None:
        wanted.write(cache)


def _layer_ids(args: PeagleTrainingArguments) -> list[int]:
    """The verifier's layers whose states the drafter reads: its own, or those of the arguments, cache or servers."""
    if args.from_pretrained:
        return list(saved_config(args.from_pretrained).eagle_aux_hidden_state_layer_ids)
    if args.target_layer_ids:
        return args.target_layer_ids
    if manifest := Manifest.read(_cache_folder(args)):
        return manifest.aux_layer_ids
    if args.asks_servers and (served := served_layers(_server_folder(args))):
        return list(served[:-1])
    config = load_verifier_config(_verifier(args), args.verifier_revision, args.trust_remote_code)
    return default_aux_layer_ids(config.num_hidden_layers)


def _source(args: PeagleTrainingArguments) -> Endpoint | InProcessVerifier | None:
    """What generates missing states by the arguments, if anything does; nothing is asked or loaded."""
    name = _verifier(args)
    if args.runs_verifier:
        device = args.verifier_device or args.device
        return InProcessVerifier(name, _layer_ids(args), device, args.verifier_revision, args.trust_remote_code)
    if not args.asks_servers:
        return None
    config = load_verifier_config(name, args.verifier_revision, args.trust_remote_code)
    return Endpoint(
        endpoint_urls(args.vllm_endpoint or ""),
        _server_folder(args),
        (*_layer_ids(args), config.num_hidden_layers),
        config.hidden_size,
        args.request_timeout,
        args.max_retries,
    )


def _verifier(args: PeagleTrainingArguments) -> str:
    """The verifier of the arguments, or else of the hidden states, or else of the prepared data."""
    if args.verifier_name_or_path:
        return args.verifier_name_or_path
    manifest = Manifest.read(_cache_folder(args))
    model = manifest.verifier if manifest else read_prepare_record(args.data_path).get("model")
    if model is None:
        # If the folder holds no prepared dataset, this raises an error that names it.
        load_prepared(args.data_path)
        raise PeagleError("No verifier is named. Pass --verifier-name-or-path with the model to draft for.")
    return str(model)


def _cache_folder(args: PeagleTrainingArguments) -> Path:
    return cache_folder(args.data_path, args.hidden_states_path)


def _server_folder(args: PeagleTrainingArguments) -> Path:
    return Path(args.server_hidden_states_path or _cache_folder(args))
