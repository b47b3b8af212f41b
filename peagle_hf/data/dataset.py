"""`HiddenStatesDataset`: a prepared dataset and its cached hidden states, planned into packed rows once."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import PeagleError
from ..model.slots import target_tokens
from ..verifier.draft_vocabulary import load_token_freq
from .cache_manifest import Manifest, origin_of
from .cache_storage import CachedRow, cache_folder, cached_rows, check_row, failed_rows, read_row, row_path, save_row
from .endpoint import concurrently
from .endpoint_states import Endpoint
from .errors import faults_of
from .prepared_dataset import column, load_prepared, rows_fingerprint

logger = logging.getLogger(__name__)

OnMissing = Literal["raise", "skip", "warn", "generate"]
MAX_REQUESTS = 16
"""So many documents of a packed row are asked for at a time."""
GENERATED_DTYPE = "bfloat16"
"""What the endpoint's states are kept in where no manifest says otherwise, as `peagle-hf extract` does."""
MAX_NAMED = 5
"""Names of files or rows in a message."""
MIN_TOKENS = 3
"""A shorter document has no position that sees a token and predicts another."""


class RowRequest(NamedTuple):
    """Which packed row is wanted, and for which epoch, so that loader workers hold no state.

    Attributes:
        is_filler: nothing is to be learnt from it: it is there for all processes to have equally many rows.
    """

    epoch: int
    number: int
    is_filler: bool = False


