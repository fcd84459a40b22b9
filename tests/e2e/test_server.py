"""The server as a user runs it, asked by OpenAI's own client: answers, load, adapters, bad requests, ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conf import load
from parallel.model.source import open_source
from serve.request import Request, SamplingParams
from tests.commands import train, write_chats
from tests.processes import Command, children, is_alive, running
from tests.serving import Serving, serve

TINY = ["serve", "model=tiny", "port=0", "serve.kv_memory=1MB", "serve.max_length=1000"]
CONTEXT = 1000
PREFIX = 7


@dataclass(frozen=True)
class Server:
    """A running server, OpenAI's client for it, and a plain one."""

    command: Command
    client: openai.OpenAI
    http: httpx.Client

    def gauges(self) -> dict[str, float]:
        """What /metrics says, by name without labels (the last of several series)."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith("vllm:")]
        return {line.split("{")[0].removeprefix("vllm:"): float(line.split()[-1]) for line in lines}

    def aborted(self) -> float:
        """Requests that ended because their client left."""
        line = next(line for line in self.http.get("/metrics").text.splitlines() if 'finished_reason="abort"' in line)
        return float(line.split()[-1])

    def wait_idle(self) -> None:
        """Returns when nothing runs and every page has come back."""
        deadline = time.monotonic() + 10
        while (gauges := self.gauges())["num_requests_running"] or gauges["kv_cache_usage_perc"]:
            assert time.monotonic() < deadline, gauges
            time.sleep(0.02)
        assert gauges["num_requests_waiting"] == 0


@contextlib.contextmanager
def server(folder: Path, *arguments: str, ranks: int | None = None) -> Iterator[Server]:
    """A server that is ready."""
    folder.mkdir(exist_ok=True)
    with running(folder, *arguments, ranks=ranks) as command:
        url = command.wait_for("serving ").split(" at ")[1]
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            deadline = time.monotonic() + 30
            while http.get("/health").status_code != 200:  # the API process may still be loading the tokenizer
                assert time.monotonic() < deadline, command.text
                time.sleep(0.02)
            yield Server(command, client, http)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA adapter and a prefix for the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    data = write_chats(folder / "chats.jsonl")
    keys = {
        "lora": ["tune=lora", "optim.lr=0.02"],
        "prefix": ["tune=prefix", f"tune.virtual_tokens={PREFIX}", "optim.lr=0.05"],
    }
    for name, own in keys.items():
        options = ["model=tiny", f"data.path={data}", f"run_dir={folder / name}", "train.steps=4", *own]
        code, printed = train(1, options)
        assert code == 0, printed
    return {name: folder / name / "checkpoints" / "latest" for name in keys}


@pytest.fixture(scope="module")
def tiny(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model with the LoRA adapter, and so few pages that not all requests fit at once."""
    with server(tmp_path_factory.mktemp("server"), *TINY, f"adapters.lora={adapters['lora']}") as found:
        yield found


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def greedy(server: Server, model: str, prompt: str, max_tokens: int) -> str:
    """A completion without a draw."""
    answer = server.client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), max_tokens)
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].text


def test_models_are_listed_base_first(tiny: Server) -> None:
    assert [model.id for model in tiny.client.models.list()] == ["tiny", "lora"]
    assert tiny.http.get("/health").json() == {"status": "ok"}


def test_the_text_is_the_engines(tiny: Server, adapters: dict[str, Path]) -> None:
    """Over HTTP come the very tokens that an engine in this process gives."""
    model = load.load(["model=tiny"], "serve").model
    tokenizer = open_source(model).tokenizer()
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    requests = [
        Request(id=name or "base", prompt=tuple(tokenizer.encode("What is a mesh?")), sampling=sampling, adapter=name)
        for name in (None, "lora")
    ]
    served = serve(Serving(model=model, adapters={"lora": str(adapters["lora"])}), [requests])
    expected = {id: tokenizer.decode(tokens) for id, tokens in served.tokens.items()}
    assert expected["base"] != expected["lora"]
    assert greedy(tiny, "tiny", "What is a mesh?", 24) == expected["base"]
    assert greedy(tiny, "lora", "What is a mesh?", 24) == expected["lora"]


def test_a_chat_and_its_stream_say_the_same(tiny: Server) -> None:
    asked: dict[str, Any] = {"messages": user("What is a rank?"), "max_tokens": 800, "seed": 3, "temperature": 0.8}
    for model in ("tiny", "lora"):
        whole = tiny.client.chat.completions.create(model=model, **asked)
        chunks = list(
            tiny.client.chat.completions.create(
                model=model, stream=True, stream_options={"include_usage": True}, **asked
            )
        )
        assert whole.model == chunks[0].model == model
        deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert len(deltas) > 3  # of up to 800: a busy machine hands out many tokens in one
        assert "".join(deltas) == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(
            "<|im_start|>user\nWhat is a rank?<|im_end|>\n<|im_start|>assistant\n"
        ) - 2 * (len("<|im_start|>") - 1) - (len("<|im_end|>") - 1)


