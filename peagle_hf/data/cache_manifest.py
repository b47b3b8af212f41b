"""`manifest.json` of a hidden-state cache: the verifier, layers and prepared samples that its states are of."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import PeagleError
from ..files import add_relative_path, canonical_path, read_json, resolve_relative_path, write_json
from ..fingerprint import has_weights, weights_of
from .cache_storage import FP8_STORAGES, LEARNT_STORAGES, STORAGES, Storage

MANIFEST = "manifest.json"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Manifest:
    """What the states of a cache folder are of: verifier, layers and prepared samples. None stands for unknown.

    Args:
        verifier: name, or absolute path of a folder. In the file the folder's path relative to the manifest is added.
        revision: the verifier's weights: the commit on the hub, or the fingerprint of a folder (see `weights_of`).
        architecture: the verifier's class, or its model type.
        num_layers: of the verifier.
        hidden_size: of the verifier.
        aux_layer_ids: the auxiliary layers in the order of the files, each by the number of layers passed.
        dtype: of the states as they are read.
        tokenizer_fingerprint: of the tokenizer that prepared the samples, its chat template included.
        chat_template_kwargs: the chat template's variables that the samples were prepared with.
        rows: fingerprint of the prepared samples that all files of the folder are of (see `rows_fingerprint`).
        storage: the kind of its files; folders of format version 1 are plain.
        format_version: of the folder.
        verifier_dtype: what the verifier computed in, if `extract` ran it.
    """

    verifier: str
    revision: str | None
    architecture: str
    num_layers: int
    hidden_size: int
    aux_layer_ids: list[int]
    dtype: str | None = None
    tokenizer_fingerprint: str | None = None
    storage: Storage | None = "plain"
    format_version: int = FORMAT_VERSION
    chat_template_kwargs: dict[str, Any] | None = None
    rows: str | None = None
    verifier_dtype: str | None = None

    @classmethod
    def of(
        cls,
        verifier: str,
        config: PreTrainedConfig,
        aux_layer_ids: list[int],
        revision: str | None = None,
        dtype: str | None = None,
        storage: Storage | None = None,
        prepared: Mapping[str, Any] | None = None,
        verifier_dtype: str | None = None,
    ) -> "Manifest":
        """Describe the states of a verifier with this (text) configuration.

        Args:
            prepared: the record of the samples (see `prepared_dataset.read_prepare_record`).
        """
        prepared = prepared or {}
        return cls(
            verifier=verifier,
            revision=weights_of(verifier, revision) or revision,
            architecture=(config.architectures or [config.model_type])[0],
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            aux_layer_ids=list(aux_layer_ids),
            dtype=dtype,
            tokenizer_fingerprint=prepared.get("tokenizer_fingerprint"),
            storage=storage,
            chat_template_kwargs=prepared.get("chat_template_kwargs"),
            rows=prepared.get("rows_fingerprint"),
            verifier_dtype=verifier_dtype,
        )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Manifest | None":
        """Read a folder's manifest; None if it has none, as the folders that speculators writes.

        Raises:
            PeagleError: the file is damaged, or of a newer version.
        """
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        names = ", ".join(field.name for field in fields(cls))
        remedy = (
            f"A manifest of hidden states needs the fields {names}. Put the right file back, or remove the folder and "
            "run peagle-hf extract again."
        )
        content = resolve_relative_path(read_json(path, remedy), "verifier", folder)
        try:
            version = content.pop("format_version")
            if version > FORMAT_VERSION:
                raise PeagleError(
                    f"{path} has format version {version}, newer than the {FORMAT_VERSION} that this peagle_hf reads. "
                    "Update peagle_hf."
                )
            manifest = cls(**content)
            numbers = [manifest.num_layers, manifest.hidden_size, *manifest.aux_layer_ids]
            are_right = isinstance(manifest.verifier, str) and isinstance(manifest.revision, str | None)
            if (
                not are_right
                or not all(type(number) is int for number in numbers)
                or manifest.storage not in (None, *STORAGES)
            ):
                raise TypeError("a field has a value of the wrong kind")
        except (KeyError, TypeError) as error:
            raise PeagleError(f"{path} is not a manifest of hidden states ({error}). {remedy}") from error
        return manifest

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write it into the folder, atomically."""
        write_json(Path(folder) / MANIFEST, add_relative_path(asdict(self), "verifier", folder))

    def bytes_of(self, num_tokens: int, num_last: int) -> int:
        """Bytes of the tensors of `num_tokens` tokens, if the last layer's states of `num_last` of them are stored."""
        is_fp8, is_learnt = self.storage in FP8_STORAGES, self.storage in LEARNT_STORAGES
        size = 1 if is_fp8 else getattr(torch, self.dtype or "bfloat16").itemsize
        a_token = torch.int64.itemsize + torch.float32.itemsize * is_fp8 + is_learnt
        return num_tokens * (len(self.aux_layer_ids) * self.hidden_size * size + a_token) + (
            num_last * self.hidden_size * size
        )

    def check(self, wanted: "Manifest", folder: str | os.PathLike[str]) -> None:
        """Make sure that a folder's states are those that are wanted; unknown fields are not compared.

        Verifiers are compared by their weights, and by name or path only if the weights aren't known. The fingerprint
        of the prepared samples isn't compared: readers compare the tokens of each file.

        Raises:
            PeagleError: they differ; the message names both sides of every field that does.
        """
        same_weights = has_weights(self.revision, wanted.verifier, wanted.revision, self.verifier)
        skipped = {"rows", "format_version", "revision", *({"verifier"} if same_weights is not None else ())}
        pairs = [(one.name, getattr(self, one.name), getattr(wanted, one.name)) for one in fields(self)]
        differing = [
            f"{name} is {here!r}, wanted is {there!r}"
            for name, here, there in pairs
            if name not in skipped
            and here is not None
            and there is not None
            and canonical_path(here) != canonical_path(there)
        ]
        if same_weights is False:
            differing.insert(0, f"revision is {self.revision!r}, wanted is {wanted.revision!r}")
        if not differing:
            return
        changed = ""
        if same_weights is False:
            changed = (
                f"They were made by {self.verifier}, and {wanted.verifier} has other weights or another configuration: "
                "it was changed since (trained further, or saved anew in another dtype), or is another verifier. "
            )
        elif same_weights is None:
            changed = (
                "The weights of the two can't be compared, since not all of them are on this machine. If they are the "
                f"same, write the new name as verifier into {Path(folder) / MANIFEST}. "
            )
        raise PeagleError(
            f"The hidden states in {folder} don't fit: {'; '.join(differing)}. {changed}Name the folder with the "
            "states that are wanted, or another one for peagle-hf extract to fill. Another revision of the hub is "
            "named with --revision, in training with --verifier-revision."
        )


