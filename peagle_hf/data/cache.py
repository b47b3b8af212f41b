"""The hidden-state cache on disk: one `hs_<row>.safetensors` a prepared row, and a manifest of where they came from.

A file holds `hidden_states` [T, A+1, H] and `token_ids` int64 [T]: T tokens, A auxiliary layers, H the verifier's
hidden size. Slots 0 .. A-1 are the residual stream after each auxiliary layer, slot A the one after the last layer,
before the final norm. float8_e4m3fn states come with `hidden_states_scales` float32 [T, 1, 1], to be multiplied by.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import PeagleError
from ..files import atomic_path, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PLAIN_DTYPES = ("BF16", "F16", "F32")
FP8_DTYPE = "F8_E4M3"
ROW_FILE = re.compile(r"hs_(\d+)\.safetensors")


@dataclass(frozen=True)
class Manifest:
    """What the states of a cache folder are; None where it isn't known.

    Args:
        verifier: name or path.
        revision: the hub's.
        architecture: the verifier's class, or its model type.
        num_layers: of the verifier.
        hidden_size: H.
        aux_layer_ids: the layers of slots 0 .. A-1, by number of layers passed.
        dtype: of the stored states.
        tokenizer_fingerprint: of the tokenizer that the rows were prepared with.
        format_version: of the folder.
    """

    verifier: str
    revision: str | None
    architecture: str
    num_layers: int
    hidden_size: int
    aux_layer_ids: list[int]
    dtype: str | None = None
    tokenizer_fingerprint: str | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        verifier: str,
        config: PreTrainedConfig,
        aux_layer_ids: list[int],
        revision: str | None = None,
        dtype: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> "Manifest":
        """Describe what a verifier with this (text) configuration gives."""
        return cls(
            verifier=verifier,
            revision=getattr(config, "_commit_hash", None) or revision,
            architecture=(config.architectures or [config.model_type])[0],
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            aux_layer_ids=list(aux_layer_ids),
            dtype=dtype,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Manifest | None":
        """Read a folder's manifest; None if it has none, as speculators' own folders.

        Raises:
            PeagleError: the file is damaged, or of a newer version.
        """
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] > FORMAT_VERSION:
                raise PeagleError(
                    f"{path} has format version {content['format_version']}, newer than the {FORMAT_VERSION} that this "
                    "peagle_hf reads. Update peagle_hf."
                )
            return cls(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise PeagleError(
                f"{path} is not a manifest of hidden states ({error}); it needs the fields {names}. Put the right file "
                "back, or remove the folder and run peagle-hf extract again."
            ) from error

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write it into the folder, atomically."""
        write_json(Path(folder) / MANIFEST, asdict(self))

    def check(self, wanted: "Manifest", folder: str | os.PathLike[str]) -> None:
        """Compare with what is wanted of the folder; a field that is None on either side is not compared.

        Raises:
            PeagleError: they differ; the message names both sides of every field that does.
        """
        pairs = [(field.name, getattr(self, field.name), getattr(wanted, field.name)) for field in fields(self)]
        differing = [
            f"{name} {here!r} there, {there!r} wanted"
            for name, here, there in pairs
            if here is not None and there is not None and place(here) != place(there)
        ]
        if differing:
            raise PeagleError(
                f"The hidden states in {folder} are of another kind: {'; '.join(differing)}. Name the folder that "
                "belongs to what is wanted, or another one for peagle-hf extract to fill. (If only the verifier's name "
                f"has changed, write the new one into {Path(folder) / MANIFEST}.)"
            )


@dataclass(frozen=True)
class CachedRow:
    """One row's cached states.

    Args:
        token_ids: int64 [T].
        hidden_states: [T, A * H], the auxiliary layers' states side by side.
        last_hidden_states: [T, H], after the last layer, before the final norm.
    """

    token_ids: Tensor
    hidden_states: Tensor
    last_hidden_states: Tensor

    @classmethod
    def of(cls, states: Tensor, token_ids: Tensor) -> "CachedRow":
        """From states [T, A+1, H] as they are stored."""
        hidden_size = states.shape[2]
        side_by_side = states.flatten(1)
        return cls(token_ids, side_by_side[:, :-hidden_size], side_by_side[:, -hidden_size:])


def row_path(folder: str | os.PathLike[str], row: int) -> Path:
    """Where a row's states are."""
    return Path(folder) / f"hs_{row}.safetensors"


def cached_rows(folder: str | os.PathLike[str]) -> set[int]:
    """The rows that have a file, by one listing of the folder; none if there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    return {int(match[1]) for match in map(ROW_FILE.fullmatch, names) if match}


def write_row(folder: str | os.PathLike[str], row: int, hidden_states: Tensor, token_ids: Tensor) -> None:
    """Write a row's states [T, A+1, H] and token ids [T], atomically.

    Raises:
        PeagleError: no space is left, or the folder cannot be written to.
    """
    tensors = {"hidden_states": hidden_states.contiguous(), "token_ids": token_ids.to(torch.int64).contiguous()}
    with atomic_path(row_path(folder, row)) as temporary:
        save_file(tensors, temporary)


def read_row(folder: str | os.PathLike[str], row: int, length: int | None = None) -> CachedRow:
    """Read a row's states, of its first `length` tokens only if given.

    Plain files keep their dtype; fp8 files come as bfloat16, their values times their scales.

    Raises:
        PeagleError: the file can't be opened, or isn't of this format.
    """
    path = row_path(folder, row)
    try:
        with safe_open(path, framework="pt") as file:
            states = file.get_slice("hidden_states")[:length]
            token_ids = file.get_slice("token_ids")[:length]
            if states.dtype == torch.float8_e4m3fn:
                states = (states.float() * file.get_slice("hidden_states_scales")[:length]).bfloat16()
    except (OSError, SafetensorError) as error:
        raise PeagleError(
            f"The hidden states {path} can't be read: {error}. Remove the file and run peagle-hf extract again, which "
            "makes just what is missing."
        ) from error
    return CachedRow.of(states, token_ids)


def check_row(path: str | os.PathLike[str], shape: tuple[int, int, int], token_ids: Tensor | None = None) -> str | None:
    """Say why a file can't be used, or None if it can.

    Args:
        shape: the wanted (T, A+1, H).
        token_ids: int64 [T]; with them the tokens are compared and all values read, else the header only.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            lacking = {"hidden_states", "token_ids"} - names
            if lacking:
                return f"it has no {' and no '.join(sorted(lacking))}"
            states = file.get_slice("hidden_states")
            if tuple(states.get_shape()) != shape:
                return f"hidden_states is {list(states.get_shape())} instead of {list(shape)} (tokens, layers, size)"
            floats = ["hidden_states"]
            if states.get_dtype() == FP8_DTYPE:
                floats.append("hidden_states_scales")
                if "hidden_states_scales" not in names:
                    return "its fp8 states have no hidden_states_scales"
            elif states.get_dtype() not in PLAIN_DTYPES:
                return f"hidden_states has dtype {states.get_dtype()}"
            if token_ids is None:
                return None
            if not torch.equal(file.get_tensor("token_ids").long(), token_ids):
                return "it holds the states of other tokens"
            if not all(file.get_tensor(name).float().isfinite().all() for name in floats):
                return "it has values that are not finite"
            return None
    except (OSError, SafetensorError) as error:
        return f"it can't be opened: {error}"


def place(value: object) -> object:
    """A folder's real path, so that two spellings of it are one verifier; else the value itself."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.isdir(value) else value
