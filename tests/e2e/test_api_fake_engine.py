"""The HTTP interface over a real socket, asked by OpenAI's own client; the engine behind it is a fake one."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.fake_engine import eventually, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine():
    with running() as engine:
        yield engine


@pytest.fixture(scope="module")
def http(engine):
    with httpx.Client(base_url=engine.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def client(engine):
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def events(response: httpx.Response) -> list[dict]:
    """The JSON of every event of a stream, which must end with [DONE]."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models_lists_the_base_first_and_adapters_with_their_parent(client):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["fake", "tuned"]
    assert [card.model_dump()["parent"] for card in cards] == [None, "fake"]
    assert [card.model_dump()["root"] for card in cards] == ["/models/fake", "/adapters/tuned"]
    assert client.models.retrieve("tuned").id == "tuned"


def test_a_chat_answer_has_text_reason_and_counts(client, engine):
    answer = client.chat.completions.create(model="fake", messages=user("say h\u00e9llo \U0001f600"))
    choice = answer.choices[0]
    assert choice.message.content == "h\u00e9llo \U0001f600"
    assert (choice.finish_reason, choice.message.role, answer.model) == ("stop", "assistant", "fake")
    assert answer.usage.completion_tokens == len("h\u00e9llo \U0001f600".encode()) + 1
    assert answer.usage.prompt_tokens == len(engine.seen[-1].prompt)
    text = engine.tokenizer.render(user("say h\u00e9llo \U0001f600"), generation_prompt=True)
    assert engine.seen[-1].prompt == tuple(engine.tokenizer.encode(text))


def test_a_stream_is_the_same_text_with_usage_in_its_last_chunk(client):
    text = "h\u00e9llo \U0001f600 w\u00f6rld"
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=user(f"say {text}"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_the_option_says_nothing_about_usage(http):
    with http.stream("POST", CHAT, json={"messages": user("say a"), "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert all("usage" not in event for event in events(response))


def test_the_adapter_is_chosen_by_model_name(client, engine):
    for name, adapter in (("fake", None), ("tuned", "tuned")):
        answer = client.chat.completions.create(model=name, messages=user("say x"))
        assert (answer.model, engine.seen[-1].adapter) == (name, adapter)


def test_every_sampling_field_reaches_the_engine(http, engine):
    body = {
        "messages": user("say x"), "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": 11,
        "presence_penalty": 0.25, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "max_completion_tokens": 9,
        "min_tokens": 2, "logit_bias": {"5": 1.5}, "stop_token_ids": [65, 66], "ignore_eos": True, "n": 2,
        "logprobs": True, "top_logprobs": 3, "user": "u", "metadata": {"a": "b"}, "stop": None,
    }  # fmt: skip
    assert http.post(CHAT, json=body).status_code == 200
    first, second = (request.sampling.to_dict() for request in engine.seen[-2:])
    assert first == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": 11, "presence_penalty": 0.25,
        "frequency_penalty": -0.5, "repetition_penalty": 1.5, "max_tokens": 9, "min_tokens": 2,
        "logit_bias": [[5, 1.5]], "stop_ids": [65, 66], "ignore_eos": True, "logprobs": 3,
    }  # fmt: skip
    assert second == {**first, "seed": 12}


def test_without_a_limit_a_chat_may_fill_the_context(client, engine):
    client.chat.completions.create(model="fake", messages=user("say x"))
    request = engine.seen[-1]
    assert request.sampling.max_tokens == 400 - len(request.prompt)
    client.completions.create(model="fake", prompt="say x")
    assert engine.seen[-1].sampling.max_tokens == 16


def test_n_answers_are_separate_choices_of_one_prompt(client):
    answer = client.chat.completions.create(model="fake", messages=user("say abc"), n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(i, "abc") for i in range(3)]
    assert answer.usage.completion_tokens == 12
    single = client.chat.completions.create(model="fake", messages=user("say abc"))
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens

    texts = ["", "", ""]
    ends = []
    stream = client.chat.completions.create(model="fake", messages=user("say abc"), n=3, stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert texts == ["abc"] * 3
    assert sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens_cuts_the_text_and_frees_the_engine(http, engine, stream):
    body = {"messages": user("count"), "stop": ["7 8", "nothing"], "max_tokens": 100, "stream": stream}
    if stream:
        with http.stream("POST", CHAT, json=body | {"stream_options": {"include_usage": True}}) as response:
            chunks = events(response)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        choice, counts = chunks[-2]["choices"][0], chunks[-1]["usage"]
    else:
        answer = http.post(CHAT, json=body).json()
        choice, counts = answer["choices"][0], answer["usage"]
        text = choice["message"]["content"]
    assert text == "0 1 2 3 4 5 6 "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "7 8")
    assert counts["completion_tokens"] == len("0 1 2 3 4 5 6 7 8")
    assert eventually(lambda: engine.seen[-1].id in engine.cancelled)
    assert eventually(lambda: engine.num_running == 0)


def test_the_stop_string_stays_when_asked_for(http):
    body = {"messages": user("count"), "stop": "3", "include_stop_str_in_output": True}
    assert http.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == "0 1 2 3"


def test_a_stop_token_ends_the_text_before_itself(http):
    body = {"messages": user("say abcdef"), "stop_token_ids": [ord("d")]}
    answer = http.post(CHAT, json=body).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("d"))
    assert answer["usage"]["completion_tokens"] == 4
    shown = http.post(CHAT, json=body | {"include_stop_str_in_output": True}).json()
    assert shown["choices"][0]["message"]["content"] == "abcd"


def test_special_tokens_are_text_only_when_asked_for(http):
    body = {"messages": user("say ab"), "skip_special_tokens": False, "include_stop_str_in_output": True}
    assert http.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == "ab<|im_end|>"


def test_the_token_limit_is_told_as_length(client):
    answer = client.chat.completions.create(model="fake", messages=user("count"), max_tokens=5)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("0 1 2", "length")
    assert answer.usage.completion_tokens == 5


def test_chat_logprobs_have_bytes_and_alternatives(client):
    answer = client.chat.completions.create(model="fake", messages=user("say \u20ac"), logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [token.bytes for token in content[:3]] == [[0xE2], [0x82], [0xAC]]
    assert content[3].token == "<|im_end|>"
    assert len(content) == answer.usage.completion_tokens
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5, -9999.0]


def test_streamed_logprobs_are_those_of_the_whole_answer(http):
    body = {"messages": user("say a\u20acb"), "logprobs": True, "top_logprobs": 1, "stop": "b"}
    whole = http.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    with http.stream("POST", CHAT, json=body | {"stream": True}) as response:
        chunks = [event["choices"][0] for event in events(response)]
    streamed = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]]
    assert streamed == whole
    assert len(whole) == 5


