"""Asking vLLM servers over HTTP: addresses and credentials, choice of the server, retries, and what errors mean.

`ask_any` chooses a server and `Server` sends the requests. `endpoint_states` fetches hidden states on top of this.
"""

import base64
import json
import math
import os
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import PeagleError
from ..files import canonical_path
from ..redaction import public_url
from .errors import EndpointError, RefusedEndpointError, WrongServerEndpointError

DEFAULT_URL = "http://localhost:8000/v1"
REQUEST_TIMEOUT, MAX_RETRIES = 120.0, 3
NO_TOKEN_IDS = "it gives no token ids with its answer, as vLLM 0.11 and later do"
REQUEST_TIMEOUT_HELP = "Seconds to wait for a server's answer, each time it is tried."
MAX_RETRIES_HELP = "How often a request is repeated that a server fails."
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between a server's failure and its health check; the pause doubles with each failure up to the longest."""
HEALTH_TIMEOUT = 5.0
PLAIN_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling fields to send with every request: otherwise a server applies the model's generation_config.json."""
IN_BODY = ""
"""Stands for a prompt that is in `extra_body`, which is sent as it is. Of others the openai package checks each token:
10 microseconds a token in which no other thread of this process runs."""
REFUSALS = (400, 413, 422)
"""HTTP statuses with which a server refuses a request for good: neither a retry nor another server would help."""
STATUS_ADVICE = {
    **dict.fromkeys((401, 403), "set VLLM_API_KEY to the server's key, or write user and password into the URL"),
    404: "name the address of vLLM itself, which ends with /v1, and make sure that it runs the verifier",
    429: "give the server time with a larger --max-retries, or fewer requests: a lower --concurrency, fewer "
    "--dataloader-num-workers",
    500: "look at the server's log for the cause, such as a full disk or too little memory, and start it again if its "
    "engine has ended",
    **dict.fromkeys((502, 503, 504), "wait until the server is ready, or start it again"),
}
"""What to do about an HTTP status, a clause."""
TLS_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": "name a file with the server's certificate in the variable SSL_CERT_FILE",
    "WRONG_VERSION_NUMBER": "write http:// in place of https://, which the server doesn't speak",
}
"""What to do about an error of OpenSSL, a clause."""
_CHOICE = threading.Lock()
"""Lock that is held while a server is chosen."""
_CREDENTIALS: dict[str, str] = {}
"""`user:password` by URL; the URLs themselves are kept without credentials."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def ask_any(
    urls: Sequence[str], request_timeout: float, max_retries: int, request: Callable[["Server"], Result]
) -> Result:
    """Send a request to the least busy healthy server; fall back to the others if it fails.

    A server that failed comes last until its pause is over and its health check succeeds, or until it answers a
    request.

    Args:
        request: sends the request to one server and returns its result.

    Raises:
        EndpointError: all servers failed; the error names their URLs. If all of them refused the request, it is a
            `RefusedEndpointError`.
        WrongServerEndpointError: a server isn't the one that is needed; the error names its URL.
    """
    failures: dict[str, EndpointError] = {}
    while len(failures) < len(urls):
        with _CHOICE:
            servers = [_server(url, request_timeout, max_retries, os.getpid()) for url in urls if url not in failures]
            for server in servers:
                server.check_health_when_due()
            server = min(servers, key=lambda server: (server.rests_in_turn * server.is_resting, server.in_flight))
            server.in_flight += 1
        try:
            result = request(server)
            server.succeeded()
            return result
        except WrongServerEndpointError as error:
            raise WrongServerEndpointError(error.reason, error.advice, server.url) from error
        except EndpointError as error:
            if not isinstance(error, RefusedEndpointError):
                server.failed()
            failures[server.url] = error
        finally:
            with _CHOICE:
                server.in_flight -= 1
    errors = failures.values()
    are_refusals = all(isinstance(error, RefusedEndpointError) for error in errors)
    reasons = [error.reason for error in errors]
    raise (RefusedEndpointError if are_refusals else EndpointError)(
        "; ".join(reasons if len(set(reasons)) > 1 else reasons[:1]),
        "; ".join(dict.fromkeys(error.advice for error in errors if error.advice)),
        ", ".join(failures),
    )


def endpoint_urls(endpoint: str) -> tuple[str, ...]:
    """Split `URL[,URL...]` and append vLLM's `/v1` to a URL without a path.

    User names and passwords are removed from the URLs, so that they reach no file or message. This process keeps them
    and sends them as HTTP basic authentication.

    Raises:
        PeagleError: a part is no HTTP address.
    """
    urls = []
    for url in re.split(r",\s*(?=https?://)", endpoint.strip()):
        public = public_url(url)
        try:
            parts = urlsplit(public)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is no number, or too large a number
            is_address = False
        if not is_address or re.search(r"[\s,?#]", public.strip()):
            raise PeagleError(
                f"The endpoint {public!r} is no HTTP address. Write it as {DEFAULT_URL}, several with commas between."
            )
        public = public.strip().rstrip("/")
        public = public if "/" in public.partition("://")[2] else f"{public}/v1"
        user_info = url.partition("://")[2].rpartition("@")[0]
        if user_info:
            remember_credentials({public: unquote(user_info)})
        urls.append(public)
    return tuple(dict.fromkeys(urls))


def check_requests(request_timeout: float, max_retries: int) -> None:
    """Check the settings of requests.

    Raises:
        PeagleError: one is out of range; the message names its flag.
    """
    if not 0 < request_timeout < math.inf:
        raise PeagleError(f"--request-timeout is {request_timeout} but must be a number of seconds above 0.")
    if max_retries < 0:
        raise PeagleError(f"--max-retries is {max_retries} but must be at least 0.")


def served_model(
    urls: tuple[str, ...],
    wanted: str | None = None,
    timeout: float = REQUEST_TIMEOUT,
    command: str = "peagle-hf launch-vllm",
) -> str:
    """Ask every server which model it runs, and make sure that all run the wanted one.

    Args:
        wanted: hub name or folder; None takes what the first server runs.
        command: starts such a server, for the error message.

    Returns:
        `wanted`, or the name of the model that the servers run.

    Raises:
        PeagleError: a server can't be reached or runs another model.
    """
    for url in urls:
        try:
            found = Server(url, timeout, max_retries=1).model
        except EndpointError as error:
            advice = error.advice or f"start one ({command}) and wait until it is ready, or correct the endpoint"
            raise PeagleError(
                f"The vLLM server {url} can't be asked for its model: {error.reason}. {advice[:1].upper()}{advice[1:]}."
            ) from error
        wanted = wanted or found["root"]
        if canonical_path(wanted) not in {canonical_path(name) for name in found.values()}:
            raise PeagleError(
                f"The vLLM server {url} runs {found['root']}, wanted is {wanted}. Start it with that model, or name "
                "the right endpoint. If it is the same model under another name, start the server with vLLM's "
                f"--served-model-name {shlex.quote(str(wanted))}."
            )
    assert wanted is not None
    return wanted


def check_length(urls: tuple[str, ...], longest: int, timeout: float) -> None:
    """Make sure that every server accepts a sample of `longest` tokens.

    Raises:
        PeagleError: a server doesn't, or can't be asked.
    """
    for url in urls:
        limit = Server(url, timeout, max_retries=1).max_model_len
        # One of the server's tokens is needed for the answer.
        if limit is not None and longest >= limit:
            raise PeagleError(
                f"The longest sample has {longest} tokens, and the vLLM server {url} takes {limit - 1} at most. Start "
                f"it with --max-model-len {longest + 1}, or cut the samples with peagle-hf prepare --seq-length "
                f"{limit - 1}."
            )


def concurrently(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[tuple[Item, Result | BaseException]]:
    """Call a function on items in several threads; yield each item with its result, or exception, as it is done.

    The threads are daemons, so that a program that is interrupted, or stops early, doesn't wait for a server that
    hangs.
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
    """Connections to one vLLM server from this process, with the server's health and load.

    Args:
        if_slow: what the user of this command can do when the server doesn't answer in time.

    Attributes:
        in_flight: requests that wait for an answer.
        is_resting: a request failed, and neither a request nor a health check has succeeded since.
        rests_in_turn: how often the server began to rest since its last answer.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        max_retries: int,
        if_slow: str = "raise --request-timeout if the server is only slow, or start it again if it hangs",
    ):
        try:
            import openai
        except ImportError as error:
            raise PeagleError(
                "Requests to a vLLM server need the openai package. Install it with pip install 'peagle-hf[endpoint]'."
            ) from error
        (self.url,) = endpoint_urls(url)
        credentials = _CREDENTIALS.get(self.url)
        headers = {"Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"} if credentials else None
        key = os.environ.get("VLLM_API_KEY", "").strip() or "none"
        if not (key.isascii() and key.isprintable()):  # the errors of other packages would show it
            raise PeagleError("VLLM_API_KEY holds a character that no key can have. Set it to the server's key.")
        try:
            self.client = openai.OpenAI(
                base_url=self.url,
                api_key=key,
                timeout=timeout,
                max_retries=max_retries,
                default_headers=headers,
            )
        except (ImportError, ValueError) as error:  # httpx reads the variables even if no_proxy names the server
            raise PeagleError(
                f"No request can be sent to {self.url}, because a proxy that the environment names can't be used: "
                f"{shorten(public_url(str(error)))}. Correct or unset all_proxy, http_proxy and https_proxy (also in "
                "capitals)."
            ) from error
        self.if_slow = if_slow
        self.in_flight = self.rests_in_turn = 0
        self.is_resting = False
        self._health_check_at = math.inf

    @cached_property
    def _card(self) -> tuple[str, str, int | None]:
        """Id, root and maximal length of the model that the server reports."""
        with self.reasons():
            models = self.client.models.list().data
            if not models:
                raise EndpointError("it serves no model", "start it with the verifier")
            model = models[0]
            limit = getattr(model, "max_model_len", None)
            root = getattr(model, "root", None) or model.id
            if not isinstance(model.id, str) or not isinstance(root, str) or not isinstance(limit, int | None):
                raise TypeError(f"the model {model!r}")
            return model.id, root, limit

    @property
    def model(self) -> dict[str, str]:
        """The model's name on the server (`id`), and the folder or hub name that it was loaded from (`root`)."""
        return {"id": self._card[0], "root": self._card[1]}

    @property
    def max_model_len(self) -> int | None:
        """Largest number of tokens of a prompt and its answer together; None if the server doesn't say."""
        return self._card[2]

    def ask(self, token_ids: list[int], request: str) -> str:
        """Send a sample's tokens through the model.

        Args:
            request: id of the request, which will be in the name of the file with the states.

        Returns:
            Path, on the server's machine, of the file that the states are written to.

        Raises:
            EndpointError: the request failed.
            WrongServerEndpointError: the server doesn't extract hidden states.
        """
        with self.reasons():
            answer = self.client.completions.create(
                model=self.model["id"],
                prompt=IN_BODY,
                max_tokens=1,
                temperature=0,
                extra_body={"prompt": token_ids},
                extra_headers={"X-Request-Id": request},
            )
            # Every answer of vLLM has at least one choice; an IndexError means that another program answered.
            answer.choices[0]
            parameters = getattr(answer, "kv_transfer_params", None) or {}
            path = parameters.get("hidden_states_path")
        if not isinstance(path, str):
            raise WrongServerEndpointError(
                "the server answers, but extracts no hidden states", "start it with peagle-hf launch-vllm"
            )
        return path

    def complete(self, token_ids: list[int], max_tokens: int, end_ids: set[int], fields: dict[str, Any]) -> list[int]:
        """The token ids that the model writes after a prompt, up to and including the first of `end_ids`.

        Args:
            fields: further fields of vLLM's request, such as `temperature`.

        Raises:
            EndpointError: the request failed, or the answer has no token ids or was cut off.
            PeagleError: the server extracts hidden states too, which nobody would fetch.
        """
        with self.reasons():
            answer = self.client.completions.create(
                model=self.model["id"],
                prompt=IN_BODY,
                max_tokens=max_tokens,
                extra_body={
                    "prompt": token_ids,
                    **PLAIN_SAMPLING,
                    # The server's own end ids depend on how it was started, so the request names them.
                    "ignore_eos": True,
                    "stop_token_ids": sorted(end_ids),
                    "return_token_ids": True,
                    **fields,
                },
            )
            completed: list[int] | None = getattr(answer.choices[0], "token_ids", None)
            if not isinstance(completed, list | None) or any(type(token) is not int for token in completed or []):
                raise TypeError(f"the token ids {completed!r}")
        if getattr(answer, "kv_transfer_params", None):
            raise PeagleError(
                f"The vLLM server {self.url} writes the hidden states of every prompt to its disk, where they would "
                "stay. Start another without that, such as vllm serve MODEL."
            )
        if not completed:
            raise EndpointError(NO_TOKEN_IDS)
        if completed[-1] not in end_ids and len(completed) < max_tokens:
            raise EndpointError(f"it cut the answer after {len(completed)} of {max_tokens} tokens")
        return completed

    @contextmanager
    def reasons(self) -> Iterator[None]:
        """Turn the errors of a request, or of reading its answer, into an `EndpointError` with reason and advice.

        Only a request and the reading of its answer belong into the block: an error about a type or a missing field
        within it is reported as an error of the server's answer.
        """
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            kind = RefusedEndpointError if error.status_code in REFUSALS else EndpointError
            raise kind(shorten(str(error)), self._advice(STATUS_ADVICE.get(error.status_code, ""))) from error
        except UnicodeEncodeError as error:
            raise RefusedEndpointError(f"the text has characters that can't be sent ({error.reason})") from error
        except openai.OpenAIError as error:
            cause = f" ({shorten(str(error.__cause__))})" if error.__cause__ else ""
            of_tls = (advice for name, advice in TLS_ADVICE.items() if name in cause)
            advice = next(of_tls, "start the server again, or correct its address")
            if isinstance(error, openai.APITimeoutError):
                advice = self.if_slow
            raise EndpointError(f"{shorten(str(error))}{cause}", self._advice(advice)) from error
        except (json.JSONDecodeError, AttributeError, IndexError, KeyError, TypeError) as error:
            raise EndpointError(
                "its answer isn't one of vLLM's: another program may answer at this address, such as a proxy with a "
                "web page",
                self._advice("name the address of vLLM itself"),
            ) from error

    def _advice(self, advice: str) -> str:
        """The advice, and which proxy requests to this server go through, which may be what failed."""
        address, proxies = urlsplit(self.url), getproxies()
        name = next((name for name in (address.scheme, "all") if name in proxies), None)
        if name is None or proxy_bypass(address.netloc):
            return advice
        proxy = (
            f"{name}_proxy sends requests through the proxy {public_url(proxies[name])}: if that is wrong, add "
            f"{address.hostname} to no_proxy"
        )
        return f"{advice}; {proxy}" if advice else proxy

    def succeeded(self) -> None:
        self.rests_in_turn, self.is_resting = 0, False

    def failed(self) -> None:
        # If it rests already, this request was sent together with one that failed, and must not lengthen the rest.
        if not self.is_resting:
            self._rest()

    def _rest(self) -> None:
        self._health_check_at = time.monotonic() + min(FIRST_PAUSE * 2.0**self.rests_in_turn, LONGEST_PAUSE)
        self.rests_in_turn += 1
        self.is_resting = True

    def check_health_when_due(self) -> None:
        """Check a resting server's health in the background, if its pause is over."""
        if self.is_resting and time.monotonic() >= self._health_check_at:
            self._health_check_at = math.inf
            threading.Thread(target=self._check_health, daemon=True).start()

    def _check_health(self) -> None:
        import openai

        try:
            client = self.client.with_options(timeout=HEALTH_TIMEOUT, max_retries=0)
            # A proxy may answer without this page of vLLM, which also shows that the address works.
            with suppress(openai.NotFoundError):
                client.get(f"{self.url.removesuffix('/v1')}/health", cast_to=str)
            self.is_resting = False
        except openai.OpenAIError:
            self._rest()


def shorten(text: str) -> str:
    """One line of at most 300 characters, without a full stop."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= 300 else f"{line[:300]} ..."


def credentials_of(urls: Sequence[str]) -> dict[str, str]:
    """`user:password` by URL, of the URLs that have one, to hand to another process."""
    return {url: _CREDENTIALS[url] for url in urls if url in _CREDENTIALS}


def remember_credentials(credentials: dict[str, str]) -> None:
    """Use these `user:password` by URL from now on."""
    if any(_CREDENTIALS.get(url) != one for url, one in credentials.items()):
        _CREDENTIALS.update(credentials)
        _server.cache_clear()


@cache
def _server(url: str, timeout: float, max_retries: int, process_id: int) -> Server:
    """One `Server` for each URL and process: a forked process opens its own connections."""
    return Server(url, timeout, max_retries)
