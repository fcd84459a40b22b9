"""Messages and tools from the wire to the chat template."""

import asyncio

import pytest

from parallel.model.tokenizer import Tokenizer, TokenizerFacts
from parallel.model.tokenizer_bytes import byte_tokenizer
from serve.errors import ApiError
from serve.messages import template_messages
from serve.text import TextModel

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
    "<{{ call.function.name }} {{ call.function.arguments.city }}>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def model(template: str = TEMPLATE) -> TextModel:
    return TextModel(Tokenizer(byte_tokenizer()._backend, TokenizerFacts(eos="<|im_end|>", template=template)))


def rendered(text: TextModel, messages, tools=(), **options) -> str:
    options = {"generation_prompt": True, "limit": 1000} | options
    prompt = asyncio.run(text.chat(template_messages(messages), tools, **options))
    return text.tokenizer.decode(prompt.ids)


def test_tools_calls_and_results_reach_the_template():
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"},
    ]
    text = rendered(model(), messages, [TOOL])
    assert text == (
        '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]\n'
        "user: rain?\nassistant: <weather Oslo>\ntool: sun\nassistant:"
    )


def test_the_header_of_the_answer_can_be_left_out():
    assert rendered(model(), [{"role": "user", "content": "a"}], generation_prompt=False) == "user: a\n"


def test_a_template_without_a_place_for_tools_refuses_them():
    with pytest.raises(ApiError, match="no place for tools") as caught:
        rendered(TextModel(byte_tokenizer()), [{"role": "user", "content": "a"}], [TOOL])
    assert (caught.value.status, caught.value.param) == (400, "tools")


def test_what_the_template_refuses_is_a_400_with_its_reason():
    strict = model("{% if messages | length > 1 %}{{ raise_exception('only one turn') }}{% endif %}x")
    with pytest.raises(ApiError, match="only one turn") as caught:
        rendered(strict, [{"role": "user", "content": "a"}] * 2)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_model_without_a_template_says_so():
    plain = TextModel(Tokenizer(byte_tokenizer()._backend, TokenizerFacts()))
    with pytest.raises(ApiError, match="the model has no chat template"):
        rendered(plain, [{"role": "user", "content": "a"}])


def test_history_as_clients_send_it_back_is_cleaned():
    answer = {
        "role": "assistant", "content": "hi", "refusal": None, "audio": None, "annotations": [],
        "function_call": None, "tool_calls": [], "name": None,
    }  # fmt: skip
    assert template_messages([{"role": "developer", "content": "x"}, answer]) == [
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": "hi"},
    ]
    with pytest.raises(ApiError, match=r"messages\[0\]\.refusal is not supported"):
        template_messages([{"role": "assistant", "content": "hi", "refusal": "no"}])


def test_arguments_that_are_objects_already_stay():
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert template_messages([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [call]
    for arguments in ("[1]", "5"):
        bad = {"function": {"name": "weather", "arguments": arguments}}
        with pytest.raises(ApiError, match="arguments that aren't an object"):
            template_messages([{"role": "assistant", "tool_calls": [bad]}])


def test_long_texts_are_refused_before_they_are_tokenised_whole(monkeypatch):
    text = model()
    sizes: list[int] = []
    encode = text.tokenizer.encode

    def counted(part: str, **options) -> list[int]:
        sizes.append(len(part))
        return encode(part, **options)

    monkeypatch.setattr(text.tokenizer, "encode", counted)
    with pytest.raises(ApiError, match="more than 11250 tokens, but the model's context holds 10000"):
        asyncio.run(text.prompt("x" * 10**6, bos=True, limit=10_000))
    assert sizes == [16384]
    sizes.clear()
    assert len(asyncio.run(text.prompt("x" * 20_000, bos=True, limit=30_000)).ids) == 20_000
    assert sizes == [16384, 3616, 20_000]
