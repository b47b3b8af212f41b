"""Predicts the device memory of a training step from the configuration, and names the flags that lower it.

The prediction is linear: a fixed number of bytes, and a number for each slot of the largest part that is run at once.
It describes one process on a GPU in bf16 mixed precision. Shape letters: L positions, R slots, H hidden size.

With FSDP it assumes what examples/accelerate/fsdp2.yaml sets: each process keeps its share of weights (frozen ones in
float32, too), gradients and optimizer states, and while a layer runs, the embeddings, the head, that layer and the next
are whole in bf16, and one layer's gradient. What ZeRO divides isn't counted: with it the prediction is that of whole
copies, which is too high.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from ..data.cache_storage import cache_folder, cached_rows
from ..data.extract_in_process import GPU_BATCH_TOKENS
from ..data.in_process_states import GPU_PADDING
from ..data.prepared_dataset import load_prepared
from ..errors import PeagleError
from ..model.config import PeagleConfig
from ..model.layers import RECOMPUTED_SLOTS
from ..verifier.loading import inference_memory
from .losses import CHUNK_ELEMENTS
from .muon import step_bytes
from .optimizer import MUON

GIB = 1 << 30
FLOAT, HALF = 4, 2
MOST_PARTITIONS = 64
"""Upper limit on parts: every part repeats its prefix, so more parts barely shrink the largest."""
_ADAMW_32 = "adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_anyprecision paged_adamw_32bit"
_NOT_KNOWN = "galore_adamw galore_adamw_8bit galore_adafactor apollo_adamw lomo adalomo grokadamw"
STATE_BYTES: dict[str, int | None] = {
    **dict.fromkeys(_ADAMW_32.split(), 2 * FLOAT),
    **dict.fromkeys(["stable_adamw", "schedule_free_adamw", "schedule_free_radam"], 2 * FLOAT),
    **dict.fromkeys(["adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"], 2),
    "adamw_torch_4bit": 1,
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 3 * FLOAT),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), FLOAT),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), 1),
    **dict.fromkeys(("adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "schedule_free_sgd"), FLOAT),
    "rmsprop_bnb_8bit": 1,
    "sgd": 0,
    "sgd with momentum": FLOAT,
    "rmsprop with momentum": 2 * FLOAT,
    "adafactor": 0,  # one row and one column for each matrix, which is next to nothing
    **dict.fromkeys(_NOT_KNOWN.split(), None),
    **dict.fromkeys((f"{name}_layerwise" for name in _NOT_KNOWN.split()[:4]), None),
}
"""Bytes of optimizer state per trained weight; None where that depends on more than the number of weights."""


@dataclass(frozen=True)
class MemoryPlan:
    """The settings that the prediction depends on.

    Args:
        positions: L of a packed sequence.
        batch_size: packed sequences in a device's batch.
        learnt_share: share of the positions that are trained on.
        optimizer: as `optim` of the arguments.
        checkpointing: "none", "keep_attention" or "whole".
        partitions: parts that a batch is cut into.
        accumulates: gradients of earlier micro-batches are in memory during the forward pass.
        train_head: whether the drafter's head is trained.
        lora_r: rank of an adapter that is trained on all linear layers instead of their weights.
        linear_start: whether the drafter starts from a linear fit, which is over before the first step.
        processes: that train together.
        sharding: what divides weights among them, "FSDP" or "ZeRO"; "none" if each has copies of all.
        validates: whether there is validation, which from the first one on keeps the verifier's whole head.
        verifier: bytes of the verifier's weights, if it generates hidden states in this process.
        verifier_device: where it runs, if that isn't the drafter's device.
        verifier_token: bytes that it needs for each token that it reads at once.
        batches_ahead: batches whose states it generates in advance.
    """

    config: PeagleConfig
    positions: int
    batch_size: int = 1
    learnt_share: float = 0.6
    optimizer: str = "adamw_torch_fused"
    checkpointing: str = "none"
    partitions: int = 1
    accumulates: bool = False
    train_head: bool = False
    lora_r: int | None = None
    linear_start: bool = False
    validates: bool = False
    processes: int = 1
    sharding: str = "none"
    verifier: int = 0
    verifier_device: str | None = None
    verifier_token: int = 0
    batches_ahead: int = 0

    @property
    def num_positions(self) -> int:
        """L of the batch."""
        return self.positions * self.batch_size

    @property
    def shares(self) -> int:
        """Processes that the weights are divided among."""
        return self.processes if self.sharding == "FSDP" else 1

    @property
    def verifier_work(self) -> int:
        """Bytes that the verifier needs beside its weights for the largest batch that it reads, padding included."""
        padded = round(self.num_positions / (1 - GPU_PADDING))
        return min(padded, max(self.positions, GPU_BATCH_TOKENS)) * self.verifier_token

    @property
    def slots(self) -> int:
        """R of the whole batch: one slot per position, and what COD keeps of the trained ones at each further depth."""
        config = self.config
        kept = [max(config.down_sample_ratio**d, config.down_sample_ratio_min) for d in range(1, config.num_depths)]
        return round(self.num_positions * (1 + self.learnt_share * sum(kept)))

    @property
    def slots_at_once(self) -> int:
        """R of the largest part, which holds all positions up to its last anchor (see `data.partition`)."""
        if self.partitions == 1:
            return self.slots
        rollouts = self.slots - self.num_positions
        # Parts have equally many slots. A later part also has the positions before it, so it has room for fewer
        # rollouts.
        least, most = self.num_positions, self.slots
        while least < most:
            middle = (least + most) // 2
            reached = 0.0
            for _ in range(self.partitions):
                reached = min(1.0, (middle + reached * rollouts) / self.slots)
            least, most = (least, middle) if reached >= 1 else (middle + 1, most)
        return most


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by kind; `total` is the largest peak: of the linear start, the backward pass or the optimizer's step.

    `optimizer` is None, and counts nothing, where it isn't known; `step` is what the optimizer's step needs beside it.
    `gathered` are the weights that are whole, and a layer's gradient, while a divided drafter runs. `verifier` are the
    weights of one that generates states on this device, and `generated` what it works with here and the states of the
    batches ahead.
    """

    weights: int
    gradients: int
    optimizer: int | None
    frozen: int
    whole_head: int
    linear_start: int
    inputs: int
    loss: int
    activations: int
    step: int
    accumulates: bool
    gathered: int = 0
    verifier: int = 0
    generated: int = 0

    @property
    def held(self) -> int:
        """What is there in all parts of a step."""
        of_drafter = self.weights + (self.optimizer or 0) + self.frozen + self.whole_head + self.inputs
        return of_drafter + self.verifier + self.generated

    @property
    def total(self) -> int:
        start = self.weights + self.frozen + self.linear_start + self.verifier + self.generated
        passes = self.held + self.gathered + self.loss + self.activations + self.gradients * self.accumulates
        return max(start, passes, self.held + self.gradients + self.step)


