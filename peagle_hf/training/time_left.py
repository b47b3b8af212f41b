"""`TimeLeft`: how long the rest of a training will take, from its latest steps, validations and saves."""

import math
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

if TYPE_CHECKING:
    from .trainer import PeagleTrainer

FIRST_STEPS = 5
"""Steps that don't count, since kernels are compiled and tuned in them; of fewer than twice as many the first half."""
LATEST_STEPS = 100
STALLED_SHARE = 0.02
"""The slowest of the latest steps, which don't count: kernels are compiled again when sizes pass a limit."""
VALIDATION_SHARE = 0.7
"""Time of a batch in validation as a share of a training step's, until the first validation has been timed."""
BYTES_A_WEIGHT, BYTES_A_SECOND = 12, 2**30
"""Of a checkpoint, until the first save has been timed: float32 weights with two states of the optimizer, and the speed
of the disk of a machine with H200s (docs/performance.md, a whole training)."""


class TimeLeft(TrainerCallback):
    """Adds `minutes_left` to each log of a training, as the second callback at the events of the Trainer's loop.

    A step lasts as long as the latest ones did on average, from the end of the one before, data and logging included;
    the slowest of them don't count.
    Validations and saves are timed apart, and counted for as many as are still to come.
    """

    def __init__(self, trainer: "PeagleTrainer"):
        # A strong reference would form a cycle, and a deleted trainer would keep its memory.
        self._trainer: PeagleTrainer = weakref.proxy(trainer)
        self._restart(0, 1)

    def _restart(self, step: int, steps_an_epoch: int) -> None:
        self._begun_at, self._steps_an_epoch, self._last = step, steps_an_epoch, time.perf_counter()
        self._seconds: deque[float] = deque(maxlen=LATEST_STEPS)
        self._first: list[float] = []
        self._pauses: dict[str, dict[int, float]] = {"evaluate": {}, "save": {}}  # seconds by step
        self._paused_for: tuple[str, int] | None = None

    def _take(self) -> float:
        """Seconds since the last event."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restart(state.global_step, updates_in(len(kwargs["train_dataloader"]), args))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end_pause()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = self._take()
        if len(self._first) < FIRST_STEPS:
            self._first.append(seconds)
        else:
            self._seconds.append(seconds)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin_pause("evaluate", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin_pause("save", state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            logs["minutes_left"] = state.log_history[-1]["minutes_left"] = self.seconds_left(args, state) / 60

    def _begin_pause(self, kind: str, step: int) -> None:
        """Called when a validation, or a part of one on another data set, has ended, and when a checkpoint is written.

        The time since the event before is of this kind. What follows, such as an upload, is too, up to the next event.
        """
        self._paused_for = kind, step
        self._add_to_pause()

    def _end_pause(self) -> None:
        if self._paused_for is not None:
            self._add_to_pause()
            self._paused_for = None

    def _add_to_pause(self) -> None:
        assert self._paused_for is not None
        kind, step = self._paused_for
        self._pauses[kind][step] = self._pauses[kind].get(step, 0.0) + self._take()

    @property
    def step_seconds(self) -> float:
        """Mean of `counted`; 0 before the first step has ended."""
        return _mean(self.counted, 0.0)

    @property
    def counted(self) -> list[float]:
        """Seconds of the latest steps, without the slowest."""
        counted = sorted(self._seconds)
        if len(counted) < FIRST_STEPS:
            seen = [*self._first, *self._seconds]
            return seen[len(seen) // 2 :]
        if len(counted) == FIRST_STEPS:
            return counted
        return counted[: -math.ceil(STALLED_SHARE * len(counted))]

    def seconds_left(self, args: TrainingArguments, state: TrainerState) -> float:
        """Seconds until the last step, its validation and its save are over."""
        step = self.step_seconds
        predicted = VALIDATION_SHARE * step * validation_batches(self._trainer)
        validation = _mean([*self._pauses["evaluate"].values()], predicted)
        evaluates_left, saves_left = (
            max(0, total - sum(at > self._begun_at for at in self._pauses[kind]))
            for kind, total in pauses(args, state, self._steps_an_epoch, self._begun_at).items()
        )
        save = _mean([*self._pauses["save"].values()], save_seconds(self._trainer.model))
        return (state.max_steps - state.global_step) * step + evaluates_left * validation + saves_left * save


def pauses(args: TrainingArguments, state: TrainerState, steps_an_epoch: int, begun_at: int = 0) -> dict[str, int]:
    """How often a training validates and saves after the step at which it began; one at that step is extra.

    Args:
        state: with `max_steps`, `eval_steps` and `save_steps`.
    """

    def times(strategy: Any, every: int, delay: float) -> int:
        if strategy == IntervalStrategy.NO:
            return 0
        interval = every if strategy == IntervalStrategy.STEPS and every else steps_an_epoch
        earlier = max(int(begun_at // interval), delayed(strategy, delay, interval, steps_an_epoch))
        return max(0, math.ceil(state.max_steps / interval) - earlier)

    evaluations = times(args.eval_strategy, state.eval_steps, args.eval_delay)
    is_best = args.save_strategy == SaveStrategy.BEST  # whether to save is decided after each validation
    return {"evaluate": evaluations, "save": evaluations if is_best else times(args.save_strategy, state.save_steps, 0)}


def save_seconds(model: Any) -> float:
    """What saving a checkpoint is taken to last until one was timed."""
    return BYTES_A_WEIGHT * sum(weight.numel() for weight in model.parameters()) / BYTES_A_SECOND


def delayed(strategy: Any, delay: float, interval: float, steps_an_epoch: int) -> int:
    """Validations, one each `interval` steps, that `--eval-delay` leaves out.

    Args:
        delay: in steps if they are counted in steps, else in epochs.
    """
    steps = delay if strategy == IntervalStrategy.STEPS else delay * steps_an_epoch
    return max(0, math.ceil(steps / interval) - 1)


def updates_in(batches: int, args: TrainingArguments) -> int:
    """Steps of the optimizer in an epoch, given its number of batches."""
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def planned_steps(args: TrainingArguments, num_packs: int) -> tuple[int, int]:
    """Steps of the training, and of an epoch, given the number of packed sequences."""
    at_once = args.per_device_train_batch_size * args.world_size
    # On several processes the sampler fills the last batch up, so that none is smaller.
    leaves_out = args.dataloader_drop_last and args.world_size == 1
    steps_an_epoch = updates_in(num_packs // at_once if leaves_out else math.ceil(num_packs / at_once), args)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_an_epoch * args.num_train_epochs)
    return steps, steps_an_epoch


def validation_batches(trainer: "PeagleTrainer") -> int:
    """Batches of a validation on each process, over all of its data sets."""
    given: Any = trainer.eval_dataset
    datasets = given.values() if isinstance(given, dict) else [given] if given is not None else []
    at_once = trainer.args.world_size * trainer.args.per_device_eval_batch_size
    return sum(math.ceil(len(dataset) / at_once) for dataset in datasets)


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
