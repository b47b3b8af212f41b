"""The hidden-state cache on disk: one `hs_<row>.safetensors` a prepared row, and a manifest of where they came from.

Shape letters: T tokens, A auxiliary layers, H the verifier's hidden size, N tokens that are a target.

A plain file holds `hidden_states` [T, A+1, H] and `token_ids` int64 [T]. Slots 0 .. A-1 are the residual stream after
each auxiliary layer, slot A the one after the last layer, before the final norm. A learnt file keeps the last layer's
states of those tokens only that a learnt row is taught from (`cod.target_tokens`): `aux_hidden_states` [T, A, H],
`last_hidden_states` [N, H] and `is_target` bool [T]. In either, states in float8_e4m3fn come with
`hidden_states_scales` float32 [T, 1, 1], to be multiplied by. What a file is shows in its header, which also names the
weights and layers that its states are of.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import PeagleError
from ..files import atomic_path, read_json, save_file

ROW_FILE = re.compile(r"hs_(\d+)\.safetensors")

Storage = Literal["plain", "fp8", "learnt", "fp8-learnt"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
FP8_STORAGES: tuple[Storage, ...] = ("fp8", "fp8-learnt")
LEARNT_STORAGES: tuple[Storage, ...] = ("learnt", "fp8-learnt")

STATES, SCALES, TOKENS = "hidden_states", "hidden_states_scales", "token_ids"
AUX_STATES, LAST_STATES, IS_TARGET = "aux_hidden_states", "last_hidden_states", "is_target"
FP8, FP8_DTYPE = torch.float8_e4m3fn, "F8_E4M3"
PLAIN_DTYPES = ("BF16", "F16", "F32")
ORIGIN = "states_of"
"""A file's metadata: see `origin_of`."""
SMALLEST_SCALE = 1e-12
"""Of a token whose states are all zero; speculators takes the same."""
TOKENS_AT_ONCE = 256
"""So many tokens are turned to or from float8 in one go: float32 copies of a long row would be large."""


def cache_folder(data_path: str | os.PathLike[str], hidden_states_path: str | os.PathLike[str] | None = None) -> Path:
    """Where the hidden states of a prepared dataset are, unless they are said to be elsewhere."""
    return Path(hidden_states_path or Path(data_path) / "hidden_states")


@dataclass(frozen=True)
class CachedRow:
    """One row's states as a file holds them, which are turned into values when they are asked for.

    Args:
        token_ids: int64 [T].
        slots: [T, A+1, H]; [T, A, H] where the last layer's states are apart.
        scales: float32 [T, 1, 1], of float8 states.
        last: [N, H], the last layer's states of the tokens of `is_target`; None where the slots have them all.
        is_target: bool [T].
        origin: the weights and layers that they are of (see `origin_of`); None where the file doesn't say.
    """

    token_ids: Tensor
    slots: Tensor
    scales: Tensor | None = None
    last: Tensor | None = None
    is_target: Tensor | None = None
    origin: str | None = None

    @property
    def storage(self) -> Storage:
        return STORAGES[(self.scales is not None) + 2 * (self.last is not None)]

    @property
    def hidden_states(self) -> Tensor:
        """[T, A * H], the auxiliary layers' states side by side."""
        slots = self.slots if self.last is not None else self.slots[:, :-1]
        return _values(slots, self.scales).flatten(1)

    @property
    def last_hidden_states(self) -> Tensor:
        """[T, H], after the last layer, before the final norm.

        Raises:
            PeagleError: those of some tokens aren't there.
        """
        return self.last_of(torch.ones_like(self.token_ids, dtype=torch.bool))

    def last_of(self, is_wanted: Tensor) -> Tensor:
        """[n, H], the last layer's states of the n tokens of `is_wanted`, a bool [T].

        Raises:
            PeagleError: those of some of them aren't there.
        """
        if self.last is None:
            last = self.slots[:, -1][is_wanted]
        else:
            assert self.is_target is not None
            num_lacking = int((is_wanted & ~self.is_target).sum())
            if num_lacking:
                raise PeagleError(
                    f"The last layer's states of {num_lacking} tokens are wanted that were not kept: learnt files have "
                    "those of the tokens that were learnt when they were written. Run peagle-hf extract with "
                    "--validate-outputs, which makes such files again, or extract without --storage learnt."
                )
            last = self.last[is_wanted[self.is_target]]
        return _values(last[:, None], None if self.scales is None else self.scales[is_wanted])[:, 0]

    def first(self, length: int) -> "CachedRow":
        """Its first tokens."""
        is_target = None if self.is_target is None else self.is_target[:length]
        return CachedRow(
            self.token_ids[:length],
            self.slots[:length],
            None if self.scales is None else self.scales[:length],
            None if self.last is None or is_target is None else self.last[: int(is_target.sum())],
            is_target,
            self.origin,
        )

    def stored_as(self, storage: Storage, is_target: Tensor | None = None) -> "CachedRow":
        """The same states in another kind of file; float8 is made of all states of a token that are there.

        Args:
            is_target: bool [T], whose last layer's states a learnt file keeps.

        Raises:
            PeagleError: the kind needs states that this one hasn't.
        """
        row = self
        if storage in FP8_STORAGES and row.scales is None:
            row = row._quantized()
        elif storage not in FP8_STORAGES and row.scales is not None:
            last = None
            if row.last is not None:
                assert row.is_target is not None
                last = row.last_of(row.is_target)
            row = replace(row, slots=_values(row.slots, row.scales), scales=None, last=last)
        if storage in LEARNT_STORAGES and row.last is None:
            assert is_target is not None
            row = replace(row, slots=row.slots[:, :-1], last=row.slots[:, -1][is_target], is_target=is_target)
        elif storage not in LEARNT_STORAGES and row.last is not None:
            raise PeagleError(
                f"Files of the kind {row.storage} lack the last layer's states of tokens that aren't learnt; "
                f"the kind {storage}, which speculators reads too, needs them. Extract with --storage {storage}."
            )
        return row

    def _quantized(self) -> "CachedRow":
        # Neither abs() nor a comparison needs a second copy of the states.
        highest = torch.maximum(self.slots.amax((1, 2)), -self.slots.amin((1, 2))).float()
        last = self.last
        if last is not None:
            assert self.is_target is not None
            highest[self.is_target] = torch.maximum(highest[self.is_target], last.abs().amax(1).float())
        scales = (highest / torch.finfo(FP8).max).clamp(min=SMALLEST_SCALE)[:, None, None]
        if last is not None:
            assert self.is_target is not None
            last = _float8(last[:, None], scales[self.is_target])[:, 0]
        return replace(self, slots=_float8(self.slots, scales), scales=scales, last=last)


