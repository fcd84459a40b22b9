"""The channel between engine and API process: framing, merging, back-pressure, death of either side."""

import asyncio
import json
import socket
import threading
import time

import pytest

from serve.link import LARGEST_FRAME, ApiLink, EngineLink, FrameReader, LinkClosed, encode


def test_frames_come_out_whole_however_the_bytes_are_cut():
    messages = [{"submit": [{"id": "a", "prompt": list(range(50))}]}, {}, {"cancel": ["a", "\u20ac\n"]}]
    stream = b"".join(map(encode, messages))
    for size in (1, 2, 3, 5, 7, 64, len(stream)):
        reader, got = FrameReader(), []
        for start in range(0, len(stream), size):
            got += reader.feed(stream[start : start + size])
        assert got == messages


def test_a_broken_frame_is_an_error_and_not_an_endless_wait():
    with pytest.raises(LinkClosed, match="channel is broken"):
        list(FrameReader().feed((LARGEST_FRAME + 1).to_bytes(4, "big")))
    with pytest.raises(LinkClosed, match="isn't JSON"):
        list(FrameReader().feed(b"\x00\x00\x00\x02{]"))


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    link = EngineLink(ours)
    yield link, theirs
    link.close()
    theirs.close()


def test_poll_merges_all_messages_and_keeps_their_order(pair):
    link, other = pair
    other.sendall(encode({"submit": [{"id": "a"}, {"id": "b"}]}) + encode({"cancel": ["a"], "submit": [{"id": "c"}]}))
    other.sendall(encode({"adapters": [{"op": "load", "name": "x"}]})[:9])
    first = link.poll(1.0)
    assert [item["id"] for item in first.submit] == ["a", "b", "c"]
    assert first.cancel == ["a"]
    assert (first.adapters, first.stop) == ([], False)
    other.sendall(encode({"adapters": [{"op": "load", "name": "x"}]})[9:] + encode({"stop": True}))
    second = link.poll(1.0)
    assert second.adapters == [{"op": "load", "name": "x"}]
    assert second.stop


def test_poll_waits_no_longer_than_asked_and_wakes_at_once(pair):
    link, other = pair
    start = time.monotonic()
    assert not link.poll()
    assert not link.poll(0.05)
    assert 0.04 < time.monotonic() - start < 0.5
    threading.Timer(0.05, other.sendall, [encode({"cancel": ["x"]})]).start()
    start = time.monotonic()
    assert link.poll(5.0).cancel == ["x"]
    assert time.monotonic() - start < 2.0


def test_send_never_blocks_on_a_reader_that_sleeps(pair):
    link, other = pair
    big = {"outputs": [{"id": str(i), "text": "x" * 1000} for i in range(1000)]}
    start = time.monotonic()
    for _ in range(5):
        link.send(big)
    assert time.monotonic() - start < 2.0
    assert not link.flush(0.01)

    received: list[dict] = []

    def read() -> None:
        reader = FrameReader()
        while len(received) < 5:
            received.extend(reader.feed(other.recv(2**16)))

    thread = threading.Thread(target=read)
    thread.start()
    assert link.flush(5.0)
    thread.join(5.0)
    assert received == [big] * 5


def test_both_calls_say_that_the_api_process_has_ended(pair):
    link, other = pair
    other.close()
    with pytest.raises(LinkClosed, match="the API process has ended"):
        link.poll(1.0)
    with pytest.raises(LinkClosed, match="the API process has ended"):
        link.send({"outputs": []})


def test_the_api_side_batches_a_turn_of_the_loop_into_one_message(pair):
    link, other = pair

    async def main() -> None:
        api = await ApiLink.open(other, lambda _: None, lambda _: None)
        for index in range(100):
            api.say("submit", {"id": str(index)})
        api.say("cancel", "7")
        api.say_stop()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        api.close()

    asyncio.run(main())
    data = link._socket.recv(2**20)
    assert len(list(FrameReader().feed(data))) == 1
    message = json.loads(data[4:])
    assert [item["id"] for item in message["submit"]] == [str(index) for index in range(100)]
    assert message["cancel"] == ["7"]
    assert message["stop"] is True


def test_the_api_side_hears_messages_in_order_and_then_the_end(pair):
    link, other = pair
    heard: list[object] = []

    async def main() -> None:
        closed = asyncio.get_running_loop().create_future()
        await ApiLink.open(other, heard.append, closed.set_result)
        for index in range(20):
            link.send({"outputs": [index]})
        link.close()
        assert "engine process has ended" in await asyncio.wait_for(closed, 5.0)

    asyncio.run(main())
    assert heard == [{"outputs": [index]} for index in range(20)]
