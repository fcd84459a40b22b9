"""Bad requests over a real socket: each gets OpenAI's error shape and a message that says what to change."""

import json
import socket

import httpx
import openai
import pytest

from tests.fake_engine import running

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "say x"}]


@pytest.fixture(scope="module")
def http():
    with running(api_key="secret") as engine:
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=engine.url, timeout=20, headers=headers) as client:
            yield client


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


CHAT_CASES = {
    "negative limit": ({"max_tokens": -1}, "max_tokens", "max_tokens=-1 must be at least 1"),
    "zero limit": ({"max_completion_tokens": 0}, "max_completion_tokens", "must be at least 1"),
    "limit of another type": ({"max_tokens": "5"}, "max_tokens", "max_tokens='5': input should be a valid integer"),
    "two limits": ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ; send one of them"),
    "limit beyond the context": (
        {"max_tokens": 400},
        "max_tokens", "tokens and max_tokens=400 exceed the model's context of 400",
    ),
    "no messages": ({"messages": []}, "messages", "messages is empty"),
    "messages of another type": ({"messages": "hi"}, "messages", "valid list"),
    "message of another type": ({"messages": ["hi"]}, "messages.0", "valid dictionary"),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        "messages", "messages[0].role='robot' is unknown",
    ),
    "no role": ({"messages": [{"content": "x"}]}, "messages", "messages[0].role=None is unknown"),
    "no content": ({"messages": [{"role": "user"}]}, "messages", "messages[0].content must be text"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages", "only text is supported",
    ),
    "unknown message field": (
        {"messages": [{"role": "user", "content": "x", "mood": "good"}]},
        "messages[0].mood", "not supported",
    ),
    "tool call without a function": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls", "no function call",
    ),
    "tool arguments that aren't JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[0].tool_calls", "arguments that aren't JSON",
    ),
    "half a surrogate pair": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "messages", "not Unicode text",
    ),
    "long prompt": (
        {"messages": [{"role": "user", "content": "x" * 500}]},
        "messages", "the prompt has 519 tokens, but the model's context holds 400",
    ),
    "huge prompt": (
        {"messages": [{"role": "user", "content": "x" * 10**6}]},
        "messages", "has more than 450 tokens, but the model's context holds 400",
    ),
    "misspelt field": ({"temprature": 1}, "temprature", "unknown field temprature; did you mean temperature?"),
    "unknown field": ({"qqqq": 1}, "qqqq", "unknown field qqqq"),
    "hot": ({"temperature": 200}, "temperature", "temperature=200.0 must be a number from 0 to 100"),
    "cold": ({"temperature": -0.1}, "temperature", "must be a number from 0"),
    "true is no number": ({"temperature": True}, "temperature", "valid number"),
    "top_p": ({"top_p": 0}, "top_p", "above 0"),
    "seed": ({"seed": 2**63}, "seed", "seed=9223372036854775808 must be"),
    "no answers": ({"n": 0}, "n", "n=0 must be from 1 to 128"),
    "stop of another type": ({"stop": [1]}, "stop.0", "valid string"),
    "empty stop": ({"stop": ["a", ""]}, "stop", "empty string"),
    "many stops": ({"stop": ["a"] * 17}, "stop", "17 strings; at most 16"),
    "bias": ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    "bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias", "is not a token id"),
    "bias beyond the vocabulary": ({"logit_bias": {"300": 1}}, "logit_bias", "vocab_size=300"),
    "stop token beyond the vocabulary": (
        {"stop_token_ids": [300]},
        "stop_token_ids", "stop_token_ids=300 is not a token",
    ),
    "alternatives without logprobs": ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs=true"),
    "many alternatives": (
        {"logprobs": True, "top_logprobs": 21},
        "top_logprobs", "top_logprobs=21 must be a whole number from 0 to 20",
    ),
    "min above max": ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens=4"),
    "stream options without a stream": (
        {"stream_options": {"include_usage": True}},
        "stream_options", "needs stream=true",
    ),
    "unknown stream option": (
        {"stream": True, "stream_options": {"include_usge": True}},
        "include_usge", "did you mean include_usage?",
    ),
    "JSON mode": ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    "forced tool": ({"tool_choice": "required"}, "tool_choice", "not supported"),
    "named tool": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice", "not supported",
    ),
    "tools the template can't show": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools", "no place for tools",
    ),
    "own template": ({"chat_template": "x"}, "chat_template", "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT_CASES)
def test_a_bad_chat_is_a_400_that_names_the_field(http, case):
    body, param, message = CHAT_CASES[case]
    refusal = error(http.post(CHAT, content=json.dumps({"messages": USER} | body)), 400)
    assert refusal["param"] == param
    assert message in refusal["message"]
    assert refusal["type"] == "invalid_request_error"


COMPLETION_CASES = {
    "no prompt": ({}, "prompt", "prompt is missing"),
    "number": ({"prompt": 5}, "prompt", "must be a string, a list of strings, a list of token ids"),
    "no prompts": ({"prompt": []}, "prompt", "must be a string"),
    "mixed": ({"prompt": [1, "a"]}, "prompt", "but holds 1"),
    "empty": ({"prompt": ""}, "prompt", "must hold at least one token"),
    "negative id": ({"prompt": [-1]}, "prompt", "is not a token id"),
    "id beyond the vocabulary": ({"prompt": [300]}, "prompt", "vocab_size=300"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    "echo with logprobs": ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs", "drop one of the two"),
    "nothing to generate": ({"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
    "best of": ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
    "many answers": ({"prompt": ["a"] * 100, "n": 100}, "prompt", "100 prompts with n=100"),
    "long": ({"prompt": [1] * 400}, "prompt", "the prompt has 400 tokens, but the model's context holds 400"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLETION_CASES)
def test_a_bad_completion_is_a_400_that_names_the_field(http, case):
    body, param, message = COMPLETION_CASES[case]
    refusal = error(http.post("/v1/completions", json=body), 400)
    assert refusal["param"] == param
    assert message in refusal["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "isn't valid JSON"),
        (b"", "the request has no body"),
        (b"[1, 2]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[" * 100_000, ""),
        (b'{"messages": ' + b"9" * 5000 + b"}", ""),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature=nan"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature=inf"),
    ],
)
def test_a_body_that_is_no_request_is_a_400(http, body, message):
    assert message in error(http.post(CHAT, content=body), 400)["message"]


def test_an_unknown_model_is_a_404_that_lists_the_known_ones(http):
    refusal = error(http.post(CHAT, json={"model": "gpt-5", "messages": USER}), 404)
    assert refusal["message"] == "model=gpt-5 is not served here; there is fake, tuned"
    assert (refusal["param"], refusal["code"]) == ("model", "model_not_found")
    error(http.post(CHAT, content=b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}'), 404)
    error(http.get("/v1/models/nobody"), 404)
    error(http.post("/tokenize", json={"model": "nobody", "prompt": "x"}), 404)
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="secret", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="model=gpt-5 is not served here") as caught:
            client.chat.completions.create(model="gpt-5", messages=USER)
        assert caught.value.code == "model_not_found"
        client.api_key = "wrong"
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            client.models.list()


def test_routes_and_methods_that_are_not_there(http):
    assert "GET /v2/models: no such route" in error(http.get("/v2/models"), 404)["message"]
    error(http.get(CHAT), 405)


def test_the_key_is_wanted_everywhere_but_at_health_and_metrics(http):
    for key in (None, "Bearer wrong", "secret", "Bearer", "Bearer s\u00e9cret".encode()):
        headers = {} if key is None else {"Authorization": key}
        with httpx.Client(base_url=http.base_url, timeout=20, headers=headers) as stranger:
            for path in ("/v1/models", "/tokenize", "/openapi.json", "/nowhere"):
                refusal = error(stranger.get(path), 401)
                assert refusal["code"] == "invalid_api_key"
            assert error(stranger.post(CHAT, json={"messages": USER}), 401)["type"] == "authentication_error"
            assert stranger.get("/health").status_code == 200
            assert stranger.get("/metrics").status_code == 200


def test_a_body_that_is_too_large_is_a_413_with_and_without_a_length(http):
    host, port = http.base_url.host, http.base_url.port
    with socket.create_connection((host, port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            b"Content-Length: 99999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]

    def chunks():
        for _ in range(40):
            yield b"x" * 2**19

    refusal = error(http.post(CHAT, content=chunks()), 413)
    assert "larger than 16777216 bytes" in refusal["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": "x" * (2**18 + 1)}, "prompt"),
        ("/tokenize", {"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/v1/load_lora_adapter", {"lora_name": "x"}, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "a\nb", "lora_path": "/x"}, "lora_name"),
    ],
)
def test_bad_requests_to_the_other_routes(http, path, body, param):
    assert error(http.post(path, json=body), 400)["param"] == param


def test_the_server_lives_on_after_all_of_this(http):
    answer = http.post(CHAT, json={"messages": USER}).json()
    assert answer["choices"][0]["message"]["content"] == "x"