def test_completions_take_a_prompt_in_four_forms(client):
    ids = list(b"say hi")
    for prompt, expected in (
        ("say hi", ["hi"]),
        (["say hi", "say ho"], ["hi", "ho"]),
        (ids, ["hi"]),
        ([ids, list(b"say ho")], ["hi", "ho"]),
    ):
        answer = client.completions.create(model="fake", prompt=prompt)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == 6 * len(expected)
    answer = client.completions.create(model="fake", prompt=["say a", "say b"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_echo_puts_the_prompt_in_front(client, http):
    answer = client.completions.create(model="fake", prompt=["say hi", "say ho"], echo=True)
    assert [choice.text for choice in answer.choices] == ["say hihi", "say hoho"]
    answer = client.completions.create(model="fake", prompt=list(b"say hi"), echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("say hi", 0)
    body = {"prompt": "say hi", "echo": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert "".join(event["choices"][0]["text"] for event in events(response)) == "say hihi"


def test_completion_logprobs_have_offsets_into_the_text(client):
    answer = client.completions.create(model="fake", prompt="say a\u20acb", logprobs=2, max_tokens=5)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "a\u20acb"
    assert logprobs.tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert logprobs.text_offset == [0, 1, 1, 1, 2]
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.5}


def test_a_completion_stream_ends_with_its_reason(client):
    chunks = list(client.completions.create(model="fake", prompt="count", max_tokens=7, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "0 1 2 3"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_conversation_with_parts_names_and_leftovers_of_earlier_answers(http, engine):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "first", "name": "ann"},
        {"role": "assistant", "content": "answer", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "say x"},
    ]
    assert http.post(CHAT, json={"messages": messages}).status_code == 200
    plain = [
        {"role": "system", "content": "be \nbrief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "say x"},
    ]
    text = engine.tokenizer.render(plain, generation_prompt=True)
    assert engine.seen[-1].prompt == tuple(engine.tokenizer.encode(text))


def test_tokenize_and_detokenize_have_vllms_shapes(http):
    answer = http.post("/tokenize", json={"model": "fake", "prompt": "a\u20ac", "return_token_strs": True}).json()
    assert answer == {
        "count": 4,
        "max_model_len": 400,
        "tokens": [97, 0xE2, 0x82, 0xAC],
        "token_strs": ["a", "\ufffd", "\ufffd", "\ufffd"],
    }
    chat = http.post("/tokenize", json={"messages": user("x"), "add_generation_prompt": False}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {
        "prompt": "<|im_start|>user\nx<|im_end|>\n"
    }


def test_adapters_are_loaded_and_unloaded_by_the_engine(http, client, engine):
    body = {"lora_name": "later", "lora_path": "/adapters/later"}
    assert http.post("/v1/load_lora_adapter", json=body).text == "Success: LoRA adapter 'later' added successfully."
    assert engine.adapters[-1] == {
        "op": "load", "name": "later", "path": "/adapters/later", "reply": engine.adapters[-1]["reply"],
    }  # fmt: skip
    assert [card.id for card in client.models.list().data] == ["fake", "tuned", "later"]
    client.chat.completions.create(model="later", messages=user("say x"))
    assert engine.seen[-1].adapter == "later"

    twice = http.post("/v1/load_lora_adapter", json=body)
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "lora_name")
    assert "already served" in twice.json()["error"]["message"]

    removed = http.post("/v1/unload_lora_adapter", json={"lora_name": "later"})
    assert removed.text == "Success: LoRA adapter 'later' removed successfully."
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="later", messages=user("say x"))

    missing = http.post("/v1/load_lora_adapter", json={"lora_name": "m", "lora_path": "/missing"})
    assert (missing.status_code, missing.json()["error"]["message"]) == (400, "/missing holds no adapter")
    for name in ("fake", "nobody"):
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 404


def test_metrics_count_requests_and_tokens_under_vllms_names(http, client):
    def values() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if line and line[0] != "#"]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    labels = 'engine="0",model_name="fake"'
    before = values()
    client.completions.create(model="fake", prompt="say abc")
    client.completions.create(model="fake", prompt="count", max_tokens=4)
    after = values()

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown(f"vllm:prompt_tokens_total{{{labels}}}") == 7 + 5
    assert grown(f"vllm:generation_tokens_total{{{labels}}}") == 4 + 4
    for reason in ("stop", "length"):
        series = f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="fake"}}'
        assert grown(series) == 1
    for name, count in (("time_to_first_token", 2), ("inter_token_latency", 6), ("e2e_request_latency", 2)):
        assert grown(f"vllm:{name}_seconds_count{{{labels}}}") == count
    assert after[f"vllm:num_requests_running{{{labels}}}"] == 0
    assert after[f"vllm:num_requests_waiting{{{labels}}}"] == 0
    assert after[f"vllm:kv_cache_usage_perc{{{labels}}}"] == 0.25
    assert after[f"vllm:num_preemptions_total{{{labels}}}"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["count", "wait"])
