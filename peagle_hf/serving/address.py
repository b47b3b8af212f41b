"""The address of a vLLM server, read from vLLM's own flags, and whether the server answers there."""

import errno
import os
import socket
import ssl
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..errors import PeagleError

DEFAULT_PORT = 8000
HEALTH_TIMEOUT = 5.0
EVERYWHERE = {"", "0.0.0.0", "::"}


@dataclass(frozen=True)
class Address:
    """Where a vLLM server listens.

    Args:
        host: empty for all interfaces.
        uses_tls: the server speaks HTTPS.
        is_tcp: False for a server without an HTTP port: a Unix socket or a headless node.
    """

    host: str
    port: int
    uses_tls: bool = False
    is_tcp: bool = True

    @classmethod
    def of(cls, vllm_args: Sequence[str]) -> "Address":
        """The address that vLLM's flags, or the file of its `--config`, name.

        Raises:
            PeagleError: the port isn't a number from 1 to 65535.
        """
        flags = _options(vllm_args)
        options = {**_config_file(flags.get("config")), **flags}
        port = options.get("port", DEFAULT_PORT)
        if not str(port).isdecimal() or not 1 <= int(port) <= 65535:
            raise PeagleError(f"--port is {port!r} but must be a number from 1 to 65535.")
        return cls(
            host=str(options.get("host") or ""),
            port=int(port),
            uses_tls="ssl_certfile" in options,
            is_tcp=not {"uds", "headless"} & options.keys(),
        )

    def check_free(self) -> None:
        """Make sure that no other program listens there: vLLM would share the port with it, or fail late.

        Raises:
            PeagleError: another program does.
        """
        if not self.is_tcp:
            return
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((self.host, self.port))
            except OSError as error:  # vLLM itself reports other errors
                if error.errno == errno.EADDRINUSE:
                    raise self._taken() from error

    def is_answered_by(self, session: int) -> bool:
        """Whether a server among the processes of this session answers there, and no other program.

        Raises:
            PeagleError: another program listens at the same address.
        """
        if not self.is_tcp:
            return False
        try:
            found = psutil.net_connections("tcp")
        except psutil.AccessDenied:  # macOS shows sockets to the administrator only
            return self._is_healthy()
        listening = [one for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == self.port]
        own = {one.laddr.ip for one in listening if _is_in_session(one.pid, session)}
        if any(one.laddr.ip in own and not _is_in_session(one.pid, session) for one in listening):
            raise self._taken()
        return bool(own) and self._is_healthy()

    def _is_healthy(self) -> bool:
        host = "localhost" if self.host in EVERYWHERE else f"[{self.host}]" if ":" in self.host else self.host
        url = f"{'https' if self.uses_tls else 'http'}://{host}:{self.port}/health"
        # This only asks the server on this machine, so its certificate isn't checked and no proxy is used.
        context = ssl._create_unverified_context() if self.uses_tls else None
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with suppress(OSError), opener.open(url, timeout=HEALTH_TIMEOUT) as answer:
            return bool(answer.status == 200)
        return False

    def _taken(self) -> PeagleError:
        return PeagleError(
            f"Another program already listens at port {self.port}, perhaps another vLLM server. Stop it, or choose "
            f"another port after the separator: -- --port {self.port % 65535 + 1}."
        )


def _options(words: Sequence[str]) -> dict[str, str]:
    """Flags with their first value, by name with underscores; of a repeated flag the last counts."""
    options: dict[str, str] = {}
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name.replace("-", "_")] = value if equals else following
    return options


def _config_file(path: str | None) -> dict[str, Any]:
    """The options of vLLM's own YAML file; empty if it is invalid, which vLLM itself reports."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None
        if isinstance(content, dict):
            return {str(name).replace("-", "_"): value for name, value in content.items()}
    return {}


def _is_in_session(process_id: int | None, session: int) -> bool:
    with suppress(OSError):
        return process_id is not None and os.getsid(process_id) == session
    return False
