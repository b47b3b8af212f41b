"""`PeagleTrainingArguments`: the Trainer's arguments, defaults that suit a drafter, and the drafter's own fields."""

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import is_in_notebook

from ..arguments import check_names, plain
from ..console import is_quiet
from ..data.endpoint import MAX_RETRIES, MAX_RETRIES_HELP, REQUEST_TIMEOUT, REQUEST_TIMEOUT_HELP, endpoint_urls
from ..data.prepared_dataset import learnt_share
from ..errors import PeagleError
from ..model.config import PeagleConfig
from ..processes import connect_on_cpu, is_launched
from ..verifier.loading import hub_verifier, usable_device
from .argument_rules import (
    HELP,
    check_contradictions,
    check_names_of_trainer,
    check_optimizer,
    check_own_values,
    check_scheduler,
    check_tracker,
    check_values,
    has_bfloat16,
    refused_arguments,
    warn_of_unused,
)
from .loader_workers import choose_workers
from .losses import parse_loss
from .memory import GIB, MemoryPlan, cut_to_fit, device_memory, processes_of, verifier_memory
from .optimizer import MUON, default_weight_decay


@dataclass
class PeagleTrainingArguments(TrainingArguments):
    """Arguments of `PeagleTrainer`; all of `transformers.TrainingArguments` plus the following.

    The command line and YAML files also know the flag names of vLLM's speculators (`--save-path`, `--epochs`, `--lr`,
    `--scheduler-type` …) as aliases of the Trainer's. `as_given` has the values by name before others were derived.
    """

    verifier_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The verifier, the model that the drafter is trained for: a hub name or a folder (default: the one "
            "that made the hidden states).",
            "aliases": ["--verifier"],
        },
    )
    data_path: str = field(default="./output", metadata={"help": "Folder of `peagle-hf prepare`."})
    hidden_states_path: str | None = field(
        default=None,
        metadata={"help": "Folder of `peagle-hf extract`. Default: hidden_states in the data path."},
    )
    output_dir: str = field(
        default="./output/checkpoints",
        metadata={"help": "Where the checkpoints go.", "aliases": ["--save_path", "--save-path"]},
    )
    speculator_type: Literal["peagle"] = field(default="peagle", metadata={"help": "The kind of drafter."})
    from_pretrained: str | None = field(
        default=None,
        metadata={"help": "Continue from the weights of this drafter (a folder or hub name) instead of new ones."},
    )
    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train a LoRA adapter of this rank on from_pretrained's drafter instead of its weights."},
    )
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved with the adapter, such as norm."}
    )
    num_layers: int = field(default=4, metadata={"help": "Decoder layers of the drafter."})
    draft_arch: Literal["llama", "qwen3"] | None = field(
        default=None,
        metadata={"help": "Kind of those layers. Default: that of --from-pretrained, else qwen3."},
    )
    num_depths: int | None = field(
        default=None,
        metadata={"help": "K, the tokens proposed in one forward pass. Default: that of --from-pretrained, else 8."},
    )
    down_sample_ratio: float | None = field(
        default=None, metadata={"help": "r of COD sampling, in (0, 1]. Default: that of --from-pretrained, else 0.7."}
    )
    down_sample_ratio_min: float | None = field(
        default=None,
        metadata={"help": "r_min of COD sampling, in [0, 1]. Default: that of --from-pretrained, else 0.2."},
    )
    max_anchors: int | None = field(
        default=None,
        metadata={
            "help": "The most positions of a sample that rollouts start from. Default: that of "
            "--from-pretrained, else all."
        },
    )
    norm_before_residual: bool = field(
        default=True,
        metadata={"help": "The first layer adds its output to the verifier's states after their norm, not before it."},
    )
    norm_before_fc: bool = field(
        default=False, metadata={"help": "Normalise the concatenated verifier states before the projection."}
    )
    fc_norm: bool = field(
        default=False, metadata={"help": "Normalise each verifier state by itself before the projection."}
    )
    embed_requires_grad: bool = field(default=True, metadata={"help": "Train the token embeddings."})
    sliding_window: int | None = field(
        default=None, metadata={"help": "Window of the drafter's attention in tokens. Default: full attention."}
    )
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "The drafter's head covers this many most frequent tokens. Default: all."}
    )
    token_freq_path: str | None = field(
        default=None,
        metadata={"help": "Token counts for the draft vocabulary. Default: token_freq.pt in the data path."},
    )
    mask_token_id: int | None = field(
        default=None,
        metadata={
            "help": "Token that stands where none is known yet. Default: the tokenizer's mask, an unused id, or pad."
        },
    )
    target_layer_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Verifier layers whose states the drafter reads. Default: those of the hidden-state cache."},
    )
    linear_start: bool = field(
        default=True,
        metadata={
            "help": "Start a new drafter from a linear fit of the verifier's next state to the cached ones, instead of "
            "random numbers."
        },
    )
    loss_fn: str = field(
        default="kl_div",
        metadata={
            "help": "Loss: kl_div, rkl, jsd, ce, tv, nla, lk_hybrid, a name of peagle_hf.register_loss, or weights of "
            'several as JSON (\'{"kl_div": 0.5, "tv": 0.5}\').'
        },
    )
    depth_loss_decay: float = field(
        default=1.0,
        metadata={"help": "Weight of a slot of depth d in the training loss: this to the power d. 1: all slots alike."},
    )
    per_position_loss_weight: Literal["dpace", "uniform"] = field(
        default="dpace",
        metadata={
            "help": "Weights of slots in the training loss. dpace: by what a slot adds to the expected acceptance "
            "length of its rollout, by the drafter's own probabilities. uniform: all alike."
        },
    )
    dpace_alpha: float = field(
        default=0.5,
        metadata={
            "help": "In (0, 1]: dpace takes (1 - alpha) q + alpha for the drafter's probability q of the verifier's "
            "token, so that deep slots count where q is still small."
        },
    )
    train_head: bool = field(default=False, metadata={"help": "Also train the drafter's head."})
    sequence_partitions: str = field(
        default="1",
        metadata={
            "help": "Run each batch in this many parts, one after another, for less memory and the same gradient; "
            "auto: in parts that fit the memory budget."
        },
    )
    memory_budget: float | None = field(
        default=None, metadata={"help": "GiB that a process may use on its device. Default: 92 %% of the device."}
    )
    memory_report: bool = field(
        default=False, metadata={"help": "Predict a step's memory and, on cached data, training's time, and stop."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Say what would be trained and written, and in how many steps, and stop."}
    )
    keep_attention: bool = field(
        default=True,
        metadata={"help": "With activation checkpointing keep attention's outputs: faster for long samples."},
    )
    # transformers 5.23 renamed gradient_checkpointing to activation_checkpointing. Both names work with all versions.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep less of each layer for the backward pass and recompute it there: less memory, longer steps. "
            "Default: false.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of activation checkpointing, as JSON: those of transformers."}
    )
    total_seq_len: int = field(default=8192, metadata={"help": "Positions in a packed sequence."})
    train_data_ratio: float = field(
        default=0.9, metadata={"help": "Share of the conversations to train on; the rest validates. 1: no validation."}
    )
    on_missing: Literal["raise", "skip", "warn", "generate"] = field(
        default="raise",
        metadata={
            "help": "What to do about samples without cached hidden states; generate computes them while training, a "
            "step ahead: in this process, or in the servers of --vllm-endpoint."
        },
    )
    vllm_endpoint: str | None = field(
        default=None,
        metadata={
            "help": "vLLM servers for generate, URL[,URL...], started by `peagle-hf launch-vllm`; at least one loader "
            "worker asks them (default: up to four). Default: the verifier runs in this process."
        },
    )
    on_generate: Literal["cache", "delete"] = field(
        default="delete",
        metadata={"help": "Whether generated states are kept in the hidden-states folder or made anew each epoch."},
    )
    verifier_device: str | None = field(
        default=None,
        metadata={
            "help": "Where generate runs the verifier in this process, such as cuda:1 beside a drafter on cuda:0. "
            "Default: on the drafter's device."
        },
    )
    skip_rows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Rows of the prepared dataset to leave out, by number, such as those that a server fails every "
            "time. All other rows stay where they are, so that a training can be resumed with it."
        },
    )
    server_hidden_states_path: str | None = field(
        default=None,
        metadata={
            "help": "The folder that the servers write to, as it is seen here. Default: the hidden-states folder."
        },
    )
    request_timeout: float = field(default=REQUEST_TIMEOUT, metadata={"help": REQUEST_TIMEOUT_HELP})
    max_retries: int = field(default=MAX_RETRIES, metadata={"help": MAX_RETRIES_HELP})
    export_dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "dtype of the weights in the folders that vLLM serves."}
    )
    resume: bool = field(
        default=True,
        metadata={
            "help": "Go on from the newest checkpoint in the output folder, if there is one. "
            "--no-resume removes the old ones and starts afresh."
        },
    )
    verifier_name: str | None = field(
        default=None,
        metadata={
            "help": "The verifier's name on the hub, for push_to_hub. Default: verifier_name_or_path, which then must "
            "be no folder."
        },
    )
    verifier_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the verifier."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the verifier."})

    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs to train.", "aliases": ["--epochs"]})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate.", "aliases": ["--lr"]})
    optim: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "muon (for the drafter's matrices, with AdamW for the rest), or any of the Trainer's own. Default: "
            "muon; adamw_torch_fused with lora_r and under DeepSpeed."
        },
    )
    weight_decay: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Weight decay. muon applies it to the drafter's matrices only, the other optimizers to embeddings "
            "and head too. Default: 1 with muon, but 0 with lora_r, whose factors must not shrink; 0 with the others."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine",
        metadata={
            "help": "Learning-rate schedule: cosine, linear, constant or any other of transformers.",
            "aliases": ["--scheduler_type", "--scheduler-type"],
        },
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logs.", "aliases": ["--log_freq", "--log-freq"]}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packed sequences per device and step."})
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Packed sequences per device and validation step."}
    )
    eval_strategy: IntervalStrategy | str = field(default="epoch", metadata={"help": "When to validate."})
    save_strategy: SaveStrategy | str = field(default="epoch", metadata={"help": "When to save."})
    metric_for_best_model: str | None = field(
        default="acceptance_length",
        metadata={
            "help": "The validation metric that makes a checkpoint the best, such as acceptance_length or loss. Higher "
            "is better, but for names that end with loss; --greater-is-better says otherwise."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "bfloat16 mixed precision. Default: on with a GPU that has it.",
            "nargs": "?",
            "const": True,
        },
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Loader processes. Default: 4 on a GPU or with --vllm-endpoint, else 0."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin the loader's memory. Default: on with a GPU."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave NaN and infinite losses out of the logs, at the price of a wait for the GPU each step."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the collator needs all."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Nothing needs broadcasting."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "None is ever unused."})

    HELP: ClassVar = HELP
    GROUPS: ClassVar = {
        "Input and output": (
            "verifier_name_or_path",
            "verifier_revision",
            "trust_remote_code",
            "data_path",
            "hidden_states_path",
            "output_dir",
            "resume",
            "from_pretrained",
            "export_dtype",
            "dry_run",
            "verifier_name",
        ),
        "Drafter": (
            *("speculator_type", "num_layers", "draft_arch", "draft_vocab_size", "token_freq_path"),
            *("mask_token_id", "target_layer_ids", "norm_before_residual", "norm_before_fc", "fc_norm"),
            *("embed_requires_grad", "sliding_window", "train_head", "linear_start"),
        ),
        "COD sampling and loss": (
            *("num_depths", "down_sample_ratio", "down_sample_ratio_min", "max_anchors", "loss_fn"),
            *("depth_loss_decay", "per_position_loss_weight", "dpace_alpha"),
        ),
        "Training": (
            *("num_train_epochs", "learning_rate", "lr_scheduler_type", "optim", "weight_decay"),
            *("per_device_train_batch_size", "per_device_eval_batch_size", "total_seq_len", "train_data_ratio"),
            *("eval_strategy", "save_strategy", "logging_steps", "metric_for_best_model", "seed", "use_cpu"),
            "dataloader_num_workers",
        ),
        "LoRA adapter": ("lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save"),
        "Memory": (
            *("memory_report", "memory_budget", "sequence_partitions", "gradient_checkpointing"),
            *("activation_checkpointing", "keep_attention", "bf16", "gradient_accumulation_steps"),
        ),
        "Hidden states that are missing": (
            *("on_missing", "vllm_endpoint", "on_generate", "verifier_device", "skip_rows"),
            *("server_hidden_states_path", "request_timeout", "max_retries"),
        ),
    }

    def __post_init__(self) -> None:
        if self.vllm_endpoint is not None:  # checkpoints and trackers keep arguments
            self.vllm_endpoint = ",".join(endpoint_urls(self.vllm_endpoint))
        self.as_given = {one.name: getattr(self, one.name) for one in fields(self)}  # before the Trainer changes them
        if self.disable_tqdm is None and not is_in_notebook():
            self.disable_tqdm = is_quiet() or not sys.stderr.isatty()
        check_names(self, [name for name in PeagleTrainingArguments.__annotations__ if name != "GROUPS"])
        check_names_of_trainer(self)
        parse_loss(self.loss_fn)
        check_own_values(self)
        self.sequence_partitions = str(self.sequence_partitions)
        check_contradictions(self)
        if self.push_to_hub and self.verifier_name_or_path:
            hub_verifier(self.verifier_name_or_path, self.verifier_name)
        if self.train_data_ratio == 1:
            self.eval_strategy = "no"
        # Without an accelerator the Trainer would leave the processes of torchrun unconnected, each training alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self._choose_precision()
        choose_workers(self)
        if is_launched() and self.use_cpu:
            connect_on_cpu(self.ddp_timeout)
        # Every process builds the same drafter: accelerate's loading from the first one knows no buffers, such as d2t.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        for name in ("checkpointing", "checkpointing_kwargs"):
            new, old = f"activation_{name}", f"gradient_{name}"
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
            setattr(self, old, getattr(self, new))
        self._post_init_with_muon()
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs  # before 5.23 only this one is parsed
        if self.distributed_state.distributed_type == DistributedType.MULTI_CPU and (
            self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
        ):
            raise PeagleError(
                "FSDP divides a drafter among GPUs; on CPUs each process would hold all of it, as under DDP. On CPUs "
                "launch with examples/accelerate/ddp.yaml or torchrun, or with zero2.yaml, which needs DeepSpeed."
            )
        if self.device.type not in ("cpu", "cuda"):
            raise PeagleError(f"Training runs on a CPU or CUDA GPUs, not on {self.device.type}: pass --use-cpu.")
        if self.runs_verifier and self.verifier_device:
            is_same_kind = self.verifier_device == self.device.type  # then this process's own GPU, not the first one
            name = str(self.device) if is_same_kind else self.verifier_device
            self.verifier_device = str(usable_device("--verifier-device", name))
            self._n_gpu = min(self.n_gpu, 1)  # the drafter stays on the first GPU
        if self.n_gpu > 1 and not self.memory_report:
            raise PeagleError(
                f"{self.n_gpu} GPUs are visible to one process, which would copy the model at every step. Start one "
                "process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
            )
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # These follow the same metric, and would take it that lower is better.
            given: Any = self.lr_scheduler_kwargs or {}
            self.lr_scheduler_kwargs = {"mode": "max" if self.greater_is_better else "min", **given}
        check_scheduler(self)
        check_values(self)
        warn_of_unused(self)
        for tracker in self.report_to or []:
            check_tracker(tracker)

    def _post_init_with_muon(self) -> None:
        """Run the Trainer's own checks, which don't know the optimizer muon, under the name of one that they know."""
        uses_deepspeed = bool(self.deepspeed) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if self.optim is None:
            self.optim = "adamw_torch_fused" if uses_deepspeed or self.lora_r is not None else MUON
        names = [MUON, *(name.value for name in OptimizerNames)]
        if self.optim not in names:
            raise PeagleError(f"optim is {self.optim!r}; it must be one of {', '.join(names)}.")
        is_muon = self.optim == MUON
        if self.weight_decay is None:
            self.weight_decay = default_weight_decay(self.optim, self.lora_r)
        if is_muon and self.optim_args:
            raise PeagleError(f"optim_args {self.optim_args!r} are for the Trainer's own optimizers, not for {MUON}.")
        if is_muon and uses_deepspeed:
            raise PeagleError("DeepSpeed cuts up the matrices that Muon needs whole. Take --optim adamw_torch_fused.")
        if is_muon:
            self.optim = "adamw_torch_fused"
        with refused_arguments():
            super().__post_init__()
        if is_muon:
            self.optim = MUON
        else:
            check_optimizer(self)

    def _choose_precision(self) -> None:
        """Without a choice of the user take that of `accelerate launch`, or else bfloat16 on a GPU that has it."""
        if self.bf16 is None and not self.fp16:
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            if launched not in ("no", "bf16", "fp16"):
                raise PeagleError(f"accelerate launch asks for {launched}, but training runs in bf16, fp16 or float32.")
            self.fp16 = launched == "fp16"
            self.bf16 = launched == "bf16" or (launched == "no" and not self.use_cpu and has_bfloat16())
        self.bf16 = bool(self.bf16)
        os.environ.update({} if self.bf16 or self.fp16 else {"ACCELERATE_MIXED_PRECISION": "no"})

    @property
    def asks_servers(self) -> bool:
        """Whether vLLM servers are asked for samples that have no cached hidden states."""
        return self.on_missing == "generate" and self.vllm_endpoint is not None

    @property
    def runs_verifier(self) -> bool:
        """Whether the verifier runs in this process for samples that have no cached hidden states."""
        return self.on_missing == "generate" and self.vllm_endpoint is None

    def memory_plan(self, config: PeagleConfig) -> MemoryPlan:
        """The settings that memory depends on; on a CPU, or without mixed precision, the prediction is too low."""
        kept = "keep_attention" if self.keep_attention else "whole"
        is_prepared = (Path(self.data_path) / "token_freq.pt").exists()
        has_momentum = self.optim in ("sgd", "rmsprop") and "momentum" in (self.optim_args or "")
        plan = MemoryPlan(
            config,
            positions=self.total_seq_len,
            batch_size=self.per_device_train_batch_size,
            learnt_share=learnt_share(self.data_path) if is_prepared else MemoryPlan.learnt_share,
            optimizer=f"{plain(self.optim)} with momentum" if has_momentum else str(plain(self.optim)),
            checkpointing=kept if self.activation_checkpointing else "none",
            partitions=1 if self.sequence_partitions == "auto" else int(self.sequence_partitions),
            accumulates=self.gradient_accumulation_steps > 1,
            train_head=self.train_head,
            lora_r=self.lora_r,
            linear_start=self.linear_start and not self.from_pretrained,
            validates=self.eval_strategy != "no",
            **processes_of(self),
            **verifier_memory(self, config),
        )
        return cut_to_fit(plan, self.usable_memory()) if self.sequence_partitions == "auto" else plan

    def usable_memory(self) -> int | None:
        """Bytes that a process may use on its device; None on a CPU without --memory-budget."""
        return device_memory(self.device) if self.memory_budget is None else round(self.memory_budget * GIB)
