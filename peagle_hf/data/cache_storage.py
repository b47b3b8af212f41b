"""Files of cached hidden states, `hs_<row>.safetensors`, one for each prepared sample, and their storage kinds.

Shape letters: T tokens, A auxiliary layers, H the verifier's hidden size, N tokens that are a target.

| kind | tensors |
|---|---|
| plain | `hidden_states` [T, A+1, H], `token_ids` int64 [T] |
| learnt | `aux_hidden_states` [T, A, H], `last_hidden_states` [N, H], `is_target` bool [T], `token_ids` int64 [T] |
| fp8, fp8-learnt | the same in float8_e4m3fn, and `hidden_states_scales` float32 [T, 1, 1], to be multiplied by |

The layers 0 .. A-1 of `hidden_states` are the residual stream after each auxiliary layer; layer A is the one after the
verifier's last layer, before the final norm. A learnt kind keeps the last layer's states only of the tokens that
training needs them for (`model.slots.target_tokens`). The kind shows in a file's header, which also names the weights
and layers that the states are of.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import PeagleError
from ..files import atomic_path, read_json, save_file

STATES_FILE = re.compile(r"hs_(\d+)\.safetensors")

Storage = Literal["plain", "fp8", "learnt", "fp8-learnt"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
FP8_STORAGES: tuple[Storage, ...] = ("fp8", "fp8-learnt")
LEARNT_STORAGES: tuple[Storage, ...] = ("learnt", "fp8-learnt")

STATES, SCALES, TOKENS = "hidden_states", "hidden_states_scales", "token_ids"
AUX_STATES, LAST_STATES, IS_TARGET = "aux_hidden_states", "last_hidden_states", "is_target"
FP8, FP8_DTYPE = torch.float8_e4m3fn, "F8_E4M3"
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(FP8).float().numpy()
"""The value of each byte. On a CPU a table takes a third of the time of PyTorch's conversion."""
PLAIN_DTYPES = ("BF16", "F16", "F32")
ORIGIN = "states_of"
"""Key of a file's metadata that names the weights and layers (see `cache_manifest.origin_of`)."""
SMALLEST_SCALE = 1e-12
"""Scale of a token whose states are all zero; speculators takes the same."""
TOKENS_AT_ONCE = 256
"""Tokens converted to or from float8 at once: a float32 copy of a long sample would be large."""


