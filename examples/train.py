"""Train a P-EAGLE drafter on cached hidden states: the run of `peagle-hf train`, spelt out (without `--memory-report`).

accelerate launch examples/train.py --verifier-name-or-path Qwen/Qwen3-8B --data-path out --save-path out/checkpoints
"""

import sys

from peagle_hf import PeagleTrainingArguments, build_trainer, checkpoint_to_resume, command_line, parse_arguments


def main() -> None:
    args = parse_arguments(PeagleTrainingArguments)
    resumed = checkpoint_to_resume(args)
    trainer = build_trainer(args, resumed)
    trainer.train(resume_from_checkpoint=resumed)


if __name__ == "__main__":
    with command_line("train.py", sys.argv[1:]):  # an error ends in one paragraph, not a traceback
        main()
