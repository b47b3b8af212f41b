"""Flags of vLLM's speculators that have another name here or none, for those who bring their commands along."""

from fnmatch import fnmatchcase

NOT_NEEDED, NOT_THERE = "not needed", "not there"
COUNTERPARTS = {
    **dict.fromkeys(("--render-endpoint", "--skip-token-freq", "--save-best"), NOT_NEEDED),
    **dict.fromkeys(("--d2t-path", "--t2d-path", "--draft-attn-impl", "--loss-implementation"), NOT_NEEDED),
    **dict.fromkeys(("--allow-empty-output", "--hidden-states-backend", "--mooncake-*"), NOT_THERE),
    **dict.fromkeys(("--full-attention-indices", "--draft-config", "--draft-hidden-act"), NOT_THERE),
    **dict.fromkeys(("--draft-mrope-full-head-hack", "--sliding-window-non-causal"), NOT_THERE),
    **dict.fromkeys(("--norm-output", "--generation-validation-retries"), NOT_THERE),
    **dict.fromkeys(("--max-consecutive-generation-failures", "--language-filter"), NOT_THERE),
    **dict.fromkeys(("--optimizer", "--muon-*"), "--optim"),
    **dict.fromkeys(("--scheduler-warmup-steps", "--scheduler-warmup-ratio"), "--warmup-steps"),
    "--scheduler-total-steps": "--max-steps",
    "--scheduler-num-cosine-cycles": "--lr-scheduler-kwargs",
    "--hidden-states-dtype": "--bf16",
    "--num-workers": "--dataloader-num-workers",
    "--prefetch-factor": "--dataloader-prefetch-factor",
    "--checkpoint-freq": "--save-strategy steps --save-steps N",
    "--no-resume-from-checkpoint": "--no-resume",
    "--fsdp-shard": "accelerate launch --config_file examples/accelerate/fsdp2.yaml",
    "--logger": "--report-to",
    "--log-dir": "the variable TENSORBOARD_LOGGING_DIR",
    "--deterministic-cuda": "--full-determinism",
    "--config": "the first argument",
    "--dump-config": "--print-config",
    **dict.fromkeys(("--dataset", "--split", "--subset"), "--prompts"),
    "--limit": "--max-samples",
    "--outfile": "--output",
    "--resume": NOT_NEEDED,
    "--max-tokens": "--max-new-tokens",
    "--sampling-params": "--temperature, --top-p, --top-k, --min-p",
    "--reasoning-effort": "--chat-template-kwargs",
}
"""What docs/migration.md says of these flags; a star stands for any end."""


def counterpart(flag: str) -> str | None:
    """What stands here for a flag of speculators: flags, other words, `NOT_NEEDED` or `NOT_THERE`; None for others."""
    return next((here for theirs, here in COUNTERPARTS.items() if fnmatchcase(flag, theirs)), None)
