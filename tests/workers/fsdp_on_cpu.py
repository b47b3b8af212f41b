"""`peagle-hf train` under FSDP2 on CPUs, where accelerate by itself would run DDP without a word."""

from functools import wraps

from accelerate import PartialState
from accelerate.utils import DistributedType

from peagle_hf.cli import main

start = PartialState.__init__


@wraps(start)
def start_as_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_on_gpus
    main()
