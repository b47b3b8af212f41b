"""Reading single tensors of a verifier's checkpoint, found by the module that they belong to."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..errors import PeagleError
from .quantization import check_decompressible, dense_weight

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WRAPPERS = {"model", "language_model", "text_model"}
"""Parts of a parameter's name that a checkpoint may have in another order, omit or add."""
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError)
_OF_ITS_CODE = (AttributeError, TypeError)
"""Errors of an architecture's code where config.json lacks a field, or where code in the repository is too old."""


class VerifierWeights:
    """The safetensors of a local or hub model, read one tensor at a time.

    Args:
        file_of_key: the name of the file of each tensor, by the tensor's key; default: read from the model's files.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike[str],
        revision: str | None,
        model: PreTrainedModel,
        dtype: torch.dtype | None,
        file_of_key: dict[str, str] | None = None,
    ):
        self.name_or_path, self.revision, self.model, self.dtype = name_or_path, revision, model, dtype
        self.module_names = {module: name for name, module in model.named_modules()}
        self.wrappers = WRAPPERS | {model.base_model_prefix}
        self.file_of_key = self._keys() if file_of_key is None else file_of_key
        renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
        self.names_of_key = {key: {key, rename_source_key(key, renamings, [])[0]} for key in self.file_of_key}

    def _keys(self) -> dict[str, str]:
        with readable(self.name_or_path):
            try:
                return _keys_of_file(self._path(SAFE_WEIGHTS_NAME))
            except OSError:
                return _keys_of_index(self._path(SAFE_WEIGHTS_INDEX_NAME))

    def _path(self, file: str) -> str:
        return str(cached_file(self.name_or_path, file, revision=self.revision))

    def of(self, module: nn.Module) -> dict[str, str]:
        """The checkpoint's keys of a module's tensors, by their last part; quantised modules have several tensors.

        transformers renames what some architectures call otherwise in the checkpoint, such as GPT-NeoX's `embed_out`.
        Beyond that, names may differ from the module's name only in `WRAPPERS`; the one that differs least is taken. So
        "language_model.model.norm.weight" in the file is "model.language_model.norm.weight" in the model.
        """
        parts = self.module_names[module].split(".")
        found: dict[str, dict[str, str]] = {}
        for key, name in ((key, name) for key, names in self.names_of_key.items() for name in names):
            prefix, _, last = name.rpartition(".")
            if prefix.rpartition(".")[2] == parts[-1]:
                found.setdefault(prefix, {})[last] = key
        differences = {prefix: set(prefix.split(".")) ^ set(parts) for prefix in found}
        sizes = {prefix: len(one) for prefix, one in differences.items() if one <= self.wrappers}
        nearest = [prefix for prefix, size in sizes.items() if size == min(sizes.values())]
        exact = ".".join(parts)
        return found[exact] if exact in found else found[nearest[0]] if len(nearest) == 1 else {}

    def read(self, module: nn.Module, parameter: str) -> Tensor:
        """Read a module's parameter from the checkpoint as a dense tensor; the module itself isn't changed.

        Raises:
            PeagleError: the checkpoint has no such tensor, or one of another shape.
        """
        name = f"{self.module_names[module]}.{parameter}"
        shape = tuple(module.get_parameter(parameter).shape)
        keys = self.of(module)
        tensor = self._tensor(keys[parameter]) if parameter in keys else None
        if parameter == "weight" and keys and (tensor is None or tensor.dtype not in DENSE_DTYPES):
            tensors = {last: self._tensor(key) for last, key in keys.items()}
            tensor = dense_weight(self.name_or_path, self.model, module, tensors)
        if tensor is None:
            raise self._lacking(name)
        if tuple(tensor.shape) != shape:
            raise PeagleError(
                f"{keys.get(parameter, name)} of {self.name_or_path} has the shape {tuple(tensor.shape)}, but by its "
                f"config.json it should have {shape}. Put the configuration and the weights of one model together."
            )
        return tensor.to(self.dtype)

    def check(self, module: nn.Module) -> None:
        """Make sure that `read` will be able to read a module's weight, by the names of its tensors alone.

        Raises:
            PeagleError: there is no such tensor, or a quantised one that can't be made dense.
        """
        path, keys = self.module_names[module], self.of(module)
        if not keys:
            raise self._lacking(f"{path}.weight")
        # bitsandbytes puts what belongs to a weight below its name.
        below = [key for key in self.file_of_key if key.startswith(f"{keys.get('weight')}.")]
        if below or keys.keys() - {"weight", "bias"}:
            check_decompressible(self.name_or_path, self.model, path, keys)

    def _lacking(self, name: str) -> PeagleError:
        return PeagleError(
            f"The safetensors of {self.name_or_path} have no tensor that is clearly {name} of "
            f"{type(self.model).__name__}, which transformers makes of its config.json. Save the verifier again as "
            "this class, with save_pretrained."
        )

    def _tensor(self, key: str) -> Tensor:
        with readable(self.name_or_path), safe_open(self._path(self.file_of_key[key]), framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor


def _keys_of_file(path: str) -> dict[str, str]:
    with safe_open(path, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), SAFE_WEIGHTS_NAME)


def _keys_of_index(path: str) -> dict[str, str]:
    with open(path, encoding="utf-8") as index:
        content = json.load(index)
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise ValueError(f"{path} has no weight_map.")
    return dict(content["weight_map"])


def known_keys(name_or_path: str | os.PathLike[str], revision: str | None) -> dict[str, str] | None:
    """The name of the file of each tensor, by its key, as far as it is known without downloading any weights.

    Of a model of the hub only its index is downloaded, or the header of its only file; None where that isn't to be had.
    """
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    with readable(name_or_path):
        if file := cached_file(name_or_path, SAFE_WEIGHTS_NAME, revision=revision, local_files_only=True, **quiet):
            return _keys_of_file(file)
        for local in (True, False):  # without a network the hub is asked in vain for half a minute
            index = cached_file(
                name_or_path, SAFE_WEIGHTS_INDEX_NAME, revision=revision, local_files_only=local, **quiet
            )
            if index is not None:
                return _keys_of_index(index)
    if os.path.isdir(name_or_path):
        return None
    try:
        header = HfApi().parse_safetensors_file_metadata(str(name_or_path), SAFE_WEIGHTS_NAME, revision=revision)
    except Exception:  # of the network or the hub, which loading the verifier will explain
        return None
    return dict.fromkeys(header.tensors, SAFE_WEIGHTS_NAME)


@contextmanager
def readable(name_or_path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of reading a verifier within the block into a `PeagleError` that names it."""
    try:
        yield
    except PeagleError:
        raise
    except (*_UNREADABLE, *_OF_ITS_CODE) as error:
        reason = f"{type(error).__name__}: {error}." if isinstance(error, _OF_ITS_CODE) else error
        raise PeagleError(
            f"The verifier {name_or_path} can't be read: {reason} Name a folder that holds config.json and "
            "safetensors, or a model of the hub that this machine can reach or has in its cache."
        ) from error
