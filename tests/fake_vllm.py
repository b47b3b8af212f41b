"""Small HTTP servers that do what vLLM does, or fail to in a way that a test names."""

import fcntl
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def states_of(token_ids: list[int], layer_ids: list[int], hidden_size: int) -> Tensor:
    """Made-up states [T, S, H] that depend on token, position, layer and place; float32."""
    tokens = torch.tensor(token_ids)[:, None, None] + 0.01 * torch.arange(len(token_ids))[:, None, None]
    layers, places = torch.tensor(layer_ids)[None, :, None], torch.arange(hidden_size)
    return torch.sin(0.37 * tokens + 1.3 * layers + 0.11 * places)


NOT_VLLM = {
    "html": ("<html>Welcome</html>", 200, "text/html"),
    "empty": ("", 200, "application/json"),
    "html as json": ("<html>Welcome</html>", 200, "application/json"),
    "a list": ("[]", 200, "application/json"),
    "null": ("null", 200, "application/json"),
    "a number": ("7", 200, "application/json"),
    "other fields": ('{"status": "ok"}', 200, "application/json"),
    "no choices": ('{"choices": []}', 200, "application/json"),
    "other types": ('{"choices": [{"text": ""}], "kv_transfer_params": [1]}', 200, "application/json"),
}
"""Answers of programs that aren't vLLM: body, status and type."""
STATUSES = {
    "400": ("the prompt is too long", "BadRequest"),
    "401": ("Unauthorized", "Auth"),
    "429": ("too many requests", "RateLimit"),
    "500": ("the engine is gone", "InternalServerError"),
    "503": ("the model is loading", "ServiceUnavailable"),
}
"""What vLLM says with a status: message and type."""


