"""Predicts the disk space of hidden states before they are extracted, by storage kind."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..console import number_of
from ..errors import PeagleError
from ..model.slots import target_tokens
from .cache_manifest import Manifest
from .cache_storage import FP8_STORAGES, LEARNT_STORAGES, STORAGES, row_path

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

GIB, KIB = 1 << 30, 1 << 10
HEADER_BYTES = 512
"""Upper limit of the header of a cached file, before its tensors."""


def check_disk(output: Path, manifest: Manifest, data: "datasets.Dataset", lengths: dict[int, int]) -> None:
    """Log how many bytes the states of samples need on the disk, and refuse to begin if they don't fit.

    Args:
        lengths: tokens of each sample to be written, of all processes, by its row in `data`; files that they have
            already will be replaced.

    Raises:
        PeagleError: they don't fit; says what each storage kind needs.
    """
    num_tokens, needed, free = sum(lengths.values()), bytes_needed(manifest, data, lengths), free_bytes(output)
    replaced = sum(path.stat().st_size for row in lengths if (path := row_path(output, row)).exists())
    a_token = f"{needed / max(1, num_tokens) / KIB:.1f} KiB a token as {manifest.storage} {manifest.dtype}"
    logger.info(
        "%d tokens need %s GiB in %s (%s); %s GiB are free.", num_tokens, in_gib(needed), output, a_token, in_gib(free)
    )
    if needed <= free + replaced:
        return
    smaller = _kinds(manifest, data, lengths, free + replaced)
    raise PeagleError(
        f"The hidden states of {num_tokens} tokens need {in_gib(needed)} GiB in {output} ({a_token}), but only "
        f"{in_gib(free)} GiB are free. Free some space, name an --output on another disk, take fewer samples with "
        f"--max-samples, {f'store less with --storage {smaller}, ' if smaller else ''}or store nothing: peagle-hf "
        "train --on-missing generate runs the verifier during training."
    )


def warn_of_other_shares(output: Path, manifest: Manifest, data: "datasets.Dataset", lengths: dict[int, int]) -> None:
    """Warn if the states of all shares don't fit on the disk; shares may be on disks of their own, so go on."""
    needed, free = bytes_needed(manifest, data, lengths), free_bytes(output)
    if needed > free:
        logger.warning(
            "All shares together need %s GiB, but %s has %s GiB free, which is too little if all of them write there.",
            in_gib(needed),
            output,
            in_gib(free),
        )


def _kinds(manifest: Manifest, data: "datasets.Dataset", lengths: dict[int, int], free: int) -> str:
    """What storage kinds smaller than the manifest's need, as a part of a sentence; '' if there is none."""
    num_tokens, needed = sum(lengths.values()), bytes_needed(manifest, data, lengths)
    found = []
    for kind in STORAGES:
        dtype = "bfloat16" if kind in FP8_STORAGES else manifest.dtype
        other = bytes_needed(replace(manifest, storage=kind, dtype=dtype), data, lengths)
        if other < needed:
            fits = ", which fits" if other <= free else ""
            found.append(f"{kind} ({other / num_tokens / KIB:.1f} KiB a token, {in_gib(other)} GiB{fits})")
    folder = " in a folder of its own" if found else ""
    return f"{' or '.join(found)}{folder}"


def bytes_needed(manifest: Manifest, data: "datasets.Dataset", lengths: dict[int, int]) -> int:
    """Bytes that the files of samples take on the disk in the manifest's storage kind.

    Args:
        lengths: tokens of each sample, by its row in `data`.
    """
    num_tokens = num_last = sum(lengths.values())
    if manifest.storage in LEARNT_STORAGES:
        masks = (data[row]["loss_mask"] for row in lengths)
        num_last = sum(int(target_tokens(torch.as_tensor(mask).bool()).sum()) for mask in masks)
    return manifest.bytes_of(num_tokens, num_last) + len(lengths) * HEADER_BYTES


def plan(output: Path, manifest: Manifest, data: "datasets.Dataset", missing: dict[int, int]) -> str:
    """Describe what `extract` would do, for `--dry-run`."""
    free, needed = free_bytes(output), bytes_needed(manifest, data, missing)
    smaller = _kinds(manifest, data, missing, free) if missing else ""
    return "\n".join(
        [
            f"would run {manifest.verifier} ({manifest.architecture}, {manifest.num_layers} layers) and store layers "
            f"{', '.join(map(str, manifest.aux_layer_ids))} and the last one, as {manifest.storage} {manifest.dtype}",
            f"would make {len(missing)} of {number_of(len(data), 'sample')}, {sum(missing.values())} tokens",
            f"would write {in_gib(needed)} GiB into {output}, where {in_gib(free)} GiB are free",
            *([f"less would be written with --storage {smaller}"] if smaller else []),
        ]
    )


def in_gib(size: int) -> str:
    """A number of bytes in GiB, with enough digits for a small one."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.6f}"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(existing).free