class HiddenStatesDataset(Dataset):
    """Map-style dataset whose items are packed rows: lists of documents that together fill `total_seq_len` positions.

    Rows are planned from the documents' lengths alone (seeded first fit), before any cache file is opened. An item is
    asked for by its number, or by a `RowRequest` as `EpochSampler` does.

    Args:
        data_path: folder of `peagle-hf prepare`.
        hidden_states_path: folder of `peagle-hf extract`; default: `hidden_states` in `data_path`.
        total_seq_len: positions in a row; a longer document is cut, and left out if nothing is learnt before the cut,
            both of which are counted and reported.
        rows: the prepared rows to use; None means all.
        on_missing: what to do about prepared rows without a cache file: "raise", leave them out silently counted
            ("skip") or named in a warning ("warn"), or ask the endpoint for them whenever they are needed ("generate").
        seed: of the packing.
        endpoint: the vLLM servers for "generate".
        keep_generated: write what the endpoint gives into the cache, so that it is asked once only.
        skip_rows: prepared rows to leave out, such as those that a server fails every time. Their states are neither
            asked for nor read. All other rows stay in their packed rows, so that a training can be resumed with more.

    Raises:
        PeagleError: no such folder, missing cache files under "raise", or nothing left to train on. An item raises a
            `RowError`, which names the row, if the states of one of its rows can't be had.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        hidden_states_path: str | os.PathLike[str] | None = None,
        total_seq_len: int = 8192,
        rows: Sequence[int] | None = None,
        on_missing: OnMissing = "raise",
        seed: int = 0,
        endpoint: Endpoint | None = None,
        keep_generated: bool = False,
        skip_rows: Sequence[int] = (),
    ):
        self.data_path = Path(data_path)
        self.data = load_prepared(data_path)
        self.skip_rows = check_skip_rows(skip_rows, len(self.data), data_path)
        self.hidden_states_path = cache_folder(data_path, hidden_states_path)
        self.endpoint, self.keep_generated = endpoint, keep_generated
        if (on_missing == "generate") != (endpoint is not None):
            raise PeagleError('An endpoint and on_missing="generate" go together: give both or neither.')
        self.total_seq_len = total_seq_len
        rows = range(len(self.data)) if rows is None else rows
        rows = self._present(rows, on_missing)
        self._origin = self._check_cache(rows)
        lengths = column(self.data, "seq_len")
        long_enough = [row for row in rows if lengths[row] >= MIN_TOKENS]
        cut = [row for row in long_enough if lengths[row] - 2 > total_seq_len]
        unlearnt = {row for row, count in zip(cut, self._count_learnt(cut), strict=True) if not count}
        wanted = [row for row in long_enough if row not in unlearnt]
        self.num_truncated = len(cut) - len(unlearnt)
        if not wanted:
            raise PeagleError(
                f"{data_path} has no row of at least {MIN_TOKENS} tokens, with something to learn in its first "
                f"{total_seq_len}, to train on. Prepare more data, or raise --total-seq-len."
            )
        if not any(self._targets(row).any() for row in wanted if row not in self.skip_rows):
            raise PeagleError(
                f"{data_path} has nothing to learn in any of its {len(wanted)} samples: an answer's first token is the "
                "verifier's own in any case, and there is none after it. Prepare data with longer answers."
            )
        if len(long_enough) < len(rows):
            logger.warning(
                "%d rows of %s are shorter than %d tokens.", len(rows) - len(long_enough), data_path, MIN_TOKENS
            )
        if unlearnt:
            logger.warning(
                "%d documents are left out, as nothing is learnt in their first %d positions; raise --total-seq-len.",
                len(unlearnt),
                total_seq_len,
            )
        if self.num_truncated:
            logger.warning(
                "%d of %d documents are longer than total_seq_len %d and are cut; raise --total-seq-len to keep them.",
                self.num_truncated,
                len(wanted),
                total_seq_len,
            )
        order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [wanted[index] for index in order]
        sizes = [min(lengths[row] - 2, total_seq_len) for row in shuffled]
        self.plan = [[shuffled[index] for index in bin_] for bin_ in first_fit(sizes, total_seq_len)]

    def check_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Make sure that a drafter of these auxiliary layers reads what it will read when it is served.

        Raises:
            PeagleError: the cached states are those of others.
        """
        manifest = Manifest.read(self.hidden_states_path)
        if manifest is not None and manifest.aux_layer_ids != list(aux_layer_ids):
            raise PeagleError(
                f"The hidden states in {self.hidden_states_path} are those of the layers {manifest.aux_layer_ids}, but "
                f"the drafter reads {list(aux_layer_ids)}. Make it with target_layer_ids={manifest.aux_layer_ids}, or "
                "extract the others into another folder."
            )

    def _check_cache(self, rows: Sequence[int]) -> str | None:
        """Refuse hidden states of other rows before any is read; gives what each file must say of its origin.

        A manifest that names these rows is believed. Else the tokens of each file that is there are compared, and where
        the manifest doesn't know its rows, each file is compared when it is read.
        """
        manifest = Manifest.read(self.hidden_states_path)
        if manifest is None or manifest.rows in (None, rows_fingerprint(self.data_path)):
            return origin_of(manifest)
        logger.info("%s was made of another dataset. Its tokens are compared.", self.hidden_states_path)
        present = cached_rows(self.hidden_states_path)
        foreign = {}
        for row in (row for row in rows if row in present and row not in self.skip_rows):
            sample, path = self.data[row], row_path(self.hidden_states_path, row)
            tokens, mask = (torch.as_tensor(sample[name]).long() for name in ("input_ids", "loss_mask"))
            reason = check_row(path, (None, None, None), tokens, target_tokens(mask.bool()))
            if reason is not None:
                foreign[row] = reason
        if foreign:
            row, reason = next(iter(foreign.items()))
            raise PeagleError(
                f"{len(foreign)} of the files in {self.hidden_states_path} are not those of the rows of "
                f"{self.data_path}, such as hs_{row}.safetensors: {reason}. The hidden states are of another dataset, "
                "or the dataset was prepared anew since. Name the folders that belong together, or run peagle-hf "
                "extract again, which makes just these files anew."
            )
        return origin_of(manifest)

    def _present(self, rows: Sequence[int], on_missing: OnMissing) -> Sequence[int]:
        if left_out := sorted(self.skip_rows.intersection(rows)):
            logger.info("Rows of %s left out by --skip-rows: %s.", self.data_path, ", ".join(map(str, left_out)))
        present = cached_rows(self.hidden_states_path) | self.skip_rows
        missing = [row for row in rows if row not in present]
        if not missing:
            return rows
        if on_missing == "generate":
            logger.info("%d of %d rows will be asked of the vLLM server.", len(missing), len(rows))
            return rows
        if on_missing == "raise":
            raise PeagleError(self._advice(present))
        files = _names(missing)
        message = f"{len(missing)} of {len(rows)} hidden-state files are missing in {self.hidden_states_path}: {files}"
        if len(missing) == len(rows):
            raise PeagleError(f"{message}. None is left: run `peagle-hf extract`, or correct --hidden-states-path.")
        logger.log(logging.WARNING if on_missing == "warn" else logging.INFO, "%s; trained without them.", message)
        return [row for row in rows if row in present]

    def _advice(self, present: set[int]) -> str:
        """Which files of the whole prepared dataset are missing, why as far as it shows, and what to do."""
        folder, num_rows = self.hidden_states_path, len(self.data)
        missing = [row for row in range(num_rows) if row not in present]
        message = f"{len(missing)} of {num_rows} hidden-state files are missing in {folder}: {_names(missing)}."
        names = f", or --skip-rows {' '.join(map(str, missing))}" if len(missing) <= MAX_NAMED else ""
        skip = f"Pass --on-missing skip{names} to go on without them."
        if len(missing) == num_rows:
            return f"{message} That is all of them: run `peagle-hf extract`, or correct --hidden-states-path."
        if failed := [row for row in failed_rows(folder) if row not in present]:
            return (
                f"{message} A server failed {len(failed)} of them, for the reasons in failed.json there. Run "
                f"`peagle-hf extract` again, which makes just those that are missing. {skip}"
            )
        if missing[0] == num_rows - len(missing):
            return (
                f"{message} The first {missing[0]} are there. Run `peagle-hf extract` without --max-samples, or with "
                f"at least {num_rows}; it makes just those that are missing. {skip}"
            )
        return (
            f"{message} Run `peagle-hf extract` again, of all ranks if it ran with --world-size; it makes just those "
            f"that are missing. {skip}"
        )

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def num_samples(self) -> int:
        """Prepared rows that are trained or validated on."""
        return sum(len(self._kept(number)) for number in range(len(self)))

    def num_learnt(self, number: int) -> int:
        """The learnt positions of a packed row, by the prepared dataset alone."""
        return sum(int(self._targets(row).sum()) for row in self._kept(number))

    def _kept(self, number: int) -> list[int]:
        """The prepared rows of a packed row, without those that are left out by name."""
        return [row for row in self.plan[number] if row not in self.skip_rows]

    def _count_learnt(self, rows: Sequence[int]) -> list[int]:
        """The learnt positions of many documents, as far as they aren't cut: as `_targets`, a thousand at once."""
        masks = self.data.select_columns("loss_mask").select(rows).with_format("arrow")
        counts: list[int] = []
        for table in masks.iter(1000) if len(rows) else ():
            lists = table["loss_mask"].combine_chunks()
            mask, starts = np.asarray(lists.flatten()) != 0, np.asarray(lists.offsets)
            starts = starts - starts[0]
            place = np.arange(len(mask)) - np.repeat(starts[:-1], np.diff(starts))
            is_learnt = mask & (place >= 2) & (place < self.total_seq_len + 2)
            is_learnt[1:] &= mask[:-1]
            total = np.concatenate([[0], is_learnt.cumsum()])
            counts += (total[starts[1:]] - total[starts[:-1]]).tolist()
        return counts

    def _targets(self, row: int) -> torch.Tensor:
        """Whether a token of a document, as far as it isn't cut, is to be predicted, bool [T]."""
        mask = torch.as_tensor(self.data[row]["loss_mask"][: self.total_seq_len + 2])
        return target_tokens(mask.bool())

    def __getitem__(self, index: int | RowRequest) -> dict[str, Any]:
        """The documents of a packed row: tokens and mask [T], their states [T, A * H], those of N targets [N, H]."""
        request = index if isinstance(index, RowRequest) else RowRequest(0, index)
        rows = self._kept(request.number)
        is_filler = request.is_filler or not rows
        if not rows:  # any other row keeps the number of steps
            rows = next(filter(None, map(self._kept, range(len(self)))))[:1]
        generated = self._generated(rows)
        documents = []
        for row in rows:
            with faults_of(row, self.data_path):
                documents.append(self._document(row, generated.get(row)))
        if is_filler:
            for document in documents:
                document["loss_mask"] = torch.zeros_like(document["loss_mask"])
                document["target_states"] = document["target_states"][:0]
        return {"epoch": request.epoch, "documents": documents}

    def _generated(self, rows: Sequence[int]) -> dict[int, CachedRow]:
        """The states of the rows that have no file, from the endpoint; stored they would be the same."""
        missing = [row for row in rows if not row_path(self.hidden_states_path, row).exists()]
        if self.endpoint is None or not missing:
            return {}
        endpoint = self.endpoint
        with faults_of(missing[0], self.data_path):
            manifest = Manifest.read(self.hidden_states_path)
        dtype = getattr(torch, manifest.dtype if manifest and manifest.dtype else GENERATED_DTYPE)
        storage = manifest.storage if manifest and manifest.storage else "plain"

        def generate(row: int) -> CachedRow:
            with faults_of(row, self.data_path):
                sample = self.data[row]
                length = None if self.keep_generated else self.total_seq_len + 2
                tokens, mask = (torch.as_tensor(sample[name])[:length].long() for name in ("input_ids", "loss_mask"))
                states = endpoint.fetch(tokens.tolist(), dtype)
                cached = CachedRow(tokens, states).stored_as(storage, target_tokens(mask.bool()))
                if self.keep_generated:
                    save_row(row_path(self.hidden_states_path, row), replace(cached, origin=origin_of(manifest)))
                return cached.first(self.total_seq_len + 2)

        generated = {}
        for row, result in concurrently(generate, missing, min(len(missing), MAX_REQUESTS)):
            if isinstance(result, BaseException):
                raise result
            generated[row] = result
        return generated

    def _document(self, row: int, generated: CachedRow | None = None) -> dict[str, Any]:
        sample = self.data[row]
        length = min(len(sample["input_ids"]), self.total_seq_len + 2)
        tokens = torch.as_tensor(sample["input_ids"])[:length].long()
        cached = generated or read_row(self.hidden_states_path, row, length=length)
        if not torch.equal(cached.token_ids, tokens):
            raise PeagleError(
                f"{self.hidden_states_path}/hs_{row}.safetensors holds the states of other tokens than row {row} of "
                "the prepared dataset. Run peagle-hf extract again, which makes such files anew."
            )
        if None not in (cached.origin, self._origin) and cached.origin != self._origin:
            raise PeagleError(
                f"{row_path(self.hidden_states_path, row)} holds states of other weights or layers ({cached.origin}) "
                f"than the manifest of its folder says ({self._origin}). Run peagle-hf extract again, which makes such "
                "files anew."
            )
        loss_mask = torch.as_tensor(sample["loss_mask"])[:length].bool()
        try:
            target_states = cached.last_of(target_tokens(loss_mask))
        except PeagleError as error:
            raise PeagleError(f"{row_path(self.hidden_states_path, row)}: {error}") from error
        hidden_states = cached.hidden_states
        if not (_are_finite(hidden_states) and _are_finite(target_states)):
            raise PeagleError(
                "its hidden states hold NaN or infinite values, from which nothing can be learnt. Run peagle-hf "
                "extract with --validate-outputs, which makes such files again."
            )
        return {
            "sample_id": row,
            "input_ids": tokens,
            "loss_mask": loss_mask,
            "hidden_states": hidden_states,
            "target_states": target_states,
        }