def test_stop_strings_and_logprobs(tiny: Server) -> None:
    text = greedy(tiny, "tiny", "abcdef", 30)
    stop = text[8:10]
    answer = tiny.client.completions.create(
        model="tiny", prompt="abcdef", max_tokens=30, temperature=0, stop=stop, logprobs=2
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    assert all(-10 < value < 0 for value in logprobs.token_logprobs)


@pytest.fixture
def prefixed(tiny: Server, adapters: dict[str, Path]) -> Iterator[Server]:
    """The same server with the prefix loaded over HTTP; without it every page must be free again."""
    body = {"lora_name": "prefix", "lora_path": str(adapters["prefix"])}
    loaded = tiny.http.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'prefix' added successfully.")
    assert tiny.http.post("/v1/load_lora_adapter", json=body).status_code == 400
    yield tiny
    removed = tiny.http.post("/v1/unload_lora_adapter", json={"lora_name": "prefix"})
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'prefix' removed successfully.")
    assert tiny.http.post("/v1/unload_lora_adapter", json={"lora_name": "prefix"}).status_code == 404
    with pytest.raises(openai.NotFoundError):
        greedy(tiny, "prefix", "gone", 1)
    tiny.wait_idle()


def test_64_requests_at_once_all_end_and_all_pages_come_back(prefixed: Server) -> None:
    """Chats and completions, streamed or not, over base, LoRA and prefix; more than the cache holds."""
    tiny, names = prefixed, ["tiny", "lora", "prefix"]

    def ask(number: int) -> str:
        prompt, max_tokens = f"{number}: " + "word " * (number * 7 % 20), 1 + number * 13 % 60
        if number % 2:
            return greedy(tiny, names[number % 3], prompt, max_tokens)
        chunks = tiny.client.chat.completions.create(
            model=names[number % 3], messages=user(prompt), max_tokens=max_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(64) as pool:
        answers = pool.map(ask, range(64))
        deadline = time.monotonic() + 60
        while not tiny.gauges()["num_requests_waiting"]:  # so some have to wait for pages
            assert time.monotonic() < deadline
        together = list(answers)
    assert [ask(number) for number in (1, 2, 3, 36, 49)] == [together[number] for number in (1, 2, 3, 36, 49)]
    assert tiny.gauges()["kv_cache_usage_perc"] > 0  # the prefix itself


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages(tiny: Server, stream: bool) -> None:
    before, begun = tiny.aborted(), time.monotonic()
    greedy(tiny, "tiny", "x" * 100, 800)
    whole_s = time.monotonic() - begun
    body = {"model": "tiny", "prompt": "x" * 100, "max_tokens": 800, "ignore_eos": True, "stream": stream}
    payload = json.dumps(body).encode()
    address = (tiny.http.base_url.host, tiny.http.base_url.port or 0)
    with socket.create_connection(address) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)
        deadline = time.monotonic() + 10
        while not tiny.gauges()["kv_cache_usage_perc"]:
            assert time.monotonic() < deadline
        assert tiny.gauges()["num_requests_running"] == 1
    left = time.monotonic()
    tiny.wait_idle()
    assert time.monotonic() - left < 0.5 * whole_s
    assert tiny.aborted() == before + 1


BAD = {
    "bad JSON": (b'{"model": "tiny", ', 400, None, "the request body isn't valid JSON"),
    "unknown model": (b'{"model": "gpt-5", "prompt": "x"}', 404, "model", "model=gpt-5 is not served here; there is tiny, lora"),
    "negative limit": (b'{"prompt": "x", "max_tokens": -5}', 400, "max_tokens", "max_tokens=-5 must be at least 1"),
    "long prompt": (
        json.dumps({"prompt": "x" * CONTEXT}).encode(), 400, "prompt",
        f"the prompt has {CONTEXT} tokens, but the model's context holds {CONTEXT}",
    ),
    "long answer": (
        json.dumps({"prompt": "x" * (CONTEXT - 12), "max_tokens": 13}).encode(), 400, "max_tokens", f"exceed the model's context of {CONTEXT}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_a_4xx_and_the_server_lives_on(tiny: Server, case: str) -> None:
    content, status, param, message = BAD[case]
    answer = tiny.http.post("/v1/completions", content=content)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]
    assert greedy(tiny, "tiny", "still there?", 2)


def test_openais_client_raises_its_own_errors(tiny: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="model=gpt-5 is not served here") as missing:
        tiny.client.chat.completions.create(model="gpt-5", messages=user("hi"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens=-1 must be at least 1"):
        tiny.client.chat.completions.create(model="tiny", messages=user("hi"), max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match=f"context holds {CONTEXT}"):
        tiny.client.chat.completions.create(model="tiny", messages=user("hi" * 2000))


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", "multipart/form-data", None],
)
def test_a_body_is_json_whatever_it_is_called(tiny: Server, kind: str | None) -> None:
    """`curl -d '{...}'` without a header says that it is a form."""
    headers = {} if kind is None else {"Content-Type": kind}
    for path, body in (
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a=b&c"}], "max_tokens": 2}'),
        ("/tokenize", b'{"prompt": "a=b&c"}'),
    ):
        answer = tiny.http.post(path, content=body, headers=headers)
        assert answer.status_code == 200, answer.text
    refused = tiny.http.post("/tokenize", content=b"prompt=a", headers=headers)
    assert refused.status_code == 400
    assert "isn't valid JSON" in refused.json()["error"]["message"]


def test_adapters_come_and_go_while_the_server_runs(prefixed: Server) -> None:
    cards = {card["id"]: card for card in prefixed.http.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny", "lora", "prefix"]
    assert [card["max_model_len"] for card in cards.values()] == [CONTEXT, CONTEXT, CONTEXT - PREFIX]
    with ThreadPoolExecutor(3) as pool:  # in one batch
        answers = list(pool.map(lambda name: greedy(prefixed, name, "What is a page?", 16), cards))
    assert answers == [greedy(prefixed, name, "What is a page?", 16) for name in cards]
    assert len(set(answers)) == 3


def test_a_bad_adapter_is_refused_and_the_server_lives_on(
    tiny: Server, adapters: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": "much"}')
    (broken / "adapter_model.safetensors").write_bytes((adapters["lora"] / "adapter_model.safetensors").read_bytes())
    for path, message in (
        (tmp_path, "it has no adapter_config.json"),
        (broken, "lora_alpha, alpha_pattern or lora_dropout is no number"),
        (Path("/no/such/adapter"), "is no adapter directory"),
        (Path("/" + "long" * 2000), "can't be read (File name too long)"),
    ):
        answer = tiny.http.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(path)})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    assert greedy(tiny, "tiny", "still there?", 2)


def test_two_ranks_serve_the_same_and_end_together(tiny: Server, adapters: dict[str, Path], tmp_path: Path) -> None:
    """torchrun with tensor=2: one rank's death ends the other, the API process and the launcher, with a line."""
    with server(tmp_path, *TINY, f"adapters.lora={adapters['lora']}", ranks=2) as pair:
        assert "tensor=2" in pair.command.wait_for("parallel ")
        prompts = ["What is a mesh?", "x", "And then? " * 20]
        asked = [(name, prompt) for name in ("tiny", "lora") for prompt in prompts]
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda pair_: greedy(pair, *pair_, 20), asked))
        assert answers == [greedy(tiny, name, prompt, 20) for name, prompt in asked]
        pair.wait_idle()
        pids = [pair.command.rank(0), pair.command.rank(1)]
        pids += children(pids[0])
        assert len(pids) == 3
        os.kill(pids[1], signal.SIGKILL)
        assert pair.command.wait(30) != 0
        wait_gone(pids)
        assert "lost rank 1" in pair.command.wait_for("serve: [rank 0 ")


def wait_gone(pids: list[int]) -> None:
    """Returns when none of the processes runs any more."""
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def test_sigterm_lets_the_answer_finish_and_exits_0(tmp_path: Path) -> None:
    with server(tmp_path, *TINY) as short:
        stream = short.client.completions.create(
            model="tiny", prompt="go on", max_tokens=800, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = [next(stream)]
        asked = time.monotonic()
        short.command.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert short.command.wait(10) == 0
        assert time.monotonic() - asked < 25
        assert "Traceback" not in short.command.text


def test_the_engine_ends_with_a_line_when_the_api_process_dies(tmp_path: Path) -> None:
    with server(tmp_path, *TINY) as short:
        (api,) = children(short.command.process.pid)
        os.kill(api, signal.SIGKILL)
        assert short.command.wait(10) == 1
        assert "serve: the API process has ended" in short.command.text
        assert "Traceback" not in short.command.text


def test_the_api_process_ends_with_a_line_when_the_engine_dies(tmp_path: Path) -> None:
    with server(tmp_path, *TINY) as short:
        (api,) = children(short.command.process.pid)
        os.kill(short.command.process.pid, signal.SIGKILL)
        wait_gone([api])
        assert "onemesh API: the engine process has ended" in short.command.text


def test_a_taken_port_ends_every_rank(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(tmp_path, "serve", "model=tiny", f"port={port}", ranks=2) as command:
            assert command.wait(30) != 0
            assert command.text.count(f"port={port} can't be listened on at host=127.0.0.1") == 1
            assert "exitcode  : 2" in command.text


def test_the_real_model_answers(tmp_path: Path) -> None:
    with server(tmp_path, "serve", "model=smollm2", "port=0", "serve.kv_memory=200MB") as real:
        (model,) = real.client.models.list()
        answer = real.client.chat.completions.create(
            model=model.id, messages=user("What is the capital of Japan?"), max_tokens=12, temperature=0
        )
        assert "Tokyo" in (answer.choices[0].message.content or "")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 37
