"""The load generator's HTTP client against servers that write exactly given bytes."""

import asyncio
import contextlib

import pytest

from serve.sse import HttpError, Server

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TO_THE_END = HEAD + b"Connection: close\r\n\r\n"
EVENTS = [
    b'data: {"n": 1}\n\n',
    b': a comment\n\ndata: {"n": 2, "\xe2\x82\xac": "a\\nb"}\n\n',
    b'data: {"n": 3}\r\n\r\n',
]
DONE = b"data: [DONE]\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def ask(answer: list[bytes], call) -> object:
    """What `call` gets from a server that writes the parts of `answer`, one read of the client's each."""

    async def main() -> object:
        answered = asyncio.Event()

        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for part in answer:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.001)
            writer.close()
            answered.set()

        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            try:
                return await asyncio.wait_for(call(Server(host="127.0.0.1", port=port)), 10)
            finally:
                await answered.wait()

    return asyncio.run(main())


def streamed(answer: list[bytes]) -> list[int]:
    seen: list[int] = []
    ask(answer, lambda server: server.stream("/", {}, lambda event: seen.append(event["n"])))
    return seen


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 7] for i in range(0, len(data), 7)]


@pytest.mark.parametrize("split", [lambda data: [data], bytewise])
@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + chunked(*EVENTS, DONE),
        CHUNKED + chunked(*bytewise(b"".join([*EVENTS, DONE]))),
        TO_THE_END + b"".join([*EVENTS, DONE]),
        CHUNKED + chunked(*EVENTS, DONE, EVENTS[0]),
    ],
)
def test_events_come_whole_however_they_are_framed(split, answer):
    assert streamed(split(answer)) == [1, 2, 3]


@pytest.mark.parametrize("answer", [CHUNKED + chunked(*EVENTS), TO_THE_END + EVENTS[0], CHUNKED + chunked(DONE)[:9]])
def test_a_stream_without_done_broke_off(answer):
    with pytest.raises(HttpError, match="the stream broke off"):
        streamed([answer])


def test_an_error_in_the_stream_is_an_error():
    with pytest.raises(HttpError, match=r"^it broke$"):
        streamed([CHUNKED + chunked(EVENTS[0], b'data: {"error": {"message": "it broke"}}\n\n', DONE)])


def test_what_the_callback_raises_reaches_the_caller():
    with pytest.raises(KeyError, match="'n'"):
        streamed([CHUNKED + chunked(b"data: {}\n\n")])


def test_bodies_refusals_and_bad_answers():
    def get(answer: bytes) -> object:
        return ask([answer], lambda server: server.get("/"))

    assert get(b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}') == {"a": 1}
    assert get(b'HTTP/1.0 200 OK\r\n\r\n{"a":1}') == {"a": 1}
    with pytest.raises(HttpError, match=r"^404: no such thing$"):
        get(b'HTTP/1.1 404 Not Found\r\nContent-Length: 37\r\n\r\n{"error":{"message":"no such thing"}}')
    with pytest.raises(HttpError, match=r"^502: plain$"):
        get(b"HTTP/1.1 502 Bad Gateway\r\n\r\nplain\n")
    with pytest.raises(HttpError, match="the connection ended without an answer"):
        get(b"")
    with pytest.raises(HttpError, match="the connection broke: "):
        get(b"SSH-2.0-OpenSSH_9.2\r\n")
