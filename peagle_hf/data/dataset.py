"""`HiddenStatesDataset`: prepared samples with their hidden states, packed into sequences.

Shape letters: T tokens, A auxiliary layers, H the verifier's hidden size, N tokens that are a target.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from ..console import number_of
from ..errors import PeagleError
from ..model.slots import target_tokens
from .cache_manifest import Manifest, origin_of
from .cache_storage import (
    CachedStates,
    all_finite,
    cache_folder,
    cached_rows,
    check_file,
    failed_rows,
    read_states,
    row_path,
    save_states,
)
from .endpoint import concurrently
from .endpoint_states import Endpoint
from .errors import row_errors
from .extract_in_process import check_vocabulary
from .in_process_states import InProcessVerifier, StatesRequest
from .packing import SequenceRequest, first_fit
from .prepared_dataset import check_skip_rows, column, load_prepared, rows_fingerprint

logger = logging.getLogger(__name__)

OnMissing = Literal["raise", "skip", "warn", "generate"]
MAX_REQUESTS = 16
"""Concurrent requests to the servers while one packed sequence is built."""
GENERATED_DTYPE = "bfloat16"
"""Dtype of the endpoint's states if no manifest says otherwise, as in `peagle-hf extract`."""
MAX_NAMED = 5
"""Largest number of files or rows that a message names."""
MIN_TOKENS = 3
"""A shorter sample has no position that sees a token and predicts another."""