class FakeVllm:
    """Extracts hidden states; serves on a free loopback port as a context manager.

    Args:
        folder: where the states go.
        model: what it says it runs.
        layer_ids: of the slots, ascending.
        fault: asked before each answer with the request's tokens; names one of the faults in `_answer`, or None.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        layer_ids: list[int],
        hidden_size: int,
        fault: Callable[[list[int]], str | None] = lambda token_ids: None,
        dtype: torch.dtype = torch.float32,
        port: int = 0,
    ):
        self.folder, self.model, self.layer_ids, self.hidden_size = folder, model, layer_ids, hidden_size
        self.fault, self.dtype, self.port = fault, dtype, port
        self.max_model_len = 512
        self.asked: list[list[int]] = []
        self.num_health_checks = 0
        self.is_down = False
        self.authorization: str | None = None
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeVllm":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.num_health_checks += self.path == "/health"
                if self.is_let_in():
                    fake._get(self, self.path)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.is_let_in():
                    fake._post(self, request)

            def is_let_in(self) -> bool:
                """Close the connection, or refuse it, where the server is down or wants another user."""
                if fake.is_down:
                    self.close_connection = True
                    self.connection.close()
                elif fake.authorization not in (None, self.headers["Authorization"]):
                    self.send({"error": {"message": "Unauthorized", "type": "Auth", "code": 401}}, 401)
                else:
                    return True
                return False

            def send(self, content: dict, status: int = 200) -> None:
                self.send_text(json.dumps(content), status, "application/json")

            def send_text(self, content: str, status: int = 200, kind: str = "text/plain") -> None:
                body = content.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def start_stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()

            def send_event(self, content: dict) -> None:
                event = f"data: {json.dumps(content)}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

            def end_stream(self) -> None:
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

            def log_message(self, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # the default of 5 resets connections of 16 chats at a time

            def handle_error(self, request: object, client_address: object) -> None:
                """Leave a client that hung up unmentioned, as vLLM does; every other error is printed."""
                if not isinstance(sys.exc_info()[1], ConnectionError):
                    super().handle_error(request, client_address)

        self.http = Server(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def _get(self, handler, path: str) -> None:
        card = {"id": self.model, "root": self.model, "object": "model", "max_model_len": self.max_model_len}
        handler.send({"object": "list", "data": [card]})

    def _post(self, handler, request: dict) -> None:
        self.asked.append(request["prompt"])
        self._answer(handler, request["prompt"])

    def _answer(self, handler, token_ids: list[int]) -> None:
        fault = self.fault(token_ids)
        request = handler.headers["X-Request-Id"] or os.urandom(6).hex()
        path = self.folder / f"cmpl-{request}-0-{os.urandom(4).hex()}.safetensors"
        if fault == "late":  # the client gives up first
            self.released.wait()
        if self._fails(handler, fault):
            return
        if fault == "outside":
            path = self.folder.parent / "secret.safetensors"
        if fault == "a row's":
            path = self.folder / "hs_0.safetensors"
        if fault == "link":
            path.symlink_to(self.folder.parent / "secret.safetensors")
        if fault not in ("missing", "outside", "link", "a row's"):
            self._write(path, token_ids, fault)
        parameters = None if fault == "no path" else {"hidden_states_path": str(path)}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        handler.send(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 0,
                "model": self.model,
                "choices": [choice],
                "kv_transfer_params": parameters,
            }
        )

    def _fails(self, handler, fault: str | None) -> bool:
        """Whether the fault is one that leaves a request without an answer."""
        if fault == "hang":
            self.released.wait()
        if fault in ("hang", "dead"):
            handler.close_connection = True
            handler.connection.close()
        elif fault in STATUSES:
            message, kind = STATUSES[fault]
            handler.send({"error": {"message": message, "type": kind, "code": int(fault)}}, int(fault))
        elif fault in NOT_VLLM:
            handler.send_text(*NOT_VLLM[fault])
        return fault in ("hang", "dead", *STATUSES, *NOT_VLLM)

    def _write(self, path: Path, token_ids: list[int], fault: str | None) -> None:
        """With the lock held, which is let go of a moment after the answer."""
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            layer_ids = self.layer_ids[:-1] if fault == "layers" else self.layer_ids
            states = states_of(token_ids, layer_ids, self.hidden_size * (2 if fault == "size" else 1)).to(self.dtype)
            if fault in ("nan", "inf"):
                states[0, 0, 0] = float(fault)
            if fault == "integers":
                states = states.to(torch.int64)
            written = token_ids[::-1] if fault == "tokens" else token_ids
            if fault == "short":
                states, written = states[:-1], written[:-1]
            tensors = {"token_ids": torch.tensor(written)} | ({} if fault == "no states" else {"hidden_states": states})
            save_file(tensors, path)
            if fault in ("truncated", "disk full"):
                path.write_bytes(path.read_bytes()[: -10 if fault == "truncated" else 0])
            if fault == "locked":
                self.released.wait()
            os.close(lock)

        threading.Timer(0.02, write).start()


class FakeWritingVllm(FakeVllm):
    """Completes prompts of token ids by `write(token_ids, end_ids, max_tokens)`, one at a time."""

    def __init__(
        self,
        model: str,
        write: Callable[[list[int], set[int], int], list[int]],
        fault: Callable[[list[int]], str | None] = lambda token_ids: None,
    ):
        super().__init__(Path(), model, [], 0, fault)
        self.write, self.writing = write, threading.Lock()
        self.requests: list[dict] = []

    def _post(self, handler, request: dict) -> None:
        self.requests.append(request)
        fault = self.fault(request["prompt"])
        if self._fails(handler, fault):
            return
        with self.writing:
            written = self.write(request["prompt"], set(request["stop_token_ids"]), request["max_tokens"])
        choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": written, "logprobs": None}
        if fault == "no token ids":
            del choice["token_ids"]
        if fault == "cut":
            choice["token_ids"] = [written[0]] * (request["max_tokens"] - 1)
        completion = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": self.model}
        extracted = {"kv_transfer_params": {"hidden_states_path": "/x"}} if fault == "extracts" else {}
        handler.send(completion | {"choices": [choice]} | extracted)


class FakeDraftingVllm(FakeVllm):
    """Answers chats in a stream and counts drafts, as vLLM with a drafter of three tokens does, or `drafts` not at all.

    An answer to N words has N + 1 tokens, at most `max_tokens`, with ids from `first` on: the first token, then drafts
    of which none, one and two tokens are accepted by turns. `by_request`: say what was drafted with each answer too;
    `by_draft`: and what was accepted of each draft.
    `fault` is asked with the last message: see `_post`.
    """

    def __init__(
        self,
        model: str,
        drafts: bool = True,
        fault: Callable[[str], str | None] = lambda message: None,
        first: int = 0,
    ):
        super().__init__(Path(), model, [], 0)
        self.drafts, self.chat_fault, self.first, self.by_request, self.by_draft = drafts, fault, first, drafts, True
        self.requests: list[dict] = []
        self.generated = 0
        self.counts = [0] * 6
        self.counting = threading.Lock()

    def _get(self, handler, path: str) -> None:
        if path == "/version":
            handler.send({"version": "0.32.0"})
        elif path == "/metrics":
            handler.send_text(self._metrics())
        else:
            super()._get(handler, path)

    def _metrics(self) -> str:
        """What two engines of one server count adds up."""
        names = [(f"spec_decode_num_{name}", "") for name in ("drafts", "draft_tokens", "accepted_tokens")]
        names += [("spec_decode_num_accepted_tokens_per_pos", f',position="{place}"') for place in range(3)]
        text = "# TYPE vllm:generation_tokens_total counter\n"
        with self.counting:
            counts = {("generation_tokens", ""): self.generated}
            counts |= dict(zip(names, self.counts, strict=True)) if self.drafts else {}
        for (name, label), count in counts.items():
            for engine, share in enumerate((count - count // 2, count // 2)):
                labels = f'{{engine="{engine}",model_name="a {{model}}"{label}}}'
                text += f"vllm:{name}_total{labels} {share}.0\nvllm:{name}_created{labels} 1.79e+09\n"
        return text

    def _post(self, handler, request: dict) -> None:
        self.requests.append(request)
        message = request["messages"][-1]["content"]
        fault = self.chat_fault(message)
        if fault == "400":
            handler.send({"error": {"message": "the prompt is too long", "type": "BadRequest", "code": 400}}, 400)
            return
        with self.counting:
            if fault == "started anew":
                self.generated, self.counts = 0, [0] * 6
            if fault == "others":
                self.generated += 7
        length = min(len(message.split()) + 1, request["max_tokens"])
        tokens = [self.first + place for place in range(2 if fault == "cut" else length)]
        handler.start_stream()
        place, histogram, accepted_by_step = 6 if fault == "late drafts" else 1, [0] * 4, []
        self._send(handler, tokens[:place], last=len(tokens) <= place, fault=fault)
        for accepted in itertools.cycle((0, 1, 2)):
            if place >= len(tokens):
                break
            if fault == "dies":
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault == "error":
                handler.send_event({"error": {"message": "the engine died", "type": "InternalServerError"}})
            if fault in ("error", "breaks off"):
                break
            with self.counting:
                counted = [1, 3, accepted, *(int(accepted > position) for position in range(3))]
                self.counts = [one + other for one, other in zip(self.counts, counted, strict=True)]
            histogram[accepted] += fault != "miscounts"
            accepted_by_step.append(accepted)
            chunk = tokens[place : place + accepted + 1]
            place += len(chunk)
            self._send(handler, chunk, last=place == len(tokens), fault=fault)
        if self.by_request:
            drafted = {"acceptance_histogram": histogram, "num_draft_tokens": 3 * sum(histogram)}
            if self.by_draft and accepted_by_step:  # vLLM leaves out what is empty
                drafted |= {"per_step_accepted": accepted_by_step, "per_step_drafted": [3] * len(accepted_by_step)}
            usage = {"prompt_tokens": 1, "completion_tokens": place, "total_tokens": place + 1}
            metrics = {"speculative_decoding": drafted}
            handler.send_event(
                {"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": usage, "metrics": metrics}
            )
        handler.end_stream()

    def _send(self, handler, tokens: list[int], last: bool, fault: str | None) -> None:
        if fault != "uncounted":
            with self.counting:
                self.generated += len(tokens)
        choice = {
            "index": 0,
            "delta": {"content": "".join(f"w{token} " for token in tokens)},
            "finish_reason": ("length" if fault == "cut" else "stop") if last else None,
            "token_ids": None if fault == "no token ids" else tokens,
        }
        handler.send_event({"id": "1", "object": "chat.completion.chunk", "choices": [choice]})
