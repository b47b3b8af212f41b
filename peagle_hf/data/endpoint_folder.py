"""The folder that a vLLM server writes hidden states to: its record, its file locks, and removal of abandoned files.

A server writes a request's states to a file whose name holds the request's id, and holds a file lock (`flock`) on
`<file>.lock` until the file is complete. Ids of our requests are `peagle-<client>-<number>`. While a client has
requests in flight, it holds a lock on `.peagle-<client>.client` in the folder. So every client, on any machine, can
tell which files belong to requests that were given up, also by killed processes, and never removes a file that another
client waits for.
"""

import itertools
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import PeagleError
from ..files import write_json, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SERVER_RECORD = "server.json"
"""File in the server's folder with the model and the layers that `peagle-hf launch-vllm` started it with."""
LEFTOVER_SECONDS = 600.0
"""Temporary files that are older are leftovers of a killed process and may be deleted."""
SWEEP_SECONDS = 60.0
"""Seconds between two searches for abandoned files."""
SWEEP_SECONDS_AFTER_FAILURE = 1.0
LOCK_POLL_SECONDS = 0.01
CONNECT_SECONDS = 2.0
_REQUEST = re.compile(r"peagle-([0-9a-f]{16})-\d+(?!\d)")


def server_name(port: int) -> str:
    """Name of a server on this machine in the record: host and port."""
    return f"{socket.gethostname()}:{port}"


def write_server_record(folder: str | os.PathLike[str], model: str, layer_ids: list[int], server: str = "") -> None:
    """Record in a server's folder which model and layers it extracts, once it is ready.

    Args:
        layer_ids: the auxiliary layers, then the last.
        server: its `server_name`. Servers of the same model and layers share the record.
    """
    path = Path(folder) / SERVER_RECORD
    others: list[str] = []
    with suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and (record.get("model"), record.get("layer_ids")) == (model, layer_ids):
            others = [name for name in record.get("servers", []) if name != server]
    write_json(path, {"model": model, "layer_ids": layer_ids, "servers": [*others, server]})


def remove_server_record(folder: str | os.PathLike[str], server: str) -> None:
    """Remove a server that has ended from the record, and the record with the last server."""
    path = Path(folder) / SERVER_RECORD
    with suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if server in record["servers"]:
            record["servers"].remove(server)
            if record["servers"]:
                write_json(path, record)
            else:
                path.unlink()


