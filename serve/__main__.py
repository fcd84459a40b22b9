"""`python -m serve k=v ...` or `torchrun --nproc-per-node=N -m serve k=v ...`: the OpenAI-compatible server.

Exit codes: 0 after SIGTERM or SIGINT, 2 bad configuration or input (one message, before any weight is read),
anything else a failure.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from conf import load
from conf.check import check
from conf.schema import Config, ConfigError
from parallel import backend, comm
from parallel.comm import Launch
from parallel.model.source import Source, open_source
from serve import api
from serve.api import ApiHandle
from serve.engine import Engine, Events, Turn
from serve.link import LinkClosed
from serve.start import build_engine, check_adapters, sampling_defaults

GRACE_S = 20.0
"""How long running requests may go on after a request to stop."""
SILENCE_S = 600.0
"""A rank that hears nothing for this long gives up; rank 0 speaks every second once the weights are loaded."""


def main(arguments: Sequence[str]) -> int:
    """Serves until told to stop; returns the exit code."""
    launch = Launch.from_environment()
    handle: ApiHandle | None = None
    code, reason = 1, "the engine failed"
    try:
        config = load.load(arguments, "serve")
        source = open_source(config.model)
        config = check(config, "serve", launch.world_size, source.architecture)
        check_adapters(config.adapters, source)
        backend.check_instruction_set()
        if launch.rank == 0:
            tokenizer = source.tokenizer()
            defaults = sampling_defaults(tokenizer)
            handle = api.start(host=config.host, port=config.port, tokenizer=tokenizer, api_key=config.serve.api_key)
            print(load.short(config), flush=True)
            if defaults:
                said = ", ".join(f"{name}={value}" for name, value in defaults.items())
                print(f"generation_config.json, where a request says nothing: {said}", flush=True)
        comm.start(launch, timeout_s=SILENCE_S)
        run(config, source, launch, handle)
        code, reason = 0, "the server was asked to stop"
    except ConfigError as error:
        comm.tell(launch, error)
        code, reason = 2, str(error)
    except SystemExit:  # asked to stop while it was loading; caught, so that nothing holds the process group
        code, reason = 0, "the server was asked to stop"
    except (comm.PeerLost, LinkClosed) as error:
        reason = str(error)
        print(f"serve: {error}", file=sys.stderr, flush=True)
    finally:
        if handle is not None:
            handle.stop(reason)
        comm.stop()
    return code


def run(config: Config, source: Source, launch: Launch, handle: ApiHandle | None) -> None:
    """Builds the engine and serves until told to stop."""
    stop = StopRequest()  # not before the ranks met: one that waits for another for ever must die of the signal
    engine = build_engine(config, source, launch)
    front = None if handle is None else ApiFront(handle, stop)
    if handle is not None:
        _announce(config, source, engine, handle)
    stop.is_running = True
    engine.run(front)


class StopRequest:
    """Remembers SIGTERM and SIGINT once the engine runs; before that they end the process at once, in order."""

    def __init__(self) -> None:
        self.asked = False
        self.is_running = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.is_running:
            raise SystemExit(0)


class ApiFront:
    """The engine's front towards the API process."""

    def __init__(self, handle: ApiHandle, stop: StopRequest) -> None:
        self._link, self._stop = handle.link, stop
        self._deadline: float | None = None
        self._stats: object = None

    def events(self, *, idle: bool) -> Events:
        """What clients sent; when idle waits up to a second. After a request to stop: runs dry, then stops."""
        messages = self._link.poll(1.0 if idle and not self._stop.asked else 0.0)
        self._stop.asked |= messages.stop
        if self._stop.asked and self._deadline is None:
            self._deadline = time.monotonic() + GRACE_S
            self._link.send({"stopping": True})
        done = self._deadline is not None and (idle or time.monotonic() > self._deadline)
        return Events(messages.submit, messages.cancel, messages.adapters, done)

    def deliver(self, turn: Turn) -> None:
        """Sends outputs, replies and, when they changed, gauges: one message."""
        message: dict[str, object] = {}
        if turn.outputs:
            message["outputs"] = [output.to_dict() for output in turn.outputs]
        if turn.replies:
            message["replies"] = list(turn.replies)
        if turn.stats != self._stats:
            self._stats = turn.stats
            used = turn.stats["num_pages"] - turn.stats["free_pages"]
            message["stats"] = {
                "running": turn.stats["running"],
                "waiting": turn.stats["waiting"],
                "preemptions": turn.stats["preemptions"],
                "kv_usage": used / turn.stats["num_pages"],
            }
        if message:
            self._link.send(message)


def _announce(config: Config, source: Source, engine: Engine, handle: ApiHandle) -> None:
    """Tells the API process, and whoever reads the terminal, that the engine is ready."""
    name = config.serve.model_name or config.model.name
    adapters = [
        {"name": adapter, "path": path, "max_length": engine.longest(adapter)}
        for adapter, path in config.adapters.items()
    ]
    ready = {
        "model_name": name,
        "root": config.model.path or name,
        "max_length": engine.max_length,
        "vocab_size": source.architecture.vocab_size,
        "adapters": adapters,
    }
    handle.link.send({"ready": ready})
    pages = f"{engine.pool.num_pages} pages of {engine.pool.page_size} tokens"
    if engine.max_length < (config.serve.max_length or 0):
        pages += f", so at most {engine.max_length} a request, not {config.serve.max_length} (raise serve.kv_memory)"
    print(f"kernels: {engine.runner.decoder.ops.name}; KV cache: {pages}")
    print(f"serving {', '.join([name, *config.adapters])} at {handle.url}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