def origin_of(manifest: Manifest | None) -> str | None:
    """The weights and layers that each file of a folder names in its metadata; None if the weights aren't known.

    Readers compare it, so a file that was copied from another folder is noticed.
    """
    if manifest is None or manifest.revision is None:
        return None
    return f"{manifest.revision} layers {' '.join(map(str, manifest.aux_layer_ids))}"


def check_cache(
    folder: str | os.PathLike[str],
    verifier: str,
    config: PreTrainedConfig,
    aux_layer_ids: list[int],
    revision: str | None = None,
) -> None:
    """Make sure that a folder's states are of this verifier and these layers, if it has a manifest.

    Raises:
        PeagleError: they are of another verifier or other layers.
    """
    manifest = Manifest.read(folder)
    if manifest is not None:
        manifest.check(Manifest.of(verifier, config, aux_layer_ids, revision), folder)


def check_folder(output: Path, manifest: Manifest, present: set[int]) -> None:
    """Make sure that states of this manifest may be added to a folder.

    Args:
        present: rows of the samples that have a file.

    Raises:
        PeagleError: the folder holds states of another kind, or files without a manifest.
    """
    existing = Manifest.read(output)
    if existing is not None:
        existing.check(manifest, output)
    elif present:
        raise PeagleError(
            f"{output} holds hidden states without a manifest, so which verifier and layers they are of isn't known "
            "and more can't be added. Train with them as they are, or name another --output."
        )
