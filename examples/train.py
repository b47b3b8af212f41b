"""Train a P-EAGLE drafter on cached hidden states: the run of `peagle-hf train`, spelt out (without `--memory-report`).

accelerate launch examples/train.py --verifier-name-or-path Qwen/Qwen3-8B --data-path out --save-path out/checkpoints
"""

import sys

from peagle_hf import (
    CODDataCollator,
    PeagleTrainer,
    PeagleTrainingArguments,
    VllmExportCallback,
    build_datasets,
    build_drafter,
    checkpoint_to_resume,
    command_line,
    parse_arguments,
    start_linearly,
)


def main() -> None:
    args = parse_arguments(PeagleTrainingArguments)
    drafter = build_drafter(args)
    train_dataset, eval_dataset = build_datasets(args)
    resumed = checkpoint_to_resume(args)
    if args.linear_start and not (args.from_pretrained or resumed):
        start_linearly(drafter.to(args.device), train_dataset)
    trainer = PeagleTrainer(
        model=drafter,
        args=args,
        data_collator=CODDataCollator.from_config(drafter.config, seed=args.seed),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[VllmExportCallback(args.export_dtype)],
    )
    trainer.train(resume_from_checkpoint=resumed)


if __name__ == "__main__":
    with command_line("train.py", sys.argv[1:]):  # an error ends in one paragraph, not a traceback
        main()
