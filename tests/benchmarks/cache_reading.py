"""The loader alone: batches of hidden states from a cache, as training reads them, beside one that reads whole files.

    python tests/benchmarks/cache_reading.py FOLDER [--rows 2000] [--hidden-size 512] [--workers 0 4]

FOLDER gets a synthetic cache of one kind at a time, which is removed again: nine rows in ten have 128 to 512 tokens,
the tenth 4,096, of which --total-seq-len 2048 keeps half; the last 60 % of each are learnt. Before each measurement the
files are put out of the page cache. Every reader runs in a process of its own, with the workers that training has by
default (none) and with four.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from process_tree import MIB, watch
from safetensors.torch import load
from torch.utils.data import DataLoader

from peagle_hf import CODDataCollator, HiddenStatesDataset
from peagle_hf.data.cache_storage import STORAGES, row_path, write_states
from peagle_hf.data.packing import EpochSampler
from peagle_hf.model.slots import target_tokens

NUM_SLOTS = 4
COLUMNS = (
    "files",
    "reader",
    "workers",
    "tokens/s",
    "MiB/s from disk",
    "MiB read",
    "bytes/token stored",
    "RSS MiB",
    "private MiB",
)


class WholeFiles(HiddenStatesDataset):
    """A reader that takes every byte of a file into memory; of plain files."""

    def _load_sample(self, row, generated):
        sample = self.data[row]
        tensors = load(row_path(self.hidden_states_path, row).read_bytes())
        mask = torch.as_tensor(sample["loss_mask"])[: self.total_seq_len + 2].bool()
        states = tensors["hidden_states"][: len(mask)]
        return {
            "sample_id": row,
            "input_ids": tensors["token_ids"][: len(mask)],
            "loss_mask": mask,
            "hidden_states": states[:, :-1].flatten(1),
            "target_states": states[:, -1][target_tokens(mask)],
        }


def write_prepared(folder: Path, num_rows: int, longest: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 32, longest // 8 + 1, (num_rows,), generator=generator)
    lengths[::10] = longest
    rows = [torch.randint(1000, (length,), generator=generator) for length in lengths.tolist()]
    masks = [torch.arange(len(row)) >= 0.4 * len(row) for row in rows]
    columns = {
        "input_ids": [row.tolist() for row in rows],
        "loss_mask": [mask.int().tolist() for mask in masks],
        "seq_len": lengths.tolist(),
        "conversation_id": list(range(num_rows)),
    }
    Dataset.from_dict(columns).with_format("torch").save_to_disk(folder)
    return list(zip(rows, masks, strict=True))


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(folder: Path, reader: str, num_workers: int, total_seq_len: int) -> None:
    """Read an epoch and print what it was."""
    torch.set_num_threads(1)
    dataset = (WholeFiles if reader == "whole files" else HiddenStatesDataset)(folder, total_seq_len=total_seq_len)
    sampler = EpochSampler(len(dataset), seed=0)
    loader = DataLoader(dataset, sampler=sampler, collate_fn=CODDataCollator(), num_workers=num_workers)
    start, num_tokens = time.perf_counter(), 0
    for batch in loader:
        num_tokens += batch["input_ids"].numel()
    print(json.dumps({"tokens": num_tokens, "seconds": time.perf_counter() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--total-seq-len", type=int, default=2048)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        reader, num_workers = arguments.measure
        return read_all(arguments.folder, reader, int(num_workers), arguments.total_seq_len)

    folder, states = arguments.folder / "prepared", arguments.folder / "prepared" / "hidden_states"
    rows = write_prepared(folder, arguments.rows, arguments.longest)
    noise = torch.randn(arguments.longest, NUM_SLOTS, arguments.hidden_size).bfloat16()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for storage in STORAGES:
        for row, (token_ids, mask) in enumerate(rows):
            write_states(states, row, noise[: len(token_ids)], token_ids, storage, target_tokens(mask))
        stored = sum(path.stat().st_size for path in states.iterdir()) / sum(len(token_ids) for token_ids, _ in rows)
        for reader in ("peagle_hf", *["whole files"] * (storage == "plain")):
            for num_workers in arguments.workers:
                drop_from_page_cache(states)
                command = [sys.executable, __file__, str(folder), "--measure", reader, str(num_workers)]
                output, _, seen = watch([*command, "--total-seq-len", str(arguments.total_seq_len)])
                result = json.loads(output.splitlines()[-1])
                read = seen.read / MIB
                print(
                    f"| {storage} | {reader} | {num_workers} | {result['tokens'] / result['seconds']:,.0f} "
                    f"| {read / result['seconds']:,.0f} | {read:,.0f} | {stored:,.0f} "
                    f"| {seen.rss / MIB:,.0f} | {seen.private / MIB:,.0f} |",
                    flush=True,
                )
        shutil.rmtree(states)
    return None


if __name__ == "__main__":
    main()