class EpochSampler(Sampler[RowRequest]):
    """Each row once an epoch, and fillers up to a multiple of what all processes together take at a time.

    Args:
        size: rows of the dataset.
        seed: of the shuffle, together with the epoch.
        multiple: the number of requests is a multiple of this.
        shuffle: whether there is one.
    """

    def __init__(self, size: int, seed: int, multiple: int = 1, shuffle: bool = True):
        self.size, self.seed, self.shuffle, self.epoch = size, seed, shuffle, 0
        self.num_fillers = -size % multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size + self.num_fillers

    def __iter__(self) -> Iterator[RowRequest]:
        epoch, order = self.epoch, list(range(self.size))
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        yield from (RowRequest(epoch, number) for number in order)
        yield from (RowRequest(epoch, order[0], is_filler=True) for _ in range(self.num_fillers))


def check_skip_rows(skip_rows: Sequence[int] | None, num_rows: int, data_path: str | os.PathLike[str]) -> set[int]:
    """The rows that --skip-rows leaves out; none if it isn't given.

    Raises:
        PeagleError: the prepared dataset has no such row.
    """
    if outside := sorted(row for row in skip_rows or () if not 0 <= row < num_rows):
        raise PeagleError(
            f"--skip-rows names row {outside[0]}, but the rows of {data_path} are 0 to {num_rows - 1}. Name rows by "
            "their number in the prepared dataset, as the error names them that a row ends with."
        )
    return set(skip_rows or ())


