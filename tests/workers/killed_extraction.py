"""`peagle-hf extract` one of whose processes kills itself, after it has written some files."""

import os
import signal

from peagle_hf.cli import main
from peagle_hf.data import extract

save_states, num_written = extract.save_states, 0


def write_or_die(*arguments):
    global num_written
    if os.environ["RANK"] == os.environ["RANK_THAT_IS_KILLED"] and num_written == int(os.environ["FILES_BEFORE"]):
        os.kill(os.getpid(), signal.SIGKILL)
    save_states(*arguments)
    num_written += 1


if __name__ == "__main__":
    extract.save_states = write_or_die
    main()