def estimate(plan: MemoryPlan) -> MemoryEstimate:
    """Predict a step's memory in bytes."""
    config, layer = plan.config, plan.config.transformer_layer_config
    size, num_layers = layer.hidden_size, layer.num_hidden_layers
    query, key = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    inner = layer.intermediate_size
    linear = [(size * config.num_aux_hidden_states, size)]
    for width in [2 * size, *[size] * (num_layers - 1)]:
        linear += [(width, query), (width, key), (width, key), (query, size)]
        linear += [(size, inner), (size, inner), (inner, size)]
    of_layer = sum(inputs * outputs for inputs, outputs in linear[1:8])
    weights = sum(inputs * outputs for inputs, outputs in linear)
    embedding, head = layer.vocab_size * size, config.draft_vocab_size * size
    trained = weights + embedding * config.embed_requires_grad + head * plan.train_head
    shares, is_divided = plan.shares, plan.shares > 1
    frozen = (head + embedding * (not config.embed_requires_grad)) * (FLOAT if is_divided else HALF)
    if plan.lora_r is not None:
        frozen += trained * FLOAT
        trained = weights = plan.lora_r * sum(map(sum, linear))
    bytes_a_weight = STATE_BYTES.get(plan.optimizer)
    states = None if bytes_a_weight is None else trained * bytes_a_weight
    if plan.optimizer == MUON:
        states = weights * FLOAT + (trained - weights) * 2 * FLOAT
    is_apart = plan.verifier_device is not None
    slots = plan.slots_at_once
    chunk_slots = min(slots, CHUNK_ELEMENTS["cuda"] // config.draft_vocab_size)
    # A norm before `fc` makes a copy of the states.
    normed = config.norm_before_fc or config.has_fc_norm
    return MemoryEstimate(
        weights=trained * FLOAT // shares,
        gradients=trained * FLOAT // shares,
        optimizer=states if states is None else states // shares,
        frozen=frozen // shares,
        whole_head=embedding * HALF if plan.validates and config.draft_vocab_size < layer.vocab_size else 0,
        # The linear start needs whole weights; they are divided among the processes after it.
        linear_start=plan.linear_start
        * (linear_start_bytes(config) + (trained * FLOAT + frozen) * (shares - 1) // shares),
        inputs=plan.num_positions * size * (config.num_aux_hidden_states * (1 + normed) + 3) * HALF,
        # These are the logits, their gradient and the verifier's logits of the same targets. A trained head adds its
        # gradient and a scaled copy of that.
        loss=round(2.4 * chunk_slots * config.draft_vocab_size * HALF) + 2 * head * FLOAT * plan.train_head,
        activations=slots * bytes_per_slot(plan),
        step=step_bytes(linear, plan.processes, is_divided) if plan.optimizer == MUON and plan.lora_r is None else 0,
        accumulates=plan.accumulates or plan.partitions > 1,
        gathered=is_divided * (embedding + head + 3 * of_layer) * HALF,
        verifier=0 if is_apart else plan.verifier,
        generated=(0 if is_apart else plan.verifier_work)
        + plan.batches_ahead * plan.num_positions * size * (config.num_aux_hidden_states + 1) * HALF,
    )


def verifier_memory(args: Any, config: PeagleConfig) -> dict[str, Any]:
    """The fields of `MemoryPlan` for a verifier that generates states in this process, as the arguments describe it.

    Empty where all samples have their states: then it is never loaded.

    Args:
        args: a `PeagleTrainingArguments`.
    """
    name = args.verifier_name_or_path or config.verifier_name_or_path
    if not args.runs_verifier or name is None or not lacks_states(args):
        return {}
    is_apart = args.verifier_device and torch.device(args.verifier_device) != args.device
    weights, a_token = inference_memory(
        name, config.num_aux_hidden_states, args.verifier_revision, args.trust_remote_code
    )
    return {
        "verifier": weights,
        "verifier_device": args.verifier_device if is_apart else None,
        "verifier_token": a_token,
        "batches_ahead": args.gradient_accumulation_steps,
    }


def lacks_states(args: Any) -> bool:
    """Whether a sample that is trained on has no cached states; also if there is no prepared dataset yet."""
    if not (Path(args.data_path) / "token_freq.pt").exists():
        return True
    present = cached_rows(cache_folder(args.data_path, args.hidden_states_path)) | set(args.skip_rows or ())
    return not present.issuperset(range(len(load_prepared(args.data_path))))


def processes_of(args: Any) -> dict[str, Any]:
    """The fields of `MemoryPlan` for processes that train together, by the arguments and by `accelerate launch`."""
    is_divided = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    by_zero = args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    return {"processes": args.world_size, "sharding": "FSDP" if is_divided else "ZeRO" if by_zero else "none"}


def linear_start_bytes(config: PeagleConfig) -> int:
    """The most that `start_linearly` needs: float64 moments of F features and H targets, and a fifth for work."""
    num_features = (config.num_aux_hidden_states + 1) * config.hidden_size
    return round(1.2 * num_features * (num_features + config.hidden_size) * 2 * FLOAT)


def bytes_per_slot(plan: MemoryPlan) -> int:
    """Activation bytes per slot: kept by the forward pass, and used by the backward pass of one layer."""
    layer = plan.config.transformer_layer_config
    size, inner, num_layers = layer.hidden_size, layer.intermediate_size, layer.num_hidden_layers
    query, key = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    attention, feed_forward = size + 2 * query + 2 * key, size + 2 * inner
    if plan.checkpointing == "none":
        kept, working = num_layers * (attention + feed_forward), 3 * inner
    elif plan.checkpointing == "keep_attention":
        share = min(1.0, RECOMPUTED_SLOTS / plan.slots_at_once)
        kept, working = num_layers * (size + query), attention + 2 * query + round(share * 5 * inner)
    else:
        kept, working = num_layers * size, attention + feed_forward + 3 * inner
    return (kept + working + 2 * size) * HALF


def slots_that_fit(plan: MemoryPlan, budget: int) -> int:
    """How many slots can be run at once within `budget` bytes.

    Raises:
        PeagleError: the weights, their gradients and the optimizer's states alone are more than the budget.
    """
    fixed_plan = replace(plan, accumulates=True, linear_start=False)
    fixed = estimate(fixed_plan)
    if fixed.optimizer is None:
        raise PeagleError(
            f"How much memory the states of {plan.optimizer} take isn't known, so --sequence-partitions auto can't "
            "tell what fits. Give a number of parts."
        )
    needed = fixed.held + fixed.gathered + fixed.gradients + fixed.loss
    slots = (budget - needed) // bytes_per_slot(fixed_plan)
    needed = max(needed, fixed.held + fixed.gradients + fixed.step)
    if slots < 1 or needed > budget:
        raise PeagleError(
            f"Whatever the batch is, training needs {needed / GIB:.1f} GiB, but there are "
            f"{budget / GIB:.1f} GiB.\n{advice(plan, budget)}"
        )
    return slots


def cut_to_fit(plan: MemoryPlan, budget: int | None) -> MemoryPlan:
    """The plan in as few parts as fit within `budget` bytes, or in the most parts if no number fits."""
    for partitions in range(1, MOST_PARTITIONS + 1):
        plan = replace(plan, partitions=partitions)
        if budget is None or estimate(plan).total <= budget:
            break
    return plan


def report(plan: MemoryPlan, budget: int | None) -> str:
    """A table of bytes by kind, and the flags to change if the total is more than `budget` bytes."""
    predicted = estimate(plan)
    is_known = predicted.optimizer is not None
    part = f", 1/{plan.shares} of them" if plan.shares > 1 else ""
    shares = {
        f"weights, float32{part}": predicted.weights,
        f"gradients, float32{part}": predicted.gradients,
        f"optimizer states ({plan.optimizer}){part}": predicted.optimizer or 0,
        f"frozen weights{part}": predicted.frozen,
        **({"tables and layers that are gathered": predicted.gathered} if predicted.gathered else {}),
        **({"verifier's whole head, from validation on": predicted.whole_head} if predicted.whole_head else {}),
        **({"linear start, before the first step": predicted.linear_start} if predicted.linear_start else {}),
        **({"verifier that generates states": predicted.verifier} if predicted.verifier else {}),
        **({"its work, and the states ahead": predicted.generated} if predicted.generated else {}),
        f"inputs of {plan.num_positions:,} positions": predicted.inputs,
        f"activations of {plan.slots_at_once:,} slots at once": predicted.activations,
        "logits of one chunk": predicted.loss,
        **({"stacks of Muon's step": predicted.step} if predicted.step else {}),
    }
    lines = [f"{name:<44}{size / GIB:>8.2f} GiB" for name, size in shares.items()]
    if not is_known:
        lines.append(f"The states of {plan.optimizer} aren't known, and are not counted.")
    lines.append(f"{'predicted peak (not all are there at once)':<44}{predicted.total / GIB:>8.2f} GiB")
    if plan.sharding == "ZeRO":
        lines.append("What ZeRO divides among the processes isn't counted: less is needed.")
    if plan.verifier_device:
        lines += _of_other_device(plan, plan.verifier_device)
    if budget is not None:
        lines.append(f"{'available':<44}{budget / GIB:>8.2f} GiB")
        if predicted.total > budget:
            lines.append(advice(plan, budget))
        else:
            lines.append("It fits." if is_known else "Without those states it fits.")
    return "\n".join(lines)


def _of_other_device(plan: MemoryPlan, name: str) -> list[str]:
    """What the verifier needs on a device of its own, beside what there is."""
    needed, budget = plan.verifier + plan.verifier_work, device_memory(torch.device(name))
    lines = [f"{f'verifier and its work, on {name}':<44}{needed / GIB:>8.2f} GiB"]
    if budget is not None:
        lines.append(f"{f'available on {name}':<44}{budget / GIB:>8.2f} GiB")
        if needed > budget:
            lines.append(f"It doesn't fit on {name}: run peagle-hf extract before training, or name a larger GPU.")
    return lines


def advice(plan: MemoryPlan, budget: int) -> str:
    """The flags that lower the peak, each with the peak predicted with it and all flags before it, until it fits."""
    half, frozen = plan.positions // 2, plan.config.to_dict() | {"embed_requires_grad": False}
    changes: dict[str, dict[str, Any]] = {
        "--activation-checkpointing": {"checkpointing": "keep_attention"},
        "--sequence-partitions 4": {"partitions": max(4, plan.partitions)},
        "--optim adamw_bnb_8bit": {"optimizer": "adamw_bnb_8bit"},
        "--per-device-train-batch-size 1": {"batch_size": 1},
        f"--total-seq-len {half}": {"positions": half},
        "--no-embed-requires-grad": {"config": PeagleConfig.from_dict(frozen)},
        "--no-linear-start": {"linear_start": False},
    }
    if estimate(plan).verifier:
        changes["peagle-hf extract before training"] = {"verifier": 0, "verifier_token": 0, "batches_ahead": 0}
    lines = ["To need less, turn these on, one after another:"]
    peak = estimate(plan).total
    while True:
        lower = [flag for flag, change in changes.items() if estimate(replace(plan, **change)).total < peak]
        if not lower:
            lines.append("A drafter with fewer layers or a smaller --draft-vocab-size needs less still.")
            break
        plan = replace(plan, **changes.pop(lower[0]))
        peak = estimate(plan).total
        lines.append(f"  {lower[0]:<48}{peak / GIB:>8.2f} GiB")
        if peak <= budget:
            break
    return "\n".join(lines)


def device_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory that can be counted on; None on a CPU."""
    if device.type != "cuda":
        return None
    return round(0.92 * torch.cuda.get_device_properties(device).total_memory)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