def _are_finite(states: torch.Tensor) -> bool:
    """Whether all values are finite, in a tenth of the time that `torch.isfinite` takes on a CPU."""
    return states.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(states))).all())


def _names(rows: Sequence[int]) -> str:
    names = [f"hs_{row}.safetensors" for row in rows[:MAX_NAMED]]
    return ", ".join(names) + (", …" if len(rows) > MAX_NAMED else "")


def learnt_share(data_path: str | os.PathLike[str]) -> float:
    """The share of a prepared dataset's tokens that is learnt."""
    frequencies = load_token_freq(Path(data_path) / "token_freq.pt")
    counts = frequencies.values() if isinstance(frequencies, dict) else frequencies.tolist()
    return sum(counts) / max(1, sum(column(load_prepared(data_path), "seq_len")))


def split_rows(data_path: str | os.PathLike[str], train_ratio: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split the prepared rows into training and validation, whole conversations at a time.

    Args:
        train_ratio: share of the conversations for training, in (0, 1]; 1 leaves validation empty.

    Raises:
        PeagleError: the ratio is out of range or would leave a side empty.
    """
    if not 0 < train_ratio <= 1:
        raise PeagleError(f"train_data_ratio is {train_ratio}; it must be in (0, 1], 1 meaning no validation.")
    data = load_prepared(data_path)
    conversations = column(data, "conversation_id") if "conversation_id" in data.column_names else range(len(data))
    distinct = sorted(set(conversations))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {distinct[index] for index in order[: len(distinct) - int(len(distinct) * train_ratio)]}
    train = [row for row, conversation in enumerate(conversations) if conversation not in held_out]
    if not train or (train_ratio < 1 and not held_out):
        raise PeagleError(
            f"{len(distinct)} conversations can't be split at train_data_ratio {train_ratio} with something on either "
            "side. Prepare more data or change --train-data-ratio."
        )
    return train, [row for row, conversation in enumerate(conversations) if conversation in held_out]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, in order, into the first bin that has room; gives the items' numbers by bin.

    A tree over the bins says in O(log n) where the first room is: `room[1]` is the root, and each node has the most
    room of any bin below it.
    """
    bins: list[list[int]] = []
    num_leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room = [capacity] * (2 * num_leaves)
    for item, size in enumerate(sizes):
        node = 1
        while node < num_leaves:
            node *= 2
            node += room[node] < size
        if node - num_leaves == len(bins):
            bins.append([])
        bins[node - num_leaves].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
