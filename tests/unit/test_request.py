"""Requests and outputs: what is refused, with which words, and the round trip through JSON."""

import json
import subprocess
import sys

import pytest

from serve.request import Output, Request, RequestError, SamplingParams, TokenLogprob, model_defaults

BAD_SAMPLING = [
    ("max_tokens", 0, "max_tokens=0 must be a whole number of at least 1"),
    ("max_tokens", -5, "max_tokens=-5 must be"),
    ("max_tokens", 2.0, "max_tokens=2.0 must be"),
    ("max_tokens", True, "max_tokens=True must be"),
    ("max_tokens", "7", "max_tokens='7' must be"),
    ("temperature", -0.1, "temperature=-0.1 must be a number from 0 to 100"),
    ("temperature", float("nan"), "temperature=nan must be"),
    ("temperature", float("inf"), "temperature=inf must be"),
    ("temperature", 10**400, "temperature=1000.*0000 must be"),
    ("temperature", None, "temperature=None must be"),
    ("top_k", -2, "top_k=-2 must be a whole number of at least -1"),
    ("top_p", 0, "top_p=0 must be a number above 0 to 1"),
    ("top_p", 1.01, "top_p=1.01 must be"),
    ("min_p", -0.01, "min_p=-0.01 must be a number from 0 to 1"),
    ("min_p", 1.5, "min_p=1.5 must be"),
    ("repetition_penalty", 0, "repetition_penalty=0 must be a number from 0.01 to 100"),
    ("presence_penalty", 2.5, "presence_penalty=2.5 must be a number from -2 to 2"),
    ("frequency_penalty", -2.5, "frequency_penalty=-2.5 must be"),
    ("seed", 2**63, "seed=9223372036854775808 must be a whole number from"),
    ("seed", 1.5, "seed=1.5 must be"),
    ("stop_ids", 5, "stop_ids=5 must be a list of token ids"),
    ("stop_ids", [-1], "stop_ids=-1 is not a token id"),
    ("stop_ids", ["a"], "stop_ids='a' is not a token id"),
    ("ignore_eos", 1, "ignore_eos=1 must be true or false"),
    ("min_tokens", -1, "min_tokens=-1 must be a whole number of at least 0"),
    ("logprobs", 21, "logprobs=21 must be a whole number from 0 to 20"),
    ("logprobs", -1, "logprobs=-1 must be"),
    ("logit_bias", 3, "logit_bias=3 must map token ids to numbers"),
    ("logit_bias", {"x": 1}, "logit_bias='x' is not a token id"),
    ("logit_bias", {"5": 101}, "logit_bias=101 must be a number from -100 to 100"),
    ("logit_bias", {"5": None}, "logit_bias=None must be a number"),
    ("logit_bias", [[5, 1.0], [5, 2.0]], "logit_bias=5 is named twice"),
    ("logit_bias", [[5]], r"logit_bias=\(5,\) must be a pair"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_SAMPLING)
def test_a_bad_value_is_refused_by_field_value_and_rule(field, value, message):
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams.from_dict({field: value})
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


def test_a_models_generation_config_gives_the_defaults_that_a_request_may_leave_open():
    generation = {"temperature": 0.7, "top_k": 20, "top_p": None, "eos_token_id": [2], "max_new_tokens": 9}
    assert model_defaults(generation) == {"temperature": 0.7, "top_k": 20}
    assert model_defaults({}) == {}
    with pytest.raises(RequestError, match=r"top_p=1\.5 must be a number above 0 to 1"):
        model_defaults({"top_p": 1.5})


def test_fields_are_checked_against_each_other():
    with pytest.raises(RequestError, match="min_tokens=5 must be at most max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5).max_tokens is None


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(RequestError, match=r"temprature=1 is unknown; did you mean temperature\?"):
        SamplingParams.from_dict({"temprature": 1})
    with pytest.raises(RequestError, match="text='x' is unknown"):
        Request.from_dict({"id": "a", "prompt": [1], "text": "x"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": [1]}, "id=None is missing"),
        ({"id": "a"}, "prompt=None is missing"),
        ({"id": "", "prompt": [1]}, "id='' must be a text"),
        ({"id": "a", "prompt": []}, r"prompt=\(\) must hold at least one token"),
        ({"id": "a", "prompt": [1, -2]}, "prompt=-2 is not a token id"),
        ({"id": "a", "prompt": [1.0]}, "prompt=1.0 is not a token id"),
        ({"id": "a", "prompt": "hello"}, "prompt='hello' must be a list of token ids"),
        ({"id": "a", "prompt": [1], "adapter": ""}, "adapter='' must be an adapter's name"),
        ({"id": "a", "prompt": [1], "sampling": []}, r"SamplingParams=\[\] must be an object"),
    ],
)
def test_a_bad_request_is_refused(values, message):
    with pytest.raises(RequestError, match=message):
        Request.from_dict(values)


def test_ids_and_length_are_checked_against_the_model():
    limits = {"vocab_size": 10, "max_length": 4}
    Request(id="a", prompt=(9, 9, 9)).check(**limits)
    with pytest.raises(RequestError, match="prompt=4 tokens leave no room for an answer in max_length=4"):
        Request(id="a", prompt=(1, 1, 1, 1)).check(**limits)
    with pytest.raises(RequestError, match="prompt=10 is not a token: ids end below vocab_size=10"):
        Request(id="a", prompt=(1, 10)).check(**limits)
    with pytest.raises(RequestError, match="stop_ids=12 is not a token"):
        Request(id="a", prompt=(1,), sampling=SamplingParams(stop_ids=(12,))).check(**limits)
    with pytest.raises(RequestError, match="logit_bias=11 is not a token"):
        Request(id="a", prompt=(1,), sampling=SamplingParams(logit_bias=((11, 1.0),))).check(**limits)


def test_messages_survive_json():
    sampling = SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_k=3,
        seed=-7,
        stop_ids=(4, 5),
        logprobs=2,
        logit_bias=((7, -1.5), (2, 3.0)),
    )
    request = Request(id="a", prompt=(1, 2, 3), sampling=sampling, adapter="facts")
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    plain = Request(id="b", prompt=(1,))
    assert Request.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert Request.from_dict({"id": "b", "prompt": [1]}) == plain
    entry = TokenLogprob(id=3, logprob=-0.5, top=((3, -0.5), (8, -1.0)))
    for output in (
        Output(id="a", tokens=(3,), logprobs=(entry,)),
        Output(id="a", tokens=(3,), finish="length"),
        Output(id="a", finish="error", error="why"),
    ):
        assert Output.from_dict(json.loads(json.dumps(output.to_dict()))) == output


def test_the_message_has_the_agreed_shape():
    entry = TokenLogprob(id=3, logprob=-0.5, top=((8, -0.25),))
    assert Output(id="a", tokens=(3,), logprobs=(entry,), finish="stop").to_dict() == {
        "id": "a",
        "tokens": [3],
        "logprobs": [{"id": 3, "logprob": -0.5, "top": [[8, -0.25]]}],
        "finish": "stop",
        "error": None,
    }


def test_logit_bias_takes_openai_keys():
    assert SamplingParams.from_dict({"logit_bias": {"5": 1, "7": -2.5}}).logit_bias == ((5, 1), (7, -2.5))


def test_the_default_seed_comes_from_the_id_alone():
    first = Request(id="a", prompt=(1,))
    assert first.seed == Request(id="a", prompt=(2, 3), adapter="x").seed
    assert first.seed != Request(id="b", prompt=(1,)).seed
    assert -(2**63) <= first.seed < 2**63
    assert Request(id="a", prompt=(1,), sampling=SamplingParams(seed=5)).seed == 5


def test_requests_pages_and_scheduler_import_without_torch():
    code = "import sys, serve.request, serve.blocks, serve.scheduler; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
