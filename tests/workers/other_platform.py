"""Prepares, trains and pushes as on a system without Linux's own calls, as far as that can be simulated there.

`python other_platform.py VERIFIER CHAT_MODEL CHATS DATA`: `CHATS` are prepared with `CHAT_MODEL`'s tokenizer; `DATA` is
a prepared dataset with `VERIFIER`'s hidden states.
Libraries choose by `sys.platform` when they are imported, so they come first; then the calls are taken away.
"""

import os
import signal
import sys
from pathlib import Path

import accelerate  # noqa: F401
import datasets  # noqa: F401
import huggingface_hub
import psutil  # noqa: F401
import pytest
import torch
import torch.distributed.checkpoint
import transformers

verifier, chat_model, chats, data = sys.argv[1:]
for module in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[module] = None  # type: ignore[assignment]
for name in ("sched_getaffinity", "setsid", "getsid", "getuid", "geteuid", "getpgid", "killpg", "setpgrp", "fork"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGCHLD", "SIGALRM", "SIGUSR1", "pthread_sigmask"):
    delattr(signal, name)


def no_links(*arguments: object, **options: object) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


os.symlink = no_links

from fake_hub import TOKEN, fake_hub  # noqa: E402

from peagle_hf import PeagleError, PeagleForSpeculation, PushArguments, cli, push  # noqa: E402
from peagle_hf.cpu import available_cores  # noqa: E402
from peagle_hf.data.endpoint_states import Endpoint  # noqa: E402
from peagle_hf.serving import supervisor  # noqa: E402

assert available_cores() == os.cpu_count()
prepared = os.path.join(data, "prepared again")
cli.main(["prepare", "--model", chat_model, "--data", chats, "--output", prepared, "--seq-length", "64"])
checkpoints = os.path.join(data, "checkpoints")
flags = {"verifier-name-or-path": verifier, "data-path": data, "save-path": checkpoints, "num-layers": "1"}
flags |= {"num-depths": "2", "total-seq-len": "64", "epochs": "2", "train-data-ratio": "0.8", "bf16": "False"}
flags |= {"use-cpu": "True", "report-to": "none", "disable-tqdm": "True"}
for more in ([], ["--no-resume"]):
    cli.main(["train", *(word for name, value in flags.items() for word in (f"--{name}", value)), *more])
best = os.path.join(checkpoints, "checkpoint_best")
assert not os.path.islink(best)
PeagleForSpeculation.from_pretrained(best)
cli.main(["train", *(word for name, value in flags.items() for word in (f"--{name}", value)), "--max-steps", "1"])

with fake_hub() as hub:
    huggingface_hub.constants.ENDPOINT = hub.url
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    transformers.utils.hub._hf_api = None
    hub.add("lab/verifier", {path.name: path.read_bytes() for path in Path(verifier).iterdir()})
    push(PushArguments(model=best, repo_id="me/drafter", verifier_name="lab/verifier"), TOKEN)
    assert "model.safetensors" in hub.files("me/drafter")

with pytest.raises(PeagleError, match=r"can't be run on this system.*WSL"):
    supervisor.supervised(["x"], {}).__enter__()
with pytest.raises(PeagleError, match="which Windows doesn't have"):
    Endpoint(("http://127.0.0.1:9",), Path(data), (1, 2), 4, 1, 0).fetch([1], torch.float32)
print("all of it ran")
