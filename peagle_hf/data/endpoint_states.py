"""Hidden states from vLLM servers: requested over HTTP, received as files in a folder that both sides see.

Shape letters: T tokens, L layers (the auxiliary ones and the last), H the verifier's hidden size.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import PeagleError
from .cache_storage import STATES_FILE, all_finite
from .endpoint import (
    MAX_RETRIES,
    REQUEST_TIMEOUT,
    Server,
    ask_any,
    check_requests,
    credentials_of,
    endpoint_urls,
    remember_credentials,
)
from .endpoint_folder import OwnRequests, check_layers, written
from .errors import EndpointError, RefusedEndpointError, WrongServerEndpointError


@dataclass(frozen=True)
class Endpoint:
    """vLLM servers that extract hidden states of one verifier; any of them can answer any request.

    It only describes the servers, so that it can be sent to loader workers: each process opens its own connections.

    Args:
        urls: one or more, with or without `/v1`.
        folder: the folder that the servers write to, as it is seen from here. Files elsewhere are never read.
        layer_ids: the layers wanted, by number of layers passed: the auxiliary ones, then the last.
        hidden_size: H.
        request_timeout: seconds to wait for an answer, and again for the file to be written.
        max_retries: how often a request that fails is repeated at each server.
    """

    urls: tuple[str, ...]
    folder: Path
    layer_ids: tuple[int, ...]
    hidden_size: int
    request_timeout: float = REQUEST_TIMEOUT
    max_retries: int = MAX_RETRIES

    def __post_init__(self) -> None:
        check_requests(self.request_timeout, self.max_retries)
        object.__setattr__(self, "urls", endpoint_urls(",".join(self.urls)))

    def __getstate__(self) -> dict[str, Any]:
        """Include the credentials, which loader workers need too."""
        return vars(self) | {"credentials": credentials_of(self.urls)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        remember_credentials(state.pop("credentials"))
        vars(self).update(state)

    def fetch(self, token_ids: list[int], dtype: torch.dtype) -> Tensor:
        """The checked states [T, L, H] of a sample, from the healthiest server; the server's files are removed.

        Raises:
            EndpointError: no server gave states that can be used.
        """
        return ask_any(
            self.urls, self.request_timeout, self.max_retries, lambda server: self._fetch(server, token_ids, dtype)
        )

    def _fetch(self, server: Server, token_ids: list[int], dtype: torch.dtype) -> Tensor:
        """Ask one server and read its file; errors get advice on what to do."""
        try:
            with _own_requests(self.folder, os.getpid()).request() as request:
                return self._read(server.ask(token_ids, request), token_ids, dtype)
        except RefusedEndpointError as error:
            raise RefusedEndpointError(
                error.reason,
                "if the sample is too long for the server, start it with a larger --max-model-len, or cut the samples "
                "with peagle-hf prepare --seq-length",
            ) from error
        except EndpointError:
            raise
        # The error is about the folder or about what the server's record says.
        except PeagleError as error:
            raise WrongServerEndpointError(str(error).removesuffix(".")) from error
        except OSError as error:
            raise EndpointError(
                f"the folder {self.folder} can't be used ({error})",
                "look whether its disk is full or gone, and whether server and client may both write there",
            ) from error

    def _read(self, path: str, token_ids: list[int], dtype: torch.dtype) -> Tensor:
        """Read, check and remove the file that a server reports to have written."""
        try:
            real = Path(os.path.realpath(path))
            inside = real.is_relative_to(os.path.realpath(self.folder))
        except ValueError:  # the text can't be a path
            inside = False
        if not inside or real.suffix != ".safetensors" or STATES_FILE.fullmatch(real.name):
            raise WrongServerEndpointError(
                f"the server says that it wrote the hidden states to {path!r}, which is no file of a server in "
                f"{self.folder}; it was not read",
                f"start the server with --hidden-states-path {self.folder}, or name the folder that it writes to with "
                "--server-hidden-states-path",
            )
        with written(real, self.request_timeout) as is_written:
            if not is_written:
                raise EndpointError(
                    f"the server was still writing after {self.request_timeout:g} s",
                    f"raise --request-timeout, or look at the disk of {self.folder}",
                )
            try:
                check_layers(self.folder, self.layer_ids)
                return self._states(load_file(real), token_ids, dtype)
            except (OSError, SafetensorError) as error:
                raise EndpointError(
                    f"what the server wrote can't be read ({' '.join(str(error).split())})",
                    f"look whether the disk of {self.folder} is full, and at the server's log",
                ) from error
            finally:
                self._remove(real)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise WrongServerEndpointError(
                f"the server's file {path} can't be removed ({error.strerror}), so that such files would fill the disk",
                "run server and client as one user",
            ) from error

    def _states(self, tensors: dict[str, Tensor], token_ids: list[int], dtype: torch.dtype) -> Tensor:
        """The states [T, L, H] in a server's file, after checks of layers, tokens and values."""
        lacking = {"hidden_states", "token_ids"} - tensors.keys()
        if lacking:
            raise EndpointError(
                f"what the server wrote has no {' and no '.join(sorted(lacking))}",
                "start it with peagle-hf launch-vllm, and with a vLLM that peagle-hf supports",
            )
        states = tensors["hidden_states"]
        # vLLM returns each layer once, in ascending order.
        served = sorted(set(self.layer_ids))
        if list(states.shape[1:]) != [len(served), self.hidden_size] or not states.is_floating_point():
            raise WrongServerEndpointError(
                f"the server gives {states.dtype} states of the shape {list(states.shape)} (tokens, layers, size), "
                f"wanted are the layers {served} of size {self.hidden_size}",
                "start it with peagle-hf launch-vllm, the same model and --target-layer-ids "
                f"{' '.join(map(str, self.layer_ids[:-1]))}",
            )
        if not torch.equal(tensors["token_ids"].long(), torch.tensor(token_ids)) or len(states) != len(token_ids):
            raise EndpointError(
                "the server gave the states of other tokens than it was asked for",
                "start it without flags that change prompts",
            )
        states = states.index_select(1, torch.tensor([served.index(layer) for layer in self.layer_ids])).to(dtype)
        if not all_finite(states):
            raise EndpointError(f"the server's states are not finite as {dtype}", "start it with --dtype float32")
        return states


@cache
def _own_requests(folder: Path, process_id: int) -> OwnRequests:
    """One `OwnRequests` for each folder and process: a forked process has its own."""
    return OwnRequests(folder)
