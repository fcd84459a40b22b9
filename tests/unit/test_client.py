"""The API process's view of the engine, without processes: routing, ends, failures of one request."""

import asyncio

import pytest

from parallel.model.tokenizer_bytes import byte_tokenizer
from serve.client import EngineClient, Phase
from serve.detokenize import Detokenizer
from serve.errors import ApiError
from serve.generation import Generation
from serve.request import Output, Request

READY = {"model_name": "m", "root": "m", "max_length": 50, "vocab_size": 300, "adapters": []}


class Wire:
    """Takes what the client says instead of the engine."""

    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []

    def say(self, key, item) -> None:
        self.said.append((key, item))


class Broken(Detokenizer):
    """A tokenizer that can't spell token 7."""

    def push(self, id: int) -> str:
        if id == 7:
            raise KeyError("token 7")
        return super().push(id)


async def started(*detokenizers: Detokenizer) -> tuple[EngineClient, Wire, list[Generation]]:
    client, wire = EngineClient(), Wire()
    client.attach(wire)
    client.on_message({"ready": READY})
    generations = []
    for index, detokenizer in enumerate(detokenizers):
        generation = Generation(client)
        request = Request(id=str(index), prompt=(1,))
        generation.add(request, detokenizer, show_stop_token=False, silent_stops=frozenset())
        generation.start()
        generations.append(generation)
    return client, wire, generations


def output(id: str, *tokens: int, finish=None) -> dict:
    return Output(id=id, tokens=tokens, finish=finish).to_dict()


def test_a_token_nobody_can_spell_fails_its_own_request_only():
    async def main() -> None:
        tokenizer = byte_tokenizer()
        client, wire, (bad, good) = await started(Broken(tokenizer), Detokenizer(tokenizer))
        client.on_message({"outputs": [output("0", 7), output("1", 97)]})
        client.on_message({"outputs": [output("0", 98), output("1", 98, finish="length")]})
        with pytest.raises(ApiError, match="KeyError: 'token 7'"):
            await bad.finished()
        assert [piece.text for piece in await good.finished()] == ["ab"]
        assert [item for key, item in wire.said if key == "cancel"] == ["0"]

    asyncio.run(main())


def test_outputs_after_a_cancel_are_dropped_and_the_engine_hears_of_it_once():
    async def main() -> None:
        client, wire, (generation,) = await started(Detokenizer(byte_tokenizer()))
        client.on_message({"outputs": [output("0", 97)]})
        generation.cancel()
        generation.cancel()
        client.on_message({"outputs": [output("0", 98, finish="length"), output("nobody", 1)]})
        assert [item for key, item in wire.said if key == "cancel"] == ["0"]
        assert generation.num_generated == 1
        assert generation.is_over
        assert generation.take() == []

    asyncio.run(main())


def test_several_tokens_in_one_output_stop_at_the_stop_string():
    async def main() -> None:
        client, wire, (generation,) = await started(Detokenizer(byte_tokenizer(), stop=["cd"]))
        client.on_message({"outputs": [output("0", *b"abcdef")]})
        (piece,) = await generation.finished()
        assert (piece.text, piece.finish_reason, piece.stop_reason) == ("ab", "stop", "cd")
        assert generation.num_generated == 4
        assert ("cancel", "0") in wire.said

    asyncio.run(main())


def test_the_end_of_the_engine_fails_what_runs_and_what_comes_later():
    async def main() -> None:
        client, _, (generation,) = await started(Detokenizer(byte_tokenizer()))
        change = asyncio.create_task(client.load_adapter("a", "/a"))
        await asyncio.sleep(0)
        client.on_close("it crashed")
        client.on_close("a second time")
        assert client.phase is Phase.STOPPING
        with pytest.raises(ApiError, match="shutting down: it crashed") as caught:
            await generation.finished()
        assert caught.value.status == 503
        with pytest.raises(ApiError, match="it crashed"):
            await change
        late = Generation(client)
        late.add(
            Request(id="late", prompt=(1,)),
            Detokenizer(byte_tokenizer()),
            show_stop_token=False,
            silent_stops=frozenset(),
        )
        late.start()
        with pytest.raises(ApiError, match="it crashed"):
            await late.finished()
        with pytest.raises(ApiError, match="it crashed"):
            await client.load_adapter("b", "/b")

    asyncio.run(main())


def test_an_adapter_may_bring_its_own_context_length():
    async def main() -> None:
        client, wire, _ = await started()
        change = asyncio.create_task(client.load_adapter("a", "/a"))
        await asyncio.sleep(0)
        key, sent = wire.said[-1]
        assert (key, sent["op"]) == ("adapters", "load")
        client.on_message({"replies": [{"reply": sent["reply"], "error": None, "max_length": 40}]})
        await change
        assert [model.max_length for model in client.models.values()] == [50, 40]

    asyncio.run(main())


def test_an_adapter_that_the_engine_keeps_stays_on_offer():
    async def main() -> None:
        client, wire, _ = await started()
        client.on_message({"replies": [{"reply": 99, "error": None}]})  # nobody asked

        async def answered(change, error) -> asyncio.Task:
            task = asyncio.create_task(change)
            await asyncio.sleep(0)
            offered.append(list(client.models))
            client.on_message({"replies": [{"reply": wire.said[-1][1]["reply"], "error": error}]})
            return task

        offered: list[list[str]] = []
        await (await answered(client.load_adapter("a", "/a"), None))
        with pytest.raises(ApiError, match="it is busy"):
            await (await answered(client.unload_adapter("a"), "it is busy"))
        assert offered == [["m"], ["m"]]
        assert list(client.models) == ["m", "a"]

    asyncio.run(main())