def cache_folder(data_path: str | os.PathLike[str], hidden_states_path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a dataset's hidden states: `hidden_states_path` if given, else `hidden_states` in the dataset."""
    return Path(hidden_states_path or Path(data_path) / "hidden_states")


@dataclass(frozen=True)
class CachedStates:
    """A sample's hidden states as a file stores them; the properties convert them to plain values.

    Args:
        token_ids: int64 [T].
        states: [T, A+1, H], or [T, A, H] if the last layer's states are in `last`.
        scales: float32 [T, 1, 1], of float8 states; None for other dtypes.
        last: [N, H], the last layer's states of the tokens of `is_target`; None if `states` has them all.
        is_target: bool [T], with N of them true; None without `last`.
        origin: the weights and layers that the states are of (see `origin_of`); None if the file doesn't say.
    """

    token_ids: Tensor
    states: Tensor
    scales: Tensor | None = None
    last: Tensor | None = None
    is_target: Tensor | None = None
    origin: str | None = None

    @property
    def storage(self) -> Storage:
        return STORAGES[(self.scales is not None) + 2 * (self.last is not None)]

    @property
    def hidden_states(self) -> Tensor:
        """The auxiliary layers' states side by side, [T, A * H]."""
        states = self.states if self.last is not None else self.states[:, :-1]
        return _values(states, self.scales).flatten(1)

    @property
    def last_hidden_states(self) -> Tensor:
        """The states after the last layer, before the final norm, [T, H].

        Raises:
            PeagleError: those of some tokens aren't stored.
        """
        return self.last_of(torch.ones_like(self.token_ids, dtype=torch.bool))

    def last_of(self, is_wanted: Tensor) -> Tensor:
        """The last layer's states [n, H] of the n tokens for which `is_wanted`, bool [T], is true.

        Raises:
            PeagleError: those of some of these tokens aren't stored.
        """
        if self.last is None:
            last = self.states[:, -1][is_wanted]
        else:
            assert self.is_target is not None
            num_lacking = int((is_wanted & ~self.is_target).sum())
            if num_lacking:
                raise PeagleError(
                    f"The last layer's states of {num_lacking} tokens are needed but not stored: files of the kind "
                    "learnt have only those of the tokens that were trained on when they were written. Run peagle-hf "
                    "extract with --validate-outputs, which extracts such samples again, or extract without --storage "
                    "learnt."
                )
            last = self.last[is_wanted[self.is_target]]
        return _values(last[:, None], None if self.scales is None else self.scales[is_wanted])[:, 0]

    def first(self, length: int) -> "CachedStates":
        """The states of the first `length` tokens."""
        is_target = None if self.is_target is None else self.is_target[:length]
        return CachedStates(
            self.token_ids[:length],
            self.states[:length],
            None if self.scales is None else self.scales[:length],
            None if self.last is None or is_target is None else self.last[: int(is_target.sum())],
            is_target,
            self.origin,
        )

    def stored_as(self, storage: Storage, is_target: Tensor | None = None) -> "CachedStates":
        """The same states converted to another storage kind; a token's float8 scale covers all its stored states.

        Args:
            is_target: bool [T], tokens whose last layer's states a learnt kind keeps.

        Raises:
            PeagleError: the kind needs states that aren't stored.
        """
        new = self
        if storage in FP8_STORAGES and new.scales is None:
            new = new._quantized()
        elif storage not in FP8_STORAGES and new.scales is not None:
            last = None
            if new.last is not None:
                assert new.is_target is not None
                last = new.last_of(new.is_target)
            new = replace(new, states=_values(new.states, new.scales), scales=None, last=last)
        if storage in LEARNT_STORAGES and new.last is None:
            assert is_target is not None
            new = replace(new, states=new.states[:, :-1], last=new.states[:, -1][is_target], is_target=is_target)
        elif storage not in LEARNT_STORAGES and new.last is not None:
            raise PeagleError(
                f"Files of the kind {new.storage} lack the last layer's states of tokens that aren't trained on; "
                f"the kind {storage}, which speculators reads too, needs them. Extract with --storage {storage}."
            )
        return new

    def to_cpu(self) -> "CachedStates":
        """The same on the CPU; copies from a GPU are there once its current stream has been waited for."""
        copied: dict[str, Any] = {
            name: value.to("cpu", non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **copied)

    def _quantized(self) -> "CachedStates":
        """The same states in float8, with one scale for each token."""
        # The maximum of abs() would need a second copy of the states.
        highest = torch.maximum(self.states.amax((1, 2)), -self.states.amin((1, 2))).float()
        last = self.last
        if last is not None:
            assert self.is_target is not None
            highest[self.is_target] = torch.maximum(highest[self.is_target], last.abs().amax(1).float())
        scales = (highest / torch.finfo(FP8).max).clamp(min=SMALLEST_SCALE)[:, None, None]
        if last is not None:
            assert self.is_target is not None
            last = _float8(last[:, None], scales[self.is_target])[:, 0]
        return replace(self, states=_float8(self.states, scales), scales=scales, last=last)


def all_finite(states: Tensor) -> Tensor:
    """Whether all values are finite, bool []; on a CPU in a tenth of the time of `torch.isfinite(states).all()`."""
    return torch.isfinite(torch.stack(torch.aminmax(states))).all()


def _float8(states: Tensor, scales: Tensor) -> Tensor:
    stored = torch.empty(states.shape, dtype=FP8, device=states.device)
    for start in range(0, len(states), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        stored[part] = (states[part].float() / scales[part]).to(FP8)
    return stored


def _values(stored: Tensor, scales: Tensor | None) -> Tensor:
    """States as values: float8 ones times their scales, in bfloat16; others unchanged."""
    if scales is None:
        return stored
    values = torch.empty(stored.shape, dtype=torch.bfloat16, device=stored.device)
    for start in range(0, len(stored), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        values[part] = _float32(stored[part]) * scales[part]
    return values


def _float32(stored: Tensor) -> Tensor:
    if not stored.is_cpu:
        return stored.float()
    return torch.from_numpy(np.take(FP8_VALUES, stored.view(torch.uint8).numpy()))


def row_path(folder: str | os.PathLike[str], row: int) -> Path:
    """The file of a sample's states, by the sample's row in the prepared dataset."""
    return Path(folder) / f"hs_{row}.safetensors"


def cached_rows(folder: str | os.PathLike[str]) -> set[int]:
    """The rows of the samples that have a file in the folder; none if there is no such folder.

    Raises:
        PeagleError: `folder` is a file.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    except NotADirectoryError as error:
        raise PeagleError(f"{folder} is a file, and hidden states are kept in a folder. Name another one.") from error
    return {int(match[1]) for match in map(STATES_FILE.fullmatch, names) if match}


def failed_rows(folder: str | os.PathLike[str]) -> dict[int, str]:
    """Rows of the samples that servers failed in the last extraction, and why, from all `failed*.json` of a folder.

    Raises:
        PeagleError: such a file is damaged.
    """
    remedy = "It only lists samples that a server failed: remove it, and run peagle-hf extract again."
    records = [read_json(path, remedy) for path in sorted(Path(folder).glob("failed*.json"))]
    return {int(row): str(reason) for record in records for row, reason in record.items() if row.isdecimal()}


def write_states(
    folder: str | os.PathLike[str],
    row: int,
    hidden_states: Tensor,
    token_ids: Tensor,
    storage: Storage = "plain",
    is_target: Tensor | None = None,
    origin: str | None = None,
) -> None:
    """Write a sample's states [T, A+1, H] and token ids [T] as a file of a storage kind, atomically.

    Args:
        row: the sample's row in the prepared dataset.
        is_target: bool [T], tokens whose last layer's states a learnt kind keeps.
        origin: the weights and layers of the folder's manifest (see `origin_of`).

    Raises:
        PeagleError: no space is left, or the folder cannot be written to.
    """
    cached = CachedStates(token_ids.to(torch.int64), hidden_states).stored_as(storage, is_target)
    save_states(row_path(folder, row), replace(cached, origin=origin))


def save_states(path: str | os.PathLike[str], cached: CachedStates) -> None:
    """Write states in the kind that they are in, atomically.

    Raises:
        PeagleError: no space is left, or the folder cannot be written to.
    """
    states = {STATES: cached.states} if cached.last is None else {AUX_STATES: cached.states, LAST_STATES: cached.last}
    tensors = states | {TOKENS: cached.token_ids, SCALES: cached.scales, IS_TARGET: cached.is_target}
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
            temporary,
            None if cached.origin is None else {ORIGIN: cached.origin},
        )


def read_states(folder: str | os.PathLike[str], row: int, length: int | None = None) -> CachedStates:
    """Open the states of a sample, or of its first `length` tokens.

    The tensors are views of the memory-mapped file: values that are never used are never read from the disk.

    Raises:
        PeagleError: the file can't be opened, or isn't of this format.
    """
    path = row_path(folder, row)
    try:
        with safe_open(path, framework="pt") as file:
            token_ids = file.get_slice(TOKENS)[:length]
            is_learnt = AUX_STATES in file.keys()  # noqa: SIM118 (it is no dict)
            states = file.get_slice(AUX_STATES if is_learnt else STATES)[:length]
            scales = file.get_slice(SCALES)[:length] if states.dtype == FP8 else None
            origin = (file.metadata() or {}).get(ORIGIN)
            if not is_learnt:
                return CachedStates(token_ids, states, scales, origin=origin)
            is_target = file.get_slice(IS_TARGET)[:length]
            last = file.get_slice(LAST_STATES)[: int(is_target.sum())]
            return CachedStates(token_ids, states, scales, last, is_target, origin)
    except (OSError, SafetensorError) as error:
        raise PeagleError(
            f"The hidden states {path} can't be read: {error}. Remove the file and run peagle-hf extract again, which "
            "extracts only what is missing."
        ) from error


@dataclass(frozen=True)
class FileLayout:
    """What a file holds, by its header.

    Args:
        storage: its kind.
        dtype: of the states as they are stored.
        shape: (T, A+1, H), the last layer counted also if its states are in a tensor of their own.
    """

    storage: Storage
    dtype: str
    shape: tuple[int, int, int]


class UnusableFile(Exception):
    """A file that can't be used; the message is the reason, a clause."""


def check_file(
    path: str | os.PathLike[str],
    shape: tuple[int | None, int | None, int | None],
    token_ids: Tensor | None = None,
    is_target: Tensor | None = None,
    origin: str | None = None,
    read_values: bool = False,
) -> str | None:
    """The reason why a file can't be used, or None if it can; the arguments are those of `file_layout`."""
    try:
        file_layout(path, shape, token_ids, is_target, origin, read_values)
        return None
    except UnusableFile as error:
        return str(error)


def file_layout(
    path: str | os.PathLike[str],
    shape: tuple[int | None, int | None, int | None] = (None, None, None),
    token_ids: Tensor | None = None,
    is_target: Tensor | None = None,
    origin: str | None = None,
    read_values: bool = False,
) -> FileLayout:
    """Check a file by its header, which also shows whether it is complete.

    Args:
        shape: the wanted (T, A+1, H); None for any.
        token_ids: int64 [T], the tokens whose states the file must hold.
        is_target: bool [T], the tokens whose last layer's states it must hold.
        origin: the weights and layers of the folder's manifest; a file that names others can't be used.
        read_values: also read all values, which must be finite.

    Raises:
        UnusableFile: the file can't be opened, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            layout = _layout(file)
            if any(wanted not in (None, found) for wanted, found in zip(shape, layout.shape, strict=True)):
                wanted = [found if size is None else size for size, found in zip(shape, layout.shape, strict=True)]
                raise UnusableFile(f"hidden_states is {list(layout.shape)} instead of {wanted} (tokens, layers, size)")
            found_origin = (file.metadata() or {}).get(ORIGIN)
            if None not in (origin, found_origin) and found_origin != origin:
                raise UnusableFile(f"it holds states of other weights or layers ({found_origin})")
            if token_ids is not None and not torch.equal(file.get_tensor(TOKENS).long(), token_ids):
                raise UnusableFile("it holds the states of other tokens")
            if is_target is not None and layout.storage in LEARNT_STORAGES:
                num_lacking = int((is_target & ~file.get_tensor(IS_TARGET)).sum())
                if num_lacking:
                    raise UnusableFile(f"it lacks the last layer's states of {num_lacking} tokens that are trained on")
            if read_values:
                for name in {STATES, AUX_STATES, LAST_STATES, SCALES} & set(file.keys()):
                    if not all(part.float().isfinite().all() for part in file.get_tensor(name).split(TOKENS_AT_ONCE)):
                        raise UnusableFile("it has values that are not finite")
            return layout
    except (OSError, SafetensorError) as error:
        raise UnusableFile(f"it can't be opened: {error}") from error


def _layout(file: Any) -> FileLayout:
    """The layout of an open file, by the dtypes and shapes in its header."""
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    is_learnt = AUX_STATES in found
    wanted = [AUX_STATES, LAST_STATES, IS_TARGET, TOKENS] if is_learnt else [STATES, TOKENS]
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise UnusableFile(f"it has no {' and no '.join(lacking)}")
    dtype, shape = found[wanted[0]]
    if dtype not in (*PLAIN_DTYPES, FP8_DTYPE):
        raise UnusableFile(f"{wanted[0]} has dtype {dtype}")
    if len(shape) != 3:
        raise UnusableFile(f"{wanted[0]} is {shape}, which is not tokens, layers and size")
    length, num_layers, size = shape
    shapes = {TOKENS: [length]}
    if dtype == FP8_DTYPE:
        if SCALES not in found:
            raise UnusableFile("its fp8 states have no hidden_states_scales")
        shapes[SCALES] = [length, 1, 1]
    if is_learnt:
        shapes |= {IS_TARGET: [length], LAST_STATES: [int(file.get_tensor(IS_TARGET).sum()), size]}
    for name, expected in shapes.items():
        if found[name][1] != expected:
            raise UnusableFile(f"{name} is {found[name][1]} instead of {expected}")
    storage = STORAGES[(dtype == FP8_DTYPE) + 2 * is_learnt]
    return FileLayout(storage, dtype, (length, num_layers + is_learnt, size))
