"""The API process: python -m serve.server <socket> <channel> <engine pid>; serve.api.start starts it.

On SIGTERM or SIGINT it takes no new requests and asks the engine to stop; what runs goes on until the engine
has ended. A second signal ends it at once.
"""

import asyncio
import contextlib
import gc
import itertools
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from parallel.model.tokenizer_files import directory_tokenizer
from serve.api import STOP_SECONDS
from serve.client import EngineClient
from serve.link import ApiLink
from serve.routes import State, create_app
from serve.stream import Connection
from serve.text import TextModel

KEEP_ALIVE_SECONDS = 60


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: what a signal means is decided in `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures nothing."""
        yield


async def run(listener: socket.socket, channel: socket.socket, engine: int) -> int:
    """Serves until the process `engine` ends; the exit code is 0 if it said so before, else 1."""
    client = EngineClient()
    watch = asyncio.create_task(_watch(engine, client))
    link = await ApiLink.open(channel, client.on_message, client.on_close)
    client.attach(link)
    signals = itertools.count()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, signals, client, link)
    await _until(client.settings, client)
    if client.settings.done():
        await _serve(listener, client)
    link.close()
    watch.cancel()
    reason = client.closed.result() if client.closed.done() else "the web server has ended"
    if not client.is_orderly:
        print(f"onemesh API: {reason}; the API process ends", file=sys.stderr, flush=True)
    return 0 if client.is_orderly else 1


async def _serve(listener: socket.socket, client: EngineClient) -> None:
    """Listens, loads the tokenizer meanwhile, and stops listening when the engine is gone."""
    settings = client.settings.result()
    state = State(client=client)
    config = uvicorn.Config(
        create_app(state, api_key=settings["api_key"]),
        http=Connection,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(STOP_SECONDS / 2),
    )
    server = Server(config)
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    state.text = await asyncio.to_thread(_load, Path(settings["tokenizer"]))
    gc.freeze()  # collections skip from now on what stays for good: the tokenizer, the routes, all modules
    await _until(listening, client)
    server.should_exit = True
    await listening


def _load(directory: Path) -> TextModel:
    """The tokenizer that the engine saved; its directory is deleted."""
    try:
        return TextModel(directory_tokenizer(directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _watch(engine: int, client: EngineClient) -> None:
    """Notices the death of our parent even if a child of its own still holds the channel open."""
    while os.getppid() == engine:
        await asyncio.sleep(1.0)
    client.on_close("the engine process has ended")


async def _until(event: "asyncio.Future[Any]", client: EngineClient) -> None:
    """Returns when `event` is done or the engine is gone."""
    await asyncio.wait({event, client.closed}, return_when=asyncio.FIRST_COMPLETED)


def _on_signal(signals: "itertools.count[int]", client: EngineClient, link: ApiLink) -> None:
    if next(signals):
        client.on_close("a second signal came")
    client.stop()
    link.say_stop()


def main() -> int:
    """The entry point: the arguments are two inherited file descriptors and the process that started us."""
    listener, channel, engine = map(int, sys.argv[1:])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(socket.socket(fileno=listener), socket.socket(fileno=channel), engine))


if __name__ == "__main__":
    sys.exit(main())
