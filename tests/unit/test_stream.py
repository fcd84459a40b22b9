"""Streams without sockets: frames are what chunks would be, and who writes when."""

import asyncio
import json

import pytest

from parallel.model.tokenizer_bytes import byte_tokenizer
from serve.client import EngineClient
from serve.detokenize import Detokenizer
from serve.generation import Generation, Piece, TokenReport
from serve.request import Output, Request, TokenLogprob
from serve.responses import Answer, ChatAnswer, CompletionAnswer, Frames, Head, event
from serve.stream import EXTENSION, EventStream, Outbox

READY = {"model_name": "m", "root": "m", "max_length": 50, "vocab_size": 300, "adapters": []}
HEAD = Head(id='a "\0" \u20ac "text":"\0"', created=7, model="\0")
REPORT = TokenReport(logprob=TokenLogprob(id=97, logprob=-0.5), offset=3)


@pytest.mark.parametrize("kind", [ChatAnswer, CompletionAnswer])
@pytest.mark.parametrize("with_logprobs", [False, True])
@pytest.mark.parametrize("with_usage", [False, True])
def test_frames_give_the_bytes_of_chunks(kind, with_logprobs, with_usage):
    answer = kind(head=HEAD, pieces=byte_tokenizer(), with_logprobs=with_logprobs, with_usage=with_usage)
    frames = Frames(answer)
    for text in ("a", "", '"\\\n\t\0\x1f\x7f', "\u20ac\U0001f600\u2028", '"\0"', "a" * 1000):
        for index in (0, 3, 0):
            for end in ({}, {"finish_reason": "stop", "stop_reason": "x"}, {"reports": (REPORT,)}):
                piece = Piece(index=index, text=text, **end)
                assert frames.events(piece) == b"".join(map(event, answer.chunks(piece)))


class Socket:
    """A connection as streams see it; `log` gets (name, body of a chunk)."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log
        self.write_paused = False
        self.closing = False
        self.drains = 0
        self.writable = asyncio.Event()
        self.transport = self.flow = self

    def write(self, data: bytes) -> None:
        size, _, rest = data.partition(b"\r\n")
        assert rest[int(size, 16) :] == b"\r\n"
        self.log.append((self.name, texts(rest[:-2])))

    def is_closing(self) -> bool:
        return self.closing

    async def drain(self) -> None:
        self.drains += 1
        if self.write_paused:
            await self.writable.wait()

    async def send(self, message: dict) -> None:
        if message.get("body"):
            self.log.append((self.name, texts(message["body"]), message["more_body"]))


def texts(body: bytes) -> list:
    """What events say: text, an error's message, or the line itself."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    events = [json.loads(line) if line != "[DONE]" else line for line in lines]
    return [e if e == "[DONE]" else e["error"]["message"] if "error" in e else e["choices"][0]["text"] for e in events]


class Setting:
    """A client without an engine, and streams named "a", "b", ... whose tokens come by `tokens`."""

    def __init__(self, *answers: Answer) -> None:
        self.client = EngineClient()
        self.client.on_message({"ready": READY})
        self.log: list = []
        self.sockets, self.tasks, self.gone = {}, {}, {}
        outbox = Outbox()
        for name, answer in zip("abc", answers, strict=False):
            generation = Generation(self.client)
            detokenizer = Detokenizer(byte_tokenizer())
            request = Request(id=name, prompt=(1,))
            generation.add(request, detokenizer, show_stop_token=False, silent_stops=frozenset())
            generation.start()
            self.sockets[name], self.gone[name] = Socket(name, self.log), asyncio.Event()
            stream = EventStream(generation, answer, outbox, prompt_tokens=1)
            self.tasks[name] = asyncio.create_task(self._serve(stream, name))

    async def _serve(self, stream: EventStream, name: str) -> None:
        async def receive() -> dict:
            await self.gone[name].wait()
            return {"type": "http.disconnect"}

        socket = self.sockets[name]
        await stream({"extensions": {EXTENSION: {"connection": socket}}}, receive, socket.send)

    async def tokens(self, *names: str, text: str, finish=None) -> list:
        """What is written because of one message of the engine's."""
        self.log.clear()
        outputs = [Output(id=name, tokens=tuple(text.encode()), finish=finish).to_dict() for name in names]
        self.client.on_message({"outputs": outputs})
        await turns()
        return list(self.log)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def plain() -> CompletionAnswer:
    return CompletionAnswer(head=HEAD, pieces=byte_tokenizer(), with_logprobs=False)


def test_streams_write_in_order_and_end_in_one_piece():
    async def main() -> None:
        setting = Setting(plain(), plain())
        assert await setting.tokens("a", text="0") == [("a", ["0"])]  # came before the task had its first turn
        assert await setting.tokens("a", "b", text="1") == [("a", ["1"]), ("b", ["1"])]
        assert await setting.tokens("b", text="2", finish="length") == [("b", ["2", "[DONE]"], False)]
        assert setting.tasks["b"].done()
        assert not setting.tasks["a"].done()
        setting.gone["a"].set()
        await turns()
        assert setting.tasks["a"].done()

    asyncio.run(main())


def test_everything_is_rendered_before_anything_is_written():
    class Late(CompletionAnswer):
        def chunks(self, piece: Piece) -> list[dict]:
            rendered.append(list(setting.log))
            return super().chunks(piece)

    rendered: list = []

    async def main() -> None:
        nonlocal setting
        setting = Setting(*[Late(head=HEAD, pieces=byte_tokenizer(), with_logprobs=False) for _ in range(3)])
        assert len(await setting.tokens("a", "b", "c", text="0")) == 3
        assert rendered == [[]] * 3

    setting: Setting
    asyncio.run(main())


def test_a_slow_reader_gets_what_has_gathered_in_one_piece():
    async def main() -> None:
        setting = Setting(plain(), plain())
        assert len(await setting.tokens("a", "b", text="0")) == 2
        slow = setting.sockets["a"]
        slow.write_paused = True
        assert await setting.tokens("a", "b", text="1") == [("b", ["1"])]
        assert await setting.tokens("a", "b", text="2") == [("b", ["2"])]
        assert slow.drains == 1
        setting.log.clear()
        slow.write_paused = False
        slow.writable.set()
        await turns()
        assert setting.log == [("a", ["12"])]
        assert await setting.tokens("a", text="3", finish="length") == [("a", ["3", "[DONE]"], False)]

    asyncio.run(main())


def test_nothing_is_written_to_a_client_that_has_left():
    async def main() -> None:
        setting = Setting(plain())
        await setting.tokens("a", text="0")
        setting.sockets["a"].closing = True
        assert await setting.tokens("a", text="1") == []
        setting.gone["a"].set()
        await turns()
        assert setting.tasks["a"].done()

    asyncio.run(main())


def test_a_piece_that_cannot_be_rendered_ends_its_own_stream(capsys):
    class Broken(CompletionAnswer):
        def chunks(self, piece: Piece) -> list[dict]:
            raise ValueError("no word for it")

    async def main() -> None:
        setting = Setting(plain(), Broken(head=HEAD, pieces=byte_tokenizer(), with_logprobs=False), plain())
        failed = ("b", ["the server failed: ValueError: no word for it", "[DONE]"], False)
        assert await setting.tokens("a", "b", "c", text="0") == [("a", ["0"]), ("c", ["0"]), failed]
        assert await setting.tokens("a", "b", "c", text="1") == [("a", ["1"]), ("c", ["1"])]

    asyncio.run(main())
    assert "no word for it" in capsys.readouterr().err
