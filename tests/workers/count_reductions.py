"""Train under DDP and print how many optimizer steps there were, and how often gradients were reduced."""

import json
import sys

import torch.distributed

from peagle_hf import PeagleTrainer, PeagleTrainingArguments, build_datasets, build_drafter, end_processes


class CountingTrainer(PeagleTrainer):
    reductions = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.reductions is None:
            self.reductions = 0
            model.register_comm_hook(None, self.reduce)
        return super().training_step(model, inputs, num_items_in_batch)

    def reduce(self, _state, bucket):
        self.reductions += bucket.is_last()
        buffer = bucket.buffer().div_(self.args.world_size)
        return torch.distributed.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])


def main():
    args = PeagleTrainingArguments(**json.loads(sys.argv[1]))
    trainer = CountingTrainer(model=build_drafter(args), args=args, train_dataset=build_datasets(args)[0])
    trainer.train()
    if args.process_index == 0:
        print("COUNTS", json.dumps([trainer.state.global_step, trainer.reductions]))


if __name__ == "__main__":
    main()
    end_processes()
