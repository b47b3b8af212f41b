"""A small HTTP server that extracts hidden states as vLLM does, or fails to in a way that a test names."""

import fcntl
import json
import os
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


class FakeVllm:
    """Serves on a free loopback port as a context manager.

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
        self.asked: list[list[int]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeVllm":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send({"object": "list", "data": [{"id": fake.model, "root": fake.model, "object": "model"}]})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(request["prompt"])
                fake._answer(self, request["prompt"])

            def send(self, content: dict, status: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def _answer(self, handler, token_ids: list[int]) -> None:
        fault = self.fault(token_ids)
        path = self.folder / f"cmpl-{os.urandom(6).hex()}.safetensors"
        if fault == "hang":
            self.released.wait()
        if fault in ("hang", "dead"):
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "500":
            handler.send({"error": {"message": "the engine is gone", "type": "InternalServerError", "code": 500}}, 500)
            return
        if fault == "400":
            handler.send({"error": {"message": "the prompt is too long", "type": "BadRequest", "code": 400}}, 400)
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

    def _write(self, path: Path, token_ids: list[int], fault: str | None) -> None:
        """With the lock held, which is let go of a moment after the answer."""
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            layer_ids = self.layer_ids[:-1] if fault == "layers" else self.layer_ids
            states = states_of(token_ids, layer_ids, self.hidden_size * (2 if fault == "size" else 1)).to(self.dtype)
            if fault == "nan":
                states[0, 0, 0] = float("nan")
            written = token_ids[::-1] if fault == "tokens" else token_ids
            if fault == "short":
                states, written = states[:-1], written[:-1]
            tensors = {"token_ids": torch.tensor(written)} | ({} if fault == "no states" else {"hidden_states": states})
            save_file(tensors, path)
            if fault == "truncated":
                path.write_bytes(path.read_bytes()[:-10])
            if fault == "locked":
                self.released.wait()
            os.close(lock)

        threading.Timer(0.02, write).start()
