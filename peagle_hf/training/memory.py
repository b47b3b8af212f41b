"""Predicts the device memory of a training step from the configuration, and names the flags that lower it.

The prediction is linear: a fixed number of bytes, and a number for each slot of the largest part that is run at once.
It describes one process on a GPU in bf16 mixed precision, with all weights. Shape letters: L positions, R slots, H
hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.extract_in_process import GPU_BATCH_TOKENS
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
    "adafactor": 0,  # of a matrix a row and a column
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
        processes: that train together, each with copies of all weights.
        validates: whether there is validation, which from the first one on keeps the verifier's whole head.
        verifier: bytes of the verifier's weights on this device, if it generates hidden states in this process.
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
    verifier: int = 0
    verifier_token: int = 0
    batches_ahead: int = 0

    @property
    def num_positions(self) -> int:
        """L of the batch."""
        return self.positions * self.batch_size

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
        # Equal parts of n slots: each brings its prefix, so that the k-th has the rollouts of fewer positions.
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
    `verifier` are the weights of one that generates states, and `generated` what it works with and the states of the
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
        passes = self.held + self.loss + self.activations + (self.gradients if self.accumulates else 0)
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
    weights = sum(inputs * outputs for inputs, outputs in linear)
    embedding, head = layer.vocab_size * size, config.draft_vocab_size * size
    trained = weights + embedding * config.embed_requires_grad + head * plan.train_head
    frozen = (head + embedding * (not config.embed_requires_grad)) * HALF
    if plan.lora_r is not None:
        frozen += trained * FLOAT
        trained = weights = plan.lora_r * sum(map(sum, linear))
    bytes_a_weight = STATE_BYTES.get(plan.optimizer)
    states = None if bytes_a_weight is None else trained * bytes_a_weight
    if plan.optimizer == MUON:
        states = weights * FLOAT + (trained - weights) * 2 * FLOAT
    slots = plan.slots_at_once
    chunk_slots = min(slots, CHUNK_ELEMENTS["cuda"] // config.draft_vocab_size)
    return MemoryEstimate(
        weights=trained * FLOAT,
        gradients=trained * FLOAT,
        optimizer=states,
        frozen=frozen,
        whole_head=embedding * HALF if plan.validates and config.draft_vocab_size < layer.vocab_size else 0,
        linear_start=linear_start_bytes(config) if plan.linear_start else 0,
        inputs=plan.num_positions * size * (config.num_aux_hidden_states + 3) * HALF,
        # The logits, their gradient, the verifier's logits of the same targets; a trained head's gradient, and it scaled.
        loss=round(2.4 * chunk_slots * config.draft_vocab_size * HALF) + 2 * head * FLOAT * plan.train_head,
        activations=slots * bytes_per_slot(plan),
        step=step_bytes(linear, plan.processes) if plan.optimizer == MUON and plan.lora_r is None else 0,
        accumulates=plan.accumulates or plan.partitions > 1,
        verifier=plan.verifier,
        generated=min(plan.num_positions, max(plan.positions, GPU_BATCH_TOKENS)) * plan.verifier_token
        + plan.batches_ahead * plan.num_positions * size * (config.num_aux_hidden_states + 1) * HALF,
    )


def verifier_memory(args: Any, config: PeagleConfig) -> dict[str, int]:
    """The fields of `MemoryPlan` for a verifier that generates states in this process, as the arguments describe it.

    Args:
        args: a `PeagleTrainingArguments`.
    """
    name = args.verifier_name_or_path or config.verifier_name_or_path
    if not args.runs_verifier or name is None:
        return {}
    ahead = {"batches_ahead": args.gradient_accumulation_steps}
    if args.verifier_device and torch.device(args.verifier_device) != args.device:
        return ahead
    weights, a_token = inference_memory(
        name, config.num_aux_hidden_states, args.verifier_revision, args.trust_remote_code
    )
    return {"verifier": weights, "verifier_token": a_token, **ahead}


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
    needed = fixed.held + fixed.gradients + fixed.loss
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
    shares = {
        "weights, float32": predicted.weights,
        "gradients, float32": predicted.gradients,
        f"optimizer states ({plan.optimizer})": predicted.optimizer or 0,
        "frozen weights": predicted.frozen,
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
    if budget is not None:
        lines.append(f"{'available':<44}{budget / GIB:>8.2f} GiB")
        if predicted.total > budget:
            lines.append(advice(plan, budget))
        else:
            lines.append("It fits." if is_known else "Without those states it fits.")
    return "\n".join(lines)


def advice(plan: MemoryPlan, budget: int) -> str:
    """The flags that lower the peak, each with the peak predicted with it and all flags before it, until it fits."""
    steps = [
        ("--activation-checkpointing", replace(plan, checkpointing="keep_attention")),
        ("--sequence-partitions 4", replace(plan, checkpointing="keep_attention", partitions=max(4, plan.partitions))),
    ]
    narrow = replace(steps[-1][1], optimizer="adamw_bnb_8bit")
    steps.append(("--optim adamw_bnb_8bit", narrow))
    single = replace(narrow, batch_size=1)
    steps.append(("--per-device-train-batch-size 1", single))
    half = replace(single, positions=plan.positions // 2)
    steps.append((f"--total-seq-len {half.positions}", half))
    small = replace(half, config=PeagleConfig.from_dict(plan.config.to_dict() | {"embed_requires_grad": False}))
    steps.append(("--no-embed-requires-grad", small))
    steps.append(("--no-linear-start", replace(small, linear_start=False)))
    if plan.verifier:
        cached = replace(steps[-1][1], verifier=0, verifier_token=0, batches_ahead=0)
        steps.append(("peagle-hf extract before training", cached))
    lines = ["To need less, turn these on, one after another:"]
    current = estimate(plan).total
    for flag, changed in steps:
        total = estimate(changed).total
        if total < current:
            lines.append(f"  {flag:<48}{total / GIB:>8.2f} GiB")
            current = total
        if current <= budget:
            break
    else:
        lines.append("A drafter with fewer layers or a smaller --draft-vocab-size needs less still.")
    return "\n".join(lines)


def device_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory that can be counted on; None on a CPU."""
    if device.type != "cuda":
        return None
    return round(0.92 * torch.cuda.get_device_properties(device).total_memory)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