def test_a_client_that_goes_away_is_cancelled_at_once(engine, stream, prompt):
    """Before its first token and in the middle of its text, streaming or not, by closing the connection."""
    body = json.dumps({"prompt": f"{prompt} ", "max_tokens": 390, "stream": stream, "temperature": 0}).encode()
    slow, engine.step_seconds = engine.step_seconds, 0.02
    seen = len(engine.seen)
    with socket.create_connection(("127.0.0.1", engine.handle.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert eventually(lambda: len(engine.seen) > seen)
        time.sleep(0.1)
    left = time.monotonic()
    id = engine.seen[seen].id
    assert eventually(lambda: id in engine.cancelled)
    engine.step_seconds = slow
    assert engine.cancelled[id] - left < 1.0
    assert eventually(lambda: engine.num_running == 0)


def test_closing_a_stream_of_the_openai_client_cancels_it(client, engine):
    slow, engine.step_seconds = engine.step_seconds, 0.01
    stream = client.chat.completions.create(model="fake", messages=user("count"), stream=True)
    for _, chunk in zip(range(3), stream, strict=False):
        assert chunk.choices
    stream.close()
    assert eventually(lambda: engine.seen[-1].id in engine.cancelled)
    engine.step_seconds = slow


def test_an_engine_error_is_a_500_and_in_a_stream_an_error_event(client, http):
    with pytest.raises(openai.InternalServerError, match="the model broke"):
        client.chat.completions.create(model="fake", messages=user("fail"))
    with pytest.raises(openai.APIError, match="the model broke"):
        list(client.chat.completions.create(model="fake", messages=user("fail"), stream=True))
    body = {"prompt": ["fail", "wait"], "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert events(response)[-1]["error"]["type"] == "server_error"


def test_one_failed_choice_frees_the_others(http, engine):
    assert http.post("/v1/completions", json={"prompt": ["wait", "fail"]}).status_code == 500
    waiting = engine.seen[-2]
    assert eventually(lambda: waiting.id in engine.cancelled)


def test_64_streams_at_once_all_end_with_their_own_text(client, engine):
    texts = {i: f"{i}: " + "\u20acx" * (i % 7 + 3) for i in range(64)}
    got: dict[int, str] = {}

    def ask(index: int) -> None:
        answer = client.completions.create(
            model="fake", prompt=f"say {texts[index]}", stream=index % 2 == 0, max_tokens=200
        )
        chunks = answer if index % 2 == 0 else [answer]
        got[index] = "".join(chunk.choices[0].text for chunk in chunks)

    threads = [threading.Thread(target=ask, args=(index,)) for index in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == texts
    assert engine.num_running == 0