def check_other_servers(folder: str | os.PathLike[str], model: str, layer_ids: list[int]) -> None:
    """Make sure that no server with another model or other layers is running in a folder.

    Raises:
        PeagleError: such a server is running: clients couldn't tell its files from the others'.
    """
    try:
        record = json.loads((Path(folder) / SERVER_RECORD).read_text(encoding="utf-8"))
        servers = record["servers"] if (record["model"], record["layer_ids"]) != (model, layer_ids) else []
        addresses = {server: (host, int(port)) for server in servers for host, _, port in [server.rpartition(":")]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is no record, or it is damaged
        return
    for server, address in addresses.items():
        with suppress(OSError), socket.create_connection(address, CONNECT_SECONDS):
            raise PeagleError(
                f"The server {server} writes to {folder} too, and extracts the layers {record['layer_ids']} of "
                f"{record['model']}. Name another --hidden-states-path, or stop that server: servers with different "
                "models or layers need a folder each."
            )


def served_layers(folder: str | os.PathLike[str]) -> list[int] | None:
    """The layers that the folder's server was started with, the last one at the end; None if that isn't known.

    Raises:
        PeagleError: the record is damaged.
    """
    path = Path(folder) / SERVER_RECORD
    try:
        layer_ids = json.loads(path.read_text(encoding="utf-8"))["layer_ids"]
        if not isinstance(layer_ids, list) or not all(type(layer) is int for layer in layer_ids) or len(layer_ids) < 2:
            raise ValueError(f"layer_ids is {layer_ids!r}")
        return layer_ids
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PeagleError(
            f"{path} is damaged ({error}). Remove it and start the server again with peagle-hf launch-vllm."
        ) from error


def require_layers(folder: str | os.PathLike[str]) -> list[int]:
    """The layers that the folder's server was started with, the last one at the end.

    Raises:
        PeagleError: that isn't known, as there is no record.
    """
    served = served_layers(folder)
    if served is None:
        raise PeagleError(
            f"Which layers the vLLM server extracts isn't known: {Path(folder) / SERVER_RECORD} is missing, which "
            "peagle-hf launch-vllm writes once its server is ready. Wait for that, name the server's folder with "
            "--server-hidden-states-path, or pass --target-layer-ids with the layers that the server was started with."
        )
    return served


def check_layers(folder: str | os.PathLike[str], layer_ids: tuple[int, ...]) -> None:
    """Make sure that the folder's server was started with these layers, as far as is known.

    Raises:
        PeagleError: the server was started with other layers.
    """
    served = served_layers(folder)
    if served is not None and set(served) != set(layer_ids):
        raise PeagleError(
            f"The server of {folder} extracts the layers {served}, wanted are {list(layer_ids)} (the last one "
            f"included). Start it with --target-layer-ids {' '.join(map(str, layer_ids[:-1]))}, or pass its layers "
            "here. Servers with different layers need a folder each."
        )


class OwnRequests:
    """This process's requests to the servers of a folder, and which of them are in flight.

    Args:
        folder: the folder that the servers write to.
    """

    def __init__(self, folder: Path):
        self.folder, self.client = folder, ""
        self.in_flight: set[str] = set()
        self._numbers = itertools.count()
        self._changing = threading.Lock()
        self._marker: int | None = None
        self._last_sweep = time.monotonic()

    @contextmanager
    def request(self) -> Iterator[str]:
        """Yield a new request's id. Its files are kept while the block runs; those that are left then are removed.

        A file that the server writes later is removed by another request, another client or the server's launcher.

        Raises:
            PeagleError: the folder can't be written to, or has no file locks.
        """
        with self._changing:
            if not self.in_flight:
                self._mark()
            request = f"peagle-{self.client}-{next(self._numbers)}"
            self.in_flight.add(request)
        pause = SWEEP_SECONDS
        try:
            yield request
        except BaseException:
            pause = SWEEP_SECONDS_AFTER_FAILURE
            raise
        finally:
            with self._changing:
                self.in_flight.discard(request)
                if not self.in_flight:
                    self._unmark()
            if time.monotonic() - self._last_sweep >= pause:
                self._last_sweep = time.monotonic()
                remove_unwanted(self.folder, self)

    def _mark(self) -> None:
        """Create and lock this client's marker file, and only then give it its name; each name is used once."""
        if fcntl is None:
            raise PeagleError(
                "Hidden states from a vLLM server need file locks (flock), which Windows doesn't have. Extract them "
                "without --endpoint, which runs the verifier in this process, or use Linux (WSL too)."
            )
        self.client = secrets.token_hex(8)
        marker = _marker(self.folder, self.client)
        temporary = marker.with_suffix(".tmp")
        with writing(self.folder):
            try:
                descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o666)
            except FileNotFoundError as error:
                raise PeagleError(
                    f"There is no folder {self.folder}, which the vLLM server should write hidden states to. Name the "
                    "server's folder, as it is seen from here, with --server-hidden-states-path."
                ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise PeagleError(
                f"Files in {self.folder} can't be locked with flock ({error.strerror}). Server and client need locks "
                "to know which files are in use. Name a folder on a local disk or NFS 4 (Lustre: mount -o flock)."
            ) from error
        temporary.rename(marker)
        self._marker = descriptor

    def _unmark(self) -> None:
        assert self._marker is not None
        _marker(self.folder, self.client).unlink(missing_ok=True)
        os.close(self._marker)


def remove_unwanted(folder: str | os.PathLike[str], own: OwnRequests | None = None) -> None:
    """Remove files of `peagle` requests that no client waits for, unless a server is still writing them.

    Args:
        own: this process's requests; of other clients it is only known whether they have any in flight.
    """
    if fcntl is None or not os.path.isdir(folder):
        return
    waiting: dict[str, bool] = {}
    found = [(path, match) for path in Path(folder).iterdir() if (match := _REQUEST.search(path.name))]
    for path, match in found:
        client = match[1]
        if own is not None and client == own.client:
            is_wanted = match[0] in own.in_flight
        else:
            if client not in waiting:
                waiting[client] = is_locked(_marker(folder, client))
            is_wanted = waiting[client]
        lock = path if path.suffix == ".lock" else path.with_name(f"{path.name}.lock")
        if not is_wanted and not is_locked(lock):
            with suppress(OSError):
                path.unlink()
    for marker in Path(folder).glob(".peagle-*.client"):
        if not is_locked(marker):
            with suppress(OSError):
                marker.unlink()


def remove_unfetched(folder: str | os.PathLike[str], request_timeout: float) -> None:
    """Remove what killed clients left in a folder: old temporary files of the cache, and unfetched answers."""
    age = max(LEFTOVER_SECONDS, 2 * request_timeout)
    for temporary in Path(folder).glob(".hs_*.tmp"):
        with suppress(OSError):  # it is gone, or the folder can only be read
            if time.time() - temporary.stat().st_mtime > age:
                temporary.unlink()
    remove_unwanted(folder)


@contextmanager
def written(path: Path, timeout: float) -> Iterator[bool]:
    """Wait until the server has written a file: it holds a lock until then, which the kernel releases if it dies.

    Yields:
        False if the server was still writing after `timeout` seconds, otherwise True.
    """
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDONLY)
    except FileNotFoundError:  # the server was started without file locks
        yield True
        return
    try:
        deadline = time.monotonic() + timeout
        while not (free := _try_lock(descriptor)) and time.monotonic() < deadline:
            time.sleep(LOCK_POLL_SECONDS)
        yield free
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _marker(folder: str | os.PathLike[str], client: str) -> Path:
    return Path(folder) / f".peagle-{client}.client"