def _float8(states: Tensor, scales: Tensor) -> Tensor:
    stored = torch.empty(states.shape, dtype=FP8)
    for start in range(0, len(states), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        stored[part] = (states[part].float() / scales[part]).to(FP8)
    return stored


def _values(stored: Tensor, scales: Tensor | None) -> Tensor:
    """Plain states as they are; float8 ones in bfloat16, their values times their scales."""
    if scales is None:
        return stored
    values = torch.empty(stored.shape, dtype=torch.bfloat16)
    for start in range(0, len(stored), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        values[part] = stored[part].float() * scales[part]
    return values


def row_path(folder: str | os.PathLike[str], row: int) -> Path:
    """Where a row's states are."""
    return Path(folder) / f"hs_{row}.safetensors"


def cached_rows(folder: str | os.PathLike[str]) -> set[int]:
    """The rows that have a file, by one listing of the folder; none if there is no such folder.

    Raises:
        PeagleError: there is a file of that name.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    except NotADirectoryError as error:
        raise PeagleError(f"{folder} is a file, and hidden states are kept in a folder. Name another one.") from error
    return {int(match[1]) for match in map(ROW_FILE.fullmatch, names) if match}


def failed_rows(folder: str | os.PathLike[str]) -> dict[int, str]:
    """The rows that a server failed when they were last asked for, and why, from all `failed*.json` of a folder.

    Raises:
        PeagleError: such a file is damaged.
    """
    remedy = "It only lists rows that a server failed: remove it, and run peagle-hf extract again."
    records = [read_json(path, remedy) for path in sorted(Path(folder).glob("failed*.json"))]
    return {int(row): str(reason) for record in records for row, reason in record.items() if row.isdecimal()}


def write_row(
    folder: str | os.PathLike[str],
    row: int,
    hidden_states: Tensor,
    token_ids: Tensor,
    storage: Storage = "plain",
    is_target: Tensor | None = None,
    origin: str | None = None,
) -> None:
    """Write a row's states [T, A+1, H] and token ids [T], atomically.

    Args:
        is_target: bool [T], for the kinds that keep the last layer's states of these tokens only.
        origin: that of the folder's manifest (see `origin_of`).

    Raises:
        PeagleError: no space is left, or the folder cannot be written to.
    """
    cached = CachedRow(token_ids.to(torch.int64), hidden_states).stored_as(storage, is_target)
    save_row(row_path(folder, row), replace(cached, origin=origin))


def save_row(path: str | os.PathLike[str], row: CachedRow) -> None:
    """Write a row as it is, atomically.

    Raises:
        PeagleError: no space is left, or the folder cannot be written to.
    """
    states = {STATES: row.slots} if row.last is None else {AUX_STATES: row.slots, LAST_STATES: row.last}
    tensors = states | {TOKENS: row.token_ids, SCALES: row.scales, IS_TARGET: row.is_target}
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
            temporary,
            None if row.origin is None else {ORIGIN: row.origin},
        )


def read_row(folder: str | os.PathLike[str], row: int, length: int | None = None) -> CachedRow:
    """Open a row's states, of its first `length` tokens only if given.

    The tensors are views of the mapped file: what is never looked at is never read.

    Raises:
        PeagleError: the file can't be opened, or isn't of this format.
    """
    path = row_path(folder, row)
    try:
        with safe_open(path, framework="pt") as file:
            token_ids = file.get_slice(TOKENS)[:length]
            is_learnt = AUX_STATES in file.keys()  # noqa: SIM118 (it is no dict)
            slots = file.get_slice(AUX_STATES if is_learnt else STATES)[:length]
            scales = file.get_slice(SCALES)[:length] if slots.dtype == FP8 else None
            origin = (file.metadata() or {}).get(ORIGIN)
            if not is_learnt:
                return CachedRow(token_ids, slots, scales, origin=origin)
            is_target = file.get_slice(IS_TARGET)[:length]
            last = file.get_slice(LAST_STATES)[: int(is_target.sum())]
            return CachedRow(token_ids, slots, scales, last, is_target, origin)
    except (OSError, SafetensorError) as error:
        raise PeagleError(
            f"The hidden states {path} can't be read: {error}. Remove the file and run peagle-hf extract again, which "
            "makes just what is missing."
        ) from error


@dataclass(frozen=True)
class RowLayout:
    """What a file's header says.

    Args:
        storage: its kind.
        dtype: of the states as they are stored.
        shape: (T, A+1, H), the last layer included wherever its states are.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, int, int]


class UnusableRow(Exception):
    """A file that can't be used; the message is the reason, in a few words."""


def check_row(
    path: str | os.PathLike[str],
    shape: tuple[int | None, int | None, int | None],
    token_ids: Tensor | None = None,
    is_target: Tensor | None = None,
    origin: str | None = None,
    read_values: bool = False,
) -> str | None:
    """Say why a file can't be used, or None if it can; see `row_layout`."""
    try:
        row_layout(path, shape, token_ids, is_target, origin, read_values)
        return None
    except UnusableRow as error:
        return str(error)


def row_layout(
    path: str | os.PathLike[str],
    shape: tuple[int | None, int | None, int | None] = (None, None, None),
    token_ids: Tensor | None = None,
    is_target: Tensor | None = None,
    origin: str | None = None,
    read_values: bool = False,
) -> RowLayout:
    """Look at a file's header, which also shows whether the file is as long as it should be.

    Args:
        shape: the wanted (T, A+1, H), None for what may be anything.
        token_ids: int64 [T], the tokens whose states they must be.
        is_target: bool [T], the tokens whose last layer's states must be there.
        origin: that of the folder's manifest; a file that names another one is of other weights or layers.
        read_values: read all values, which must be finite.

    Raises:
        UnusableRow: it can't be opened, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            layout = _layout(file)
            if any(wanted not in (None, found) for wanted, found in zip(shape, layout.shape, strict=True)):
                wanted = [found if size is None else size for size, found in zip(shape, layout.shape, strict=True)]
                raise UnusableRow(f"hidden_states is {list(layout.shape)} instead of {wanted} (tokens, layers, size)")
            found_origin = (file.metadata() or {}).get(ORIGIN)
            if None not in (origin, found_origin) and found_origin != origin:
                raise UnusableRow(f"it holds states of other weights or layers ({found_origin})")
            if token_ids is not None and not torch.equal(file.get_tensor(TOKENS).long(), token_ids):
                raise UnusableRow("it holds the states of other tokens")
            if is_target is not None and layout.storage in LEARNT_STORAGES:
                num_lacking = int((is_target & ~file.get_tensor(IS_TARGET)).sum())
                if num_lacking:
                    raise UnusableRow(f"it lacks the last layer's states of {num_lacking} tokens that are learnt")
            if read_values:
                for name in {STATES, AUX_STATES, LAST_STATES, SCALES} & set(file.keys()):
                    if not all(part.float().isfinite().all() for part in file.get_tensor(name).split(TOKENS_AT_ONCE)):
                        raise UnusableRow("it has values that are not finite")
            return layout
    except (OSError, SafetensorError) as error:
        raise UnusableRow(f"it can't be opened: {error}") from error


def _layout(file: Any) -> RowLayout:
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    is_learnt = AUX_STATES in found
    wanted = [AUX_STATES, LAST_STATES, IS_TARGET, TOKENS] if is_learnt else [STATES, TOKENS]
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise UnusableRow(f"it has no {' and no '.join(lacking)}")
    dtype, shape = found[wanted[0]]
    if dtype not in (*PLAIN_DTYPES, FP8_DTYPE):
        raise UnusableRow(f"{wanted[0]} has dtype {dtype}")
    if len(shape) != 3:
        raise UnusableRow(f"{wanted[0]} is {shape}, which is not tokens, layers and size")
    length, num_slots, size = shape
    shapes = {TOKENS: [length]}
    if dtype == FP8_DTYPE:
        if SCALES not in found:
            raise UnusableRow("its fp8 states have no hidden_states_scales")
        shapes[SCALES] = [length, 1, 1]
    if is_learnt:
        shapes |= {IS_TARGET: [length], LAST_STATES: [int(file.get_tensor(IS_TARGET).sum()), size]}
    for name, expected in shapes.items():
        if found[name][1] != expected:
            raise UnusableRow(f"{name} is {found[name][1]} instead of {expected}")
    storage = STORAGES[(dtype == FP8_DTYPE) + 2 * is_learnt]
    return RowLayout(storage, dtype, (length, num_slots + is_learnt, size))