class HiddenStatesDataset(Dataset):
    """Map-style dataset whose items are packed sequences: lists of samples that fill `total_seq_len` positions.

    Samples are packed by their lengths alone (seeded first fit), before any cache file is opened. An item is asked for
    by its number, or by a `SequenceRequest` as `EpochSampler` does.

    Args:
        data_path: folder of `peagle-hf prepare`.
        hidden_states_path: folder of `peagle-hf extract`; default: `hidden_states` in `data_path`.
        total_seq_len: positions in a packed sequence. A longer sample is cut, and left out if there is nothing to
            train on before the cut; the log counts both.
        rows: the samples to use, by their row in the prepared dataset; None means all.
        on_missing: what to do about samples without a cache file: "raise", leave them out with a line in the log
            ("skip") or a warning ("warn"), or have their states computed whenever they are needed ("generate").
        seed: of the packing.
        endpoint: the vLLM servers for "generate".
        keep_generated: write what was generated into the cache, so that this is done only once for each sample.
        skip_rows: rows of samples to leave out, such as those that a server fails every time. Their states are neither
            asked for nor read. All other samples stay in their packed sequences, so that a training can be resumed with
            more rows to skip.
        verifier: for "generate" in place of an endpoint. Items then lack the states of samples without a file, and
            `completed` adds them to batches of the collator.

    Raises:
        PeagleError: no such folder, missing cache files under "raise", or nothing left to train on. Loading an item
            raises a `RowError`, which names the row, if the states of one of its samples can't be had.
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
        verifier: InProcessVerifier | None = None,
    ):
        self.data_path = Path(data_path)
        self.data = load_prepared(data_path)
        self.skip_rows = check_skip_rows(skip_rows, len(self.data), data_path)
        self.hidden_states_path = cache_folder(data_path, hidden_states_path)
        self.endpoint, self.verifier, self.keep_generated = endpoint, verifier, keep_generated
        if on_missing not in get_args(OnMissing):
            raise PeagleError(f"on_missing is {on_missing!r} but must be one of {', '.join(get_args(OnMissing))}.")
        if (endpoint is not None) + (verifier is not None) != (on_missing == "generate"):
            raise PeagleError('on_missing="generate" takes either an endpoint or a verifier, and others take neither.')
        self.total_seq_len = total_seq_len
        rows = range(len(self.data)) if rows is None else rows
        rows = self._present(rows, on_missing)
        self._origin = self._check_cache(rows)
        lengths = column(self.data, "seq_len")
        wanted = self._trainable(rows, lengths)
        order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [wanted[index] for index in order]
        sizes = [min(lengths[row] - 2, total_seq_len) for row in shuffled]
        self.plan = [[shuffled[index] for index in bin_] for bin_ in first_fit(sizes, total_seq_len)]

    def _trainable(self, rows: Sequence[int], lengths: list[int]) -> list[int]:
        """Those of the rows whose sample has something to train on; what is left out or cut is logged.

        Raises:
            PeagleError: no sample has anything to train on.
        """
        long_enough = [row for row in rows if lengths[row] >= MIN_TOKENS]
        cut = [row for row in long_enough if lengths[row] - 2 > self.total_seq_len]
        untrainable = {row for row, count in zip(cut, self._count_learnt(cut), strict=True) if not count}
        wanted = [row for row in long_enough if row not in untrainable]
        self.num_truncated = len(cut) - len(untrainable)
        if not wanted:
            raise PeagleError(
                f"{self.data_path} has no sample of at least {MIN_TOKENS} tokens with something to train on in its "
                f"first {self.total_seq_len} positions. Prepare more data, or raise --total-seq-len."
            )
        if not any(self._targets(row).any() for row in wanted if row not in self.skip_rows):
            raise PeagleError(
                f"None of the {len(wanted)} samples of {self.data_path} has a token to train on: the first token of an "
                "answer always comes from the verifier, and no answer has a second one. Prepare data with longer "
                "answers."
            )
        if len(long_enough) < len(rows):
            logger.warning(
                "%s out of %s: shorter than %d tokens.",
                number_of(len(rows) - len(long_enough), "sample is left", "samples are left"),
                self.data_path,
                MIN_TOKENS,
            )
        if untrainable:
            logger.warning(
                "%s: nothing to train on in the first %d positions. Raise --total-seq-len.",
                number_of(len(untrainable), "sample is left out", "samples are left out"),
                self.total_seq_len,
            )
        if self.num_truncated:
            logger.warning(
                "%d of %d samples are longer than total_seq_len %d and are cut; raise --total-seq-len to keep them.",
                self.num_truncated,
                len(wanted),
                self.total_seq_len,
            )
        return wanted

    def check_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Make sure that the cached states are of the auxiliary layers that the drafter will read when it is served.

        Raises:
            PeagleError: they are of other layers.
        """
        manifest = Manifest.read(self.hidden_states_path)
        if manifest is not None and manifest.aux_layer_ids != list(aux_layer_ids):
            raise PeagleError(
                f"The hidden states in {self.hidden_states_path} are those of the layers {manifest.aux_layer_ids}, but "
                f"the drafter reads {list(aux_layer_ids)}. Make the drafter with target_layer_ids="
                f"{manifest.aux_layer_ids}, or extract its layers into another folder."
            )
        if self.verifier is not None and self.verifier.layer_ids != tuple(aux_layer_ids):
            raise PeagleError(
                f"The verifier of the dataset gives the states of the layers {list(self.verifier.layer_ids)}, but the "
                f"drafter reads {list(aux_layer_ids)}. Make both with the same layers."
            )

    def _check_cache(self, rows: Sequence[int]) -> str | None:
        """Make sure that the cache is of this prepared dataset, before any states are read.

        If the manifest has this dataset's fingerprint, that is enough. If it has another one, the tokens of each file
        are compared here. If it has none, each file is compared when it is read.

        Returns:
            The weights and layers that each file must name in its metadata (see `origin_of`).

        Raises:
            PeagleError: files are of other samples; the message names one.
        """
        manifest = Manifest.read(self.hidden_states_path)
        if manifest is None or manifest.rows in (None, rows_fingerprint(self.data_path)):
            return origin_of(manifest)
        logger.info("%s was extracted from another dataset. Comparing its tokens.", self.hidden_states_path)
        present = cached_rows(self.hidden_states_path)
        foreign = {}
        for row in (row for row in rows if row in present and row not in self.skip_rows):
            sample, path = self.data[row], row_path(self.hidden_states_path, row)
            tokens, mask = (torch.as_tensor(sample[name]).long() for name in ("input_ids", "loss_mask"))
            reason = check_file(path, (None, None, None), tokens, target_tokens(mask.bool()))
            if reason is not None:
                foreign[row] = reason
        if foreign:
            row, reason = next(iter(foreign.items()))
            raise PeagleError(
                f"{len(foreign)} of the files in {self.hidden_states_path} are not of the samples in {self.data_path}, "
                f"such as hs_{row}.safetensors: {reason}. The hidden states are of another dataset, or the dataset was "
                "prepared anew since. Name the folders that belong together, or run peagle-hf extract again, which "
                "extracts only these samples again."
            )
        return origin_of(manifest)

    def _present(self, rows: Sequence[int], on_missing: OnMissing) -> Sequence[int]:
        """The rows to load: those without a file are left out, asked for or an error, as `on_missing` says."""
        if left_out := sorted(self.skip_rows.intersection(rows)):
            logger.info("Samples of %s left out by --skip-rows: %s.", self.data_path, ", ".join(map(str, left_out)))
        present = cached_rows(self.hidden_states_path) | self.skip_rows
        missing = [row for row in rows if row not in present]
        self.num_missing = len(missing)
        if not missing:
            return rows
        if on_missing == "generate":
            logger.info(
                "%d of %d samples have no file; %s.",
                len(missing),
                len(rows),
                "the vLLM server is asked for their hidden states"
                if self.endpoint
                else "the verifier computes their hidden states in this process",
            )
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
        """Say which files of the whole prepared dataset are missing, why if that is known, and what to do."""
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
                f"`peagle-hf extract` again, which extracts only those that are missing. {skip}"
            )
        if missing[0] == num_rows - len(missing):
            return (
                f"{message} The first {missing[0]} are there. Run `peagle-hf extract` without --max-samples, or with "
                f"at least {num_rows}; it extracts only those that are missing. {skip}"
            )
        return (
            f"{message} Run `peagle-hf extract` again, of all ranks if it ran with --world-size; it extracts only "
            f"those that are missing. {skip}"
        )

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def num_samples(self) -> int:
        """Samples in all packed sequences."""
        return sum(len(self._kept(number)) for number in range(len(self)))

    def num_learnt(self, number: int) -> int:
        """Positions of a packed sequence that are trained on, counted from the prepared dataset alone."""
        return sum(int(self._targets(row).sum()) for row in self._kept(number))

    def _kept(self, number: int) -> list[int]:
        """Rows of the samples of a packed sequence, without those of `skip_rows`."""
        return [row for row in self.plan[number] if row not in self.skip_rows]

    def _count_learnt(self, rows: Sequence[int]) -> list[int]:
        """Positions to train on in each of many samples: the sums of `_targets`, a thousand samples at a time."""
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
        """Whether a drafter is trained to predict each token of a sample that isn't cut off, bool [T]."""
        mask = torch.as_tensor(self.data[row]["loss_mask"][: self.total_seq_len + 2])
        return target_tokens(mask.bool())

    def __getitem__(self, index: int | SequenceRequest) -> dict[str, Any]:
        """Load a packed sequence.

        Returns:
            `epoch`, and `documents`: of each sample `sample_id`, `input_ids` [T], `loss_mask` [T], the auxiliary
            layers' `hidden_states` [T, A * H] and the last layer's `target_states` [N, H] of its targets. Where a
            verifier is to compute the states, `to_generate`, what it needs, takes the place of both.

        Raises:
            RowError: the states of a sample can't be had.
        """
        request = index if isinstance(index, SequenceRequest) else SequenceRequest(0, index)
        rows = self._kept(request.number)
        is_filler = request.is_filler or not rows
        # If --skip-rows leaves nothing of a packed sequence, another sample takes its place, so that the number of
        # steps stays the same.
        if not rows:
            rows = next(filter(None, map(self._kept, range(len(self)))))[:1]
        generated = self._generated(rows)
        documents = []
        for row in rows:
            with row_errors(row, self.data_path):
                if self.verifier is not None and not row_path(self.hidden_states_path, row).exists():
                    documents.append(self._without_states(row))
                else:
                    documents.append(self._load_sample(row, generated.get(row)))
        if is_filler:
            for document in documents:
                document["loss_mask"] = torch.zeros_like(document["loss_mask"])
                if "target_states" in document:
                    document["target_states"] = document["target_states"][:0]
        return {"epoch": request.epoch, "documents": documents}

    def _generated(self, rows: Sequence[int]) -> dict[int, CachedStates]:
        """The endpoint's states of the samples that have no file, in the precision that the cache stores them in."""
        endpoint = self.endpoint
        missing = [row for row in rows if endpoint and not row_path(self.hidden_states_path, row).exists()]
        if endpoint is None or not missing:
            return {}
        with row_errors(missing[0], self.data_path):
            manifest = Manifest.read(self.hidden_states_path)

        def generate(row: int) -> CachedStates:
            with row_errors(row, self.data_path):
                tokens, is_target = self._to_generate(row)
                states = endpoint.fetch(tokens.tolist(), dtype_of(manifest))
                return self._as_cached(row, CachedStates(tokens, states), is_target, manifest)

        generated = {}
        for row, result in concurrently(generate, missing, min(len(missing), MAX_REQUESTS)):
            if isinstance(result, BaseException):
                raise result
            generated[row] = result
        return generated

    def _to_generate(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a sample that the verifier reads, int64 [T], and which are targets, bool [T]."""
        length = None if self.keep_generated else self.total_seq_len + 2
        sample = self.data[row]
        tokens, mask = (torch.as_tensor(sample[name])[:length] for name in ("input_ids", "loss_mask"))
        return tokens.long(), target_tokens(mask.bool())

    def _as_cached(
        self, row: int, states: CachedStates, is_target: torch.Tensor, manifest: Manifest | None
    ) -> CachedStates:
        """Generated states of a sample in the kind of the cache, kept there if so chosen, then cut to what is used."""
        cached = states.stored_as((manifest and manifest.storage) or "plain", is_target)
        if self.keep_generated:
            save_states(row_path(self.hidden_states_path, row), replace(cached, origin=origin_of(manifest)))
        return cached.first(self.total_seq_len + 2)

    def _without_states(self, row: int) -> dict[str, Any]:
        """A sample whose states the verifier of this process is to compute, cut after `total_seq_len` positions."""
        sample, length = self.data[row], self.total_seq_len + 2
        return {
            "sample_id": row,
            "input_ids": torch.as_tensor(sample["input_ids"])[:length].long(),
            "loss_mask": torch.as_tensor(sample["loss_mask"])[:length].bool(),
            "to_generate": self._to_generate(row),
        }

    def completed(self, batches: Iterable[dict[str, Any]], ahead: int = 1) -> Iterator[dict[str, Any]]:
        """Give batches of the collator with the states that they lack, which `verifier` computes in a thread.

        Args:
            ahead: the number of batches for which states are computed in advance.

        Raises:
            RowError: the states of a sample can't be computed or kept.
        """
        return iter(batches) if self.verifier is None else self.verifier.completed(batches, self._compute, ahead)

    def _compute(self, requests: list[StatesRequest], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The states of samples that have no file, in the precision that the cache stores them in."""
        assert self.verifier is not None
        with row_errors(requests[0].row, self.data_path):
            manifest, model = Manifest.read(self.hidden_states_path), self.verifier.load()
        tokens = [torch.from_numpy(request.token_ids) for request in requests]
        for request, token_ids in zip(requests, tokens, strict=True):
            with row_errors(request.row, self.data_path):
                check_vocabulary(model, request.row, token_ids)
        with row_errors(requests[0].row, self.data_path):
            computed = self.verifier.states(tokens, dtype_of(manifest))
        found = []
        for request, token_ids, states in zip(requests, tokens, computed, strict=True):
            with row_errors(request.row, self.data_path):
                if not _are_finite(states):
                    raise PeagleError(
                        f"the verifier's hidden states are not finite as {dtype_of(manifest)}; look at the row's text, "
                        f"or leave it out with --skip-rows {request.row}"
                    )
                is_target, wanted = (
                    torch.from_numpy(mask).to(states.device) for mask in (request.is_target, request.wanted)
                )
                cached = CachedStates(token_ids.to(states.device), states)
                cached = self._as_cached(request.row, cached, is_target, manifest)
                hidden, target = cached.hidden_states[:-2], cached.last_of(wanted)
                found.append((hidden.to(device), target.to(device)))
        return found

    def _load_sample(self, row: int, generated: CachedStates | None = None) -> dict[str, Any]:
        """Load a sample and its states, cut after `total_seq_len` positions; tokens, weights and layers are checked."""
        sample = self.data[row]
        length = min(len(sample["input_ids"]), self.total_seq_len + 2)
        tokens = torch.as_tensor(sample["input_ids"])[:length].long()
        cached = generated or read_states(self.hidden_states_path, row, length=length)
        if not torch.equal(cached.token_ids, tokens):
            raise PeagleError(
                f"{self.hidden_states_path}/hs_{row}.safetensors holds the states of other tokens than row {row} of "
                "the prepared dataset. Run peagle-hf extract again, which extracts such samples again."
            )
        if None not in (cached.origin, self._origin) and cached.origin != self._origin:
            raise PeagleError(
                f"{row_path(self.hidden_states_path, row)} holds states of other weights or layers ({cached.origin}) "
                f"than the manifest of its folder says ({self._origin}). Run peagle-hf extract again, which extracts "
                "such samples again."
            )
        loss_mask = torch.as_tensor(sample["loss_mask"])[:length].bool()
        try:
            target_states = cached.last_of(target_tokens(loss_mask))
        except PeagleError as error:
            raise PeagleError(f"{row_path(self.hidden_states_path, row)}: {error}") from error
        hidden_states = cached.hidden_states
        if not (_are_finite(hidden_states) and _are_finite(target_states)):
            raise PeagleError(
                "its hidden states hold NaN or infinite values, which can't be trained on. Run peagle-hf extract with "
                "--validate-outputs, which extracts such samples again."
            )
        return {
            "sample_id": row,
            "input_ids": tokens,
            "loss_mask": loss_mask,
            "hidden_states": hidden_states,
            "target_states": target_states,
        }


def dtype_of(manifest: Manifest | None) -> torch.dtype:
    """The dtype in which a folder's states are read, also those that are generated for it."""
    dtype: torch.dtype = getattr(torch, manifest.dtype if manifest and manifest.dtype else GENERATED_DTYPE)
    return dtype


def _are_finite(states: torch.Tensor) -> bool:
    return states.numel() == 0 or bool(all_finite(states))


def _names(rows: Sequence[int]) -> str:
    names = [f"hs_{row}.safetensors" for row in rows[:MAX_NAMED]]
    return ", ".join(names) + (", …" if len(rows) > MAX_NAMED else "")
