"""An engine without a model: it answers requests by what their prompts say, through the real API process.

The last line of a prompt that begins with a command decides the tokens (bytes of UTF-8, tests use the byte
tokenizer); everything else about a request is obeyed as the real engine does: max_tokens, stop ids, logprobs.

    say TEXT     the text, then <|im_end|>
    fail         an error instead of the first token
    wait         nothing, ever
    else         0 1 2 3 ... without an end
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import httpx

from parallel.model.tokenizer import Tokenizer
from parallel.model.tokenizer_bytes import byte_tokenizer
from parallel.model.tokenizer_files import directory_tokenizer
from serve import api
from serve.link import LinkClosed
from serve.request import Output, Request, TokenLogprob

MAX_LENGTH = 400
VOCAB_SIZE = 300
READY = {
    "model_name": "fake",
    "root": "/models/fake",
    "max_length": MAX_LENGTH,
    "vocab_size": VOCAB_SIZE,
    "adapters": [{"name": "tuned", "path": "/adapters/tuned"}],
}


class FakeEngine:
    """The engine's loop on a thread; `step_seconds` is the time between two tokens of a request, `generation` the
    model's generation_config.json."""

    def __init__(
        self, *, api_key: str | None = None, step_seconds: float = 0.0, generation: dict | None = None
    ) -> None:
        self.tokenizer = byte_tokenizer() if generation is None else with_generation(generation)
        self.handle = api.start(host="127.0.0.1", port=0, tokenizer=self.tokenizer, api_key=api_key)
        self.step_seconds = step_seconds
        self.seen: list[Request] = []
        self.cancelled: dict[str, float] = {}
        self.adapters: list[dict] = []
        self.stop_asked = threading.Event()
        self.link_error: str | None = None
        self._running: dict[str, tuple[Request, list[int], int]] = {}
        self._calls: list[Callable[[], None]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    @property
    def url(self) -> str:
        return self.handle.url

    @property
    def num_running(self) -> int:
        return len(self._running)

    def ready(self) -> "FakeEngine":
        """Says that the weights are loaded, and begins to answer."""
        self.handle.link.send({"ready": READY})
        self._thread.start()
        return self

    def stop(self) -> int:
        """Ends the loop and the API process; its exit code."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(5)
        return self.handle.stop("the test is over")

    def _loop(self) -> None:
        try:
            while not self._ended.is_set():
                self._step()
        except LinkClosed as error:
            self.link_error = str(error)
        except BaseException:
            self.handle.process.kill()  # a broken fake must not look like a slow one
            raise

    def _step(self) -> None:
        messages = self.handle.link.poll(0.0 if self._running else 0.05)
        for value in messages.submit:
            request = Request.from_dict(value)
            self.seen.append(request)
            self._running[request.id] = (request, self._script(request), 0)
        for id in messages.cancel:
            self.cancelled[id] = time.monotonic()
            self._running.pop(id, None)
        replies = [self._change(change) for change in messages.adapters]
        if messages.stop:
            self.stop_asked.set()
        outputs = [output for id in list(self._running) if (output := self._advance(id)) is not None]
        if outputs or replies:
            stats = {"running": len(self._running), "waiting": 0, "kv_usage": 0.25, "preemptions": 3}
            self.handle.link.send(
                {"outputs": [output.to_dict() for output in outputs], "replies": replies, "stats": stats}
            )
        time.sleep(self.step_seconds)

    def _change(self, change: dict) -> dict:
        self.adapters.append(change)
        error = f"{change['path']} holds no adapter" if "missing" in change["path"] else None
        return {"reply": change["reply"], "error": error}

    def _script(self, request: Request) -> list[int]:
        text = self.tokenizer.decode(request.prompt)
        commands = [line for line in text.splitlines() if line.split(" ")[0] in ("say", "fail", "wait")]
        command, _, rest = (commands[-1] if commands else "count").partition(" ")
        if command == "say":
            return [*rest.encode(), 258]
        return {"count": [*b" ".join(b"%d" % i for i in range(500))], "fail": [-1], "wait": []}[command]

    def _advance(self, id: str) -> Output | None:
        request, script, done = self._running[id]
        if not script:
            return None
        if script[0] == -1:
            del self._running[id]
            return Output(id=id, finish="error", error="the model broke")
        token, sampling = (script[done] if done < len(script) else ord(".")), request.sampling
        finish = None
        if token in sampling.stop_ids or (token == 258 and not sampling.ignore_eos):
            finish = "stop"
        elif done + 1 == sampling.max_tokens:
            finish = "length"
        self._running[id] = (request, script, done + 1)
        if finish is not None:
            del self._running[id]
        logprobs = None
        if sampling.logprobs is not None:
            top = [(token, -0.5), (token + 1, -1.5), (token + 2, float("-inf"))][: sampling.logprobs]
            logprobs = (TokenLogprob(id=token, logprob=-0.5, top=tuple(top)),)
        return Output(id=id, tokens=(token,), logprobs=logprobs, finish=finish)


def with_generation(generation: dict) -> Tokenizer:
    """The byte tokenizer of a model directory with this generation_config.json."""
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save(Path(folder))
        (Path(folder) / "generation_config.json").write_text(json.dumps(generation))
        return directory_tokenizer(Path(folder))


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether `condition` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def health(url: str) -> tuple[int, str]:
    """What /health says: the HTTP status and the word."""
    response = httpx.get(f"{url}/health", timeout=20)
    return response.status_code, response.json()["status"]


@contextmanager
def running(**options):
    """A fake engine that answers, stopped in the end."""
    engine = FakeEngine(**options).ready()
    try:
        assert eventually(lambda: health(engine.url) == (200, "ok"), 20)
        yield engine
    finally:
        engine.stop()
