"""A vLLM server as the verifier: it is asked over HTTP and answers through files in a folder that both sides see.

Shape letters: T tokens, S slots (the auxiliary layers and the last), H the verifier's hidden size.
"""

import base64
import fcntl
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import PeagleError
from ..files import write_json
from ..redaction import public_url
from .cache import ROW_FILE, place

SERVER_RECORD = "server.json"
"""In the server's folder: its model and layers, as `peagle-hf launch-vllm` started it."""
DEFAULT_URL = "http://localhost:8000/v1"
REQUEST_TIMEOUT, MAX_RETRIES = 120.0, 3
LEFTOVER_SECONDS = 600.0
"""Nothing that is being written is older, nor an answer that is still to be fetched."""
LOCK_POLL_SECONDS = 0.01
PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Fields of a request which the model's own generation_config.json would change, as it does on servers."""
_CHOICE = threading.Lock()
"""Held while a server is chosen."""
_CREDENTIALS: dict[str, str] = {}
"""`user:password` by the URL that they were given with, which is kept without them."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class EndpointError(PeagleError):
    """One row's states that were not to be had; the message is the reason."""


class RefusedEndpointError(EndpointError):
    """The servers refuse this request, and would refuse it again: HTTP status 400, 413 or 422."""


@dataclass(frozen=True)
class Endpoint:
    """vLLM servers that give the hidden states of token ids, any of them the same.

    A frozen description, so that loader workers can have it; connections are opened by the process that uses them.

    Args:
        urls: one or more, with or without `/v1`.
        folder: what the servers write to, as it is seen from here. No other file is ever read.
        slots: the layers wanted, by number of layers passed: the auxiliary ones, then the last.
        hidden_size: H.
        request_timeout: seconds for an answer, and again for the file to be written.
        max_retries: of a request that fails, by each server.
    """

    urls: tuple[str, ...]
    folder: Path
    slots: tuple[int, ...]
    hidden_size: int
    request_timeout: float = REQUEST_TIMEOUT
    max_retries: int = MAX_RETRIES

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", endpoint_urls(",".join(self.urls)))

    def __getstate__(self) -> dict[str, Any]:
        """Loader workers need the credentials too."""
        return vars(self) | {"credentials": {url: _CREDENTIALS[url] for url in self.urls if url in _CREDENTIALS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _remember(state.pop("credentials"))
        vars(self).update(state)

    def fetch(self, token_ids: list[int], dtype: torch.dtype) -> Tensor:
        """The states [T, S, H] of a document, checked, from the server that is doing best; its files are removed.

        Raises:
            EndpointError: no server gave states that can be used.
            PeagleError: a server is not what was asked for: another folder, other layers or another model.
        """
        return ask_any(
            self.urls,
            self.request_timeout,
            self.max_retries,
            lambda server: self._read(server.ask(token_ids), token_ids, dtype),
        )

    def _read(self, path: str, token_ids: list[int], dtype: torch.dtype) -> Tensor:
        """Read, check and remove a file that a server says it has written."""
        real = Path(os.path.realpath(path))
        inside = real.is_relative_to(os.path.realpath(self.folder))
        if not inside or real.suffix != ".safetensors" or ROW_FILE.fullmatch(real.name):
            raise PeagleError(
                f"The server says that it wrote the hidden states to {path}, which is no file of a server in "
                f"{self.folder}; it was not read. Start the server with --hidden-states-path {self.folder}, or name "
                "the folder that it writes to with --server-hidden-states-path."
            )
        lock = Path(f"{real}.lock")
        with _shared_lock(lock, self.request_timeout):
            try:
                check_layers(self.folder, self.slots)
                return self._states(load_file(real), token_ids, dtype)
            except (OSError, SafetensorError) as error:
                raise EndpointError(f"what the server wrote can't be read ({error})") from error
            finally:
                real.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)

    def _states(self, tensors: dict[str, Tensor], token_ids: list[int], dtype: torch.dtype) -> Tensor:
        lacking = {"hidden_states", "token_ids"} - tensors.keys()
        if lacking:
            raise EndpointError(f"what the server wrote has no {' and no '.join(sorted(lacking))}")
        states = tensors["hidden_states"]
        served = sorted(set(self.slots))  # vLLM gives the layers in their own order, each once
        if list(states.shape[1:]) != [len(served), self.hidden_size] or not states.is_floating_point():
            raise PeagleError(
                f"The server gives {states.dtype} states of the shape {list(states.shape)} (tokens, layers, size), "
                f"wanted are the layers {served} of size {self.hidden_size}. Start it with peagle-hf launch-vllm, the "
                f"same model and --target-layer-ids {' '.join(map(str, self.slots[:-1]))}."
            )
        if not torch.equal(tensors["token_ids"].long(), torch.tensor(token_ids)) or len(states) != len(token_ids):
            raise EndpointError("the server gave the states of other tokens than it was asked for")
        states = states[:, [served.index(slot) for slot in self.slots]].to(dtype)
        if not states.isfinite().all():
            raise EndpointError(f"the server's states are not finite as {dtype}")
        return states


def ask_any(
    urls: Sequence[str], request_timeout: float, max_retries: int, request: Callable[["Server"], Result]
) -> Result:
    """What the server that is doing best gives, or another one if that fails.

    Best is the one that failed the fewest requests since it last answered, and of several the least busy one.

    Raises:
        EndpointError: all of them failed. It is a `RefusedEndpointError` if all of them refused the request.
    """
    failures: dict[str, EndpointError] = {}
    while len(failures) < len(urls):
        with _CHOICE:
            servers = [_server(url, request_timeout, max_retries, os.getpid()) for url in urls if url not in failures]
            server = min(servers, key=lambda server: (server.failures, server.in_flight))
            server.in_flight += 1
        try:
            result = request(server)
            server.failures = 0
            return result
        except EndpointError as error:
            if not isinstance(error, RefusedEndpointError):
                server.failures += 1
            failures[server.url] = error
        finally:
            with _CHOICE:
                server.in_flight -= 1
    kind = RefusedEndpointError if all(isinstance(one, RefusedEndpointError) for one in failures.values()) else None
    raise (kind or EndpointError)("; ".join(f"{url}: {error}" for url, error in failures.items()))


def endpoint_urls(endpoint: str) -> tuple[str, ...]:
    """Split `URL[,URL...]`; a URL without a path gets vLLM's `/v1`.

    User names and passwords are taken out of the URLs, so that they reach no file or message. From then on this process
    sends them as HTTP basic authentication.

    Raises:
        PeagleError: something in there is no HTTP address.
    """
    urls = []
    for url in re.split(r",\s*(?=https?://)", endpoint.strip()):
        public = public_url(url)
        try:
            parts = urlsplit(public)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is no number, or too large
            is_address = False
        if not is_address or re.search(r"[\s,?#]", public.strip()):
            raise PeagleError(
                f"The endpoint {public!r} is no HTTP address. Write it as {DEFAULT_URL}, several with commas between."
            )
        public = public.strip().rstrip("/")
        public = public if "/" in public.partition("://")[2] else f"{public}/v1"
        user_info = url.partition("://")[2].rpartition("@")[0]
        if user_info:
            _remember({public: unquote(user_info)})
        urls.append(public)
    return tuple(dict.fromkeys(urls))


def served_model(
    urls: tuple[str, ...],
    wanted: str | None = None,
    timeout: float = REQUEST_TIMEOUT,
    command: str = "peagle-hf launch-vllm",
) -> str:
    """Ask every server which model it runs, and make sure that it is the one that is wanted.

    Args:
        wanted: hub name or folder; None takes whatever the servers run.
        command: starts such a server, for messages.

    Returns:
        `wanted`, or the name of what they run.

    Raises:
        PeagleError: a server can't be reached or runs another model.
    """
    for url in urls:
        try:
            found = Server(url, timeout, max_retries=1).model
        except EndpointError as error:
            raise PeagleError(
                f"The vLLM server {url} can't be asked for its model: {error}. Start one ({command}) and wait until it "
                "is ready, or correct the endpoint."
            ) from error
        wanted = wanted or found["root"]
        if place(wanted) not in {place(name) for name in found.values()}:
            raise PeagleError(
                f"The vLLM server {url} runs {found['root']}, wanted is {wanted}. Start it with that model, or name "
                "the right endpoint. (A model that is merely called otherwise there can be given its name here with "
                "vLLM's --served-model-name.)"
            )
    assert wanted is not None
    return wanted


def write_server_record(folder: str | os.PathLike[str], model: str, slots: list[int]) -> None:
    """Say in the server's folder what it extracts: the auxiliary layers, then the last."""
    write_json(Path(folder) / SERVER_RECORD, {"model": model, "layer_ids": slots})


def served_layers(folder: str | os.PathLike[str]) -> list[int] | None:
    """The layers that the folder's server was started with, the last one at the end; None if that isn't known."""
    try:
        return list(json.loads((Path(folder) / SERVER_RECORD).read_text(encoding="utf-8"))["layer_ids"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise PeagleError(
            f"{Path(folder) / SERVER_RECORD} is damaged ({error}). Start the server again with peagle-hf launch-vllm."
        ) from error


def check_layers(folder: str | os.PathLike[str], slots: tuple[int, ...]) -> None:
    """Make sure that the folder's server was started with these layers, as far as is known.

    Raises:
        PeagleError: it was started with others.
    """
    served = served_layers(folder)
    if served is not None and set(served) != set(slots):
        raise PeagleError(
            f"The server of {folder} extracts the layers {served}, wanted are {list(slots)} (the last one included). "
            f"Start it with --target-layer-ids {' '.join(map(str, slots[:-1]))}, or pass its layers here. Servers with "
            "different layers need a folder each."
        )


def check_length(urls: tuple[str, ...], longest: int, timeout: float) -> None:
    """Make sure that every server takes a row of `longest` tokens.

    Raises:
        PeagleError: one doesn't, or can't be asked.
    """
    for url in urls:
        limit = Server(url, timeout, max_retries=1).max_model_len
        if limit is not None and longest >= limit:  # one token is the answer's
            raise PeagleError(
                f"The longest row has {longest} tokens, and the vLLM server {url} takes {limit - 1} at most. Start it "
                f"with --max-model-len {longest + 1}, or cut the rows with peagle-hf prepare --seq-length {limit - 1}."
            )


def remove_unfetched(folder: str | os.PathLike[str], request_timeout: float) -> None:
    """Remove what killed programs left there a while ago: half-written rows, and answers not fetched."""
    age = max(LEFTOVER_SECONDS, 2 * request_timeout)
    for temporary in Path(folder).glob(".hs_*.tmp"):
        if _age(temporary) > age:
            temporary.unlink(missing_ok=True)
    for lock in Path(folder).glob("*.safetensors.lock"):
        answer = lock.with_suffix("")
        if not ROW_FILE.fullmatch(answer.name) and _age(lock) > age:
            answer.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def concurrently(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[tuple[Item, Result | BaseException]]:
    """Results, or the exceptions in their place, in the order in which they come.

    The threads are daemons: who is interrupted, or has seen enough, need not wait for a server that hangs.
    """
    end = object()
    source, turn, stopped = iter(items), threading.Lock(), threading.Event()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with turn:
                item = next(source, end)
            if item is end:
                break
            try:
                results.put((item, function(item)))  # type: ignore[arg-type]
            except BaseException as error:
                results.put((item, error))
        results.put(end)

    for _ in range(num_threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        working = num_threads
        while working:
            result = results.get()
            if result is end:
                working -= 1
            else:
                yield result
    finally:
        stopped.set()


class Server:
    """One server, as this process sees it: how often it failed since it last answered, and what it is busy with."""

    def __init__(self, url: str, timeout: float, max_retries: int):
        try:
            import openai
        except ImportError as error:
            raise PeagleError(
                "Asking a vLLM server takes the openai package. Install it with pip install 'peagle-hf[endpoint]'."
            ) from error
        self.errors = (openai.OpenAIError, json.JSONDecodeError)
        (self.url,) = endpoint_urls(url)
        credentials = _CREDENTIALS.get(self.url)
        headers = {"Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"} if credentials else None
        self.client = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("VLLM_API_KEY", "none"),
            timeout=timeout,
            max_retries=max_retries,
            default_headers=headers,
        )
        self.failures = self.in_flight = 0

    @cached_property
    def _card(self) -> Any:
        """What it says of its model."""
        with self.reasons():
            models = self.client.models.list().data
        if not models:
            raise EndpointError("it serves no model")
        return models[0]

    @property
    def model(self) -> dict[str, str]:
        """What the model is called there (`id`), and the folder or hub name that it was loaded from (`root`)."""
        return {"id": self._card.id, "root": getattr(self._card, "root", None) or self._card.id}

    @property
    def max_model_len(self) -> int | None:
        """Tokens that a prompt and its answer may have together, if it says so."""
        return getattr(self._card, "max_model_len", None)

    def ask(self, token_ids: list[int]) -> str:
        """Send a document through the model; gives the path where its states are or will be."""
        with self.reasons():
            answer = self.client.completions.create(
                model=self.model["id"], prompt=token_ids, max_tokens=1, temperature=0
            )
        path = (getattr(answer, "kv_transfer_params", None) or {}).get("hidden_states_path")
        if not isinstance(path, str):
            raise PeagleError(
                f"The vLLM server {self.url} answers, but extracts no hidden states. Start it with peagle-hf "
                "launch-vllm."
            )
        return path

    def complete(self, token_ids: list[int], max_tokens: int, end_ids: set[int], fields: dict[str, Any]) -> list[int]:
        """What the model writes after a prompt, up to and with the first of `end_ids`.

        Args:
            fields: more of vLLM's request, such as `temperature`.

        Raises:
            PeagleError: it extracts hidden states too, which nobody would fetch.
        """
        with self.reasons():
            answer = self.client.completions.create(
                model=self.model["id"],
                prompt=token_ids,
                max_tokens=max_tokens,
                extra_body={
                    **PLAIN_SAMPLING,
                    "ignore_eos": True,  # which of its end ids a server knows depends on how it was started
                    "stop_token_ids": sorted(end_ids),
                    "return_token_ids": True,
                    **fields,
                },
            )
        if getattr(answer, "kv_transfer_params", None):
            raise PeagleError(
                f"The vLLM server {self.url} writes the hidden states of every prompt to its disk, where they would "
                "stay. Start another without that, such as vllm serve MODEL."
            )
        written: list[int] | None = getattr(answer.choices[0], "token_ids", None) if answer.choices else None
        if not written:
            raise EndpointError("it gives no token ids with its answer, as vLLM 0.11 and later do")
        if written[-1] not in end_ids and len(written) < max_tokens:
            raise EndpointError(f"it cut the answer after {len(written)} of {max_tokens} tokens")
        return written

    @contextmanager
    def reasons(self) -> Iterator[None]:
        """Turn whatever goes wrong with a request into an `EndpointError` that says what."""
        try:
            yield
        except self.errors as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            is_refusal = getattr(error, "status_code", None) in (400, 413, 422)
            kind = RefusedEndpointError if is_refusal else EndpointError
            raise kind(f"{' '.join(str(error).split()).rstrip('.')}{cause}") from error


def _remember(credentials: dict[str, str]) -> None:
    """Use these credentials by URL from now on."""
    if any(_CREDENTIALS.get(url) != one for url, one in credentials.items()):
        _CREDENTIALS.update(credentials)
        _server.cache_clear()


@cache
def _server(url: str, timeout: float, max_retries: int, process_id: int) -> Server:
    """The connections of this process; a forked one opens its own."""
    return Server(url, timeout, max_retries)


@contextmanager
def _shared_lock(lock: Path, timeout: float) -> Iterator[None]:
    """Wait until the server has written: it holds the lock until then, and the kernel lets go of it if it dies."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:  # a server that was told to lock nothing
        yield
        return
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EndpointError(f"the server was still writing after {timeout:g} s") from None
                time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
