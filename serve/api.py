"""The engine's hold on the API process: binds the port, starts the process, ends it.

    engine (rank 0)                                   API process (serve.server)
    start: bind the port, spawn ---------------------> imports, listens: /health says 503 "starting"
           {"settings"} -----------------------------> loads the tokenizer
    loads weights
           {"ready"} --------------------------------> /health says 200 "ok"
    every step: link.poll, link.send <---------------> requests, tokens
    handle.stop: {"shutdown"} -----------------------> fails what still runs, exits 0

The listening socket is bound before anything slow happens, so a port that is taken is one clear error;
connections that come before the process listens wait in the socket's queue. When either process dies the
other sees the end of the channel at once, says so and ends.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from conf.schema import ConfigError
from parallel.model.tokenizer import Tokenizer
from serve.link import EngineLink, LinkClosed

STOP_SECONDS = 10.0
"""How long the API process may take to end; it gives open connections half of it."""


@dataclass(kw_only=True)
class ApiHandle:
    """The API process as the engine holds it."""

    link: EngineLink
    host: str
    port: int
    process: "subprocess.Popen[bytes]"
    tokenizer: Path
    """The directory that the API process reads and deletes."""

    @property
    def url(self) -> str:
        """Where clients on this machine find the server, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def stop(self, reason: str = "the engine stops") -> int:
        """Ends the API process: tells it why, waits, kills it if it doesn't end. Returns its exit code."""
        with contextlib.suppress(LinkClosed):
            self.link.send({"shutdown": reason})
            self.link.flush(STOP_SECONDS)
        self.link.close()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            shutil.rmtree(self.tokenizer, ignore_errors=True)


def start(*, host: str, port: int, tokenizer: Tokenizer, api_key: str | None) -> ApiHandle:
    """Binds `port` on `host` (0 = any free one) and starts the API process on it.

    Call it before the weights are loaded. The API process reads `tokenizer` from a temporary directory, which
    it deletes.

    Raises:
        ConfigError: the address can't be bound.
    """
    listener = bind(host, port)
    ours, theirs = socket.socketpair()
    with listener, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.server", *map(str, (listener.fileno(), theirs.fileno(), os.getpid()))],
            pass_fds=(listener.fileno(), theirs.fileno()),
            stdin=subprocess.DEVNULL,
            process_group=0,  # a launcher signals the engine's group; the engine tells the API process itself
            env={**os.environ, "PYTHONPATH": _search_path()},
        )
        bound = listener.getsockname()[1]
    directory = Path(tempfile.mkdtemp(prefix="onemesh-tokenizer-"))
    tokenizer.save(directory)
    link = EngineLink(ours)
    link.send({"settings": {"tokenizer": str(directory), "api_key": api_key}})
    return ApiHandle(link=link, host=host, port=bound, process=process, tokenizer=directory)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken or may not be used, or the address isn't one of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"host={host} is no address that can be listened on: {error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port={port} can't be listened on at host={host} ({error.strerror}); choose another port or host"
        ) from error
    return listener


def _search_path() -> str:
    """PYTHONPATH with the directory that this package was imported from in front."""
    ours = str(Path(__file__).resolve().parent.parent)
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([ours, given]) if given else ours
