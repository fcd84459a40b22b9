"""What a request asks for and what the engine answers, as plain frozen data (no torch here).

The API process and the engine exchange exactly these three things as dicts of JSON types:

    API process                                       engine (every rank)
      Request.to_dict()  ---- submit ---->  Request.from_dict() -> Scheduler.add
      Output.from_dict() <--- outputs ----  Output.to_dict()    <- Scheduler.update

Text never appears: stop strings, detokenising and chat templates belong to the API process. A bad value
raises `RequestError`, whose message names the field, the value and the rule; its `field` is OpenAI's `param`.
"""

from __future__ import annotations

import difflib
import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast, get_args

Finish = Literal["stop", "length", "abort", "error"]
"""Why a request ended: a stop token, the token limit, a cancel, or a failure told in `Output.error`."""

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for per token, as OpenAI's `top_logprobs`."""

INVALID_TOKEN = -1
"""What the sampler returns for a row without finite logits; the scheduler ends that request with an error."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would only overflow (as in vLLM)."""


class RequestError(ValueError):
    """A value in a request breaks a rule; the API answers it with HTTP 400. `field` names the culprit."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field}={reprlib.repr(value)} {rule}")
        self.field = field


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(field: str, value: object, low: int, high: int | None = None) -> None:
    if not _is_int(value) or cast(int, value) < low or (high is not None and cast(int, value) > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(field, value, f"must be a whole number {bounds}")


def _check_number(field: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """The bounds also refuse nan, infinities and integers too large for a float."""
    good = _is_int(value) or isinstance(value, float)
    if not good or not low <= cast(float, value) <= high or (above and value == low):
        raise RequestError(field, value, f"must be a number {'above' if above else 'from'} {low} to {high}")


def _check_ids(field: str, ids: object) -> None:
    if not isinstance(ids, tuple):
        raise RequestError(field, ids, "must be a list of token ids")
    for token in cast("tuple[object, ...]", ids):
        if not _is_int(token) or cast(int, token) < 0:
            raise RequestError(field, token, "is not a token id: ids are whole numbers of at least 0")


def _check_bias(pairs: object) -> None:
    if not isinstance(pairs, tuple):
        raise RequestError("logit_bias", pairs, "must map token ids to numbers")
    seen: set[int] = set()
    for pair in cast("tuple[object, ...]", pairs):
        if not isinstance(pair, tuple) or len(cast("tuple[object, ...]", pair)) != 2:
            raise RequestError("logit_bias", pair, "must be a pair of a token id and a number")
        token, bias = cast("tuple[int, float]", pair)
        _check_ids("logit_bias", (token,))
        _check_number("logit_bias", bias, -100, 100)
        if token in seen:
            raise RequestError("logit_bias", token, "is named twice")
        seen.add(token)


def _check_fields(cls: type, values: object, required: Sequence[str] = ()) -> None:
    """Raises unless `values` is a mapping with the required and no unknown fields of the dataclass `cls`."""
    if not isinstance(values, Mapping):
        raise RequestError(cls.__name__, values, "must be an object")
    known = [field.name for field in fields(cls)]
    given = cast("Mapping[str, object]", values)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise RequestError(str(name), given[name], "is unknown" + (f"; did you mean {near[0]}?" if near else ""))
    for name in required:
        if name not in given:
            raise RequestError(name, None, "is missing")


def _as_tuple(value: Any) -> Any:
    """A list as a tuple; anything else as it is, for the dataclass to refuse."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _as_pairs(value: Any) -> Any:
    """`{"5": 1.0}` or `[[5, 1.0]]` as `((5, 1.0),)`; anything else as it is, for the dataclass to refuse."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return tuple((int(key) if str(key).isdecimal() and len(str(key)) < 20 else key, bias) for key, bias in items)
    if isinstance(value, (list, tuple)):
        return tuple(_as_tuple(pair) for pair in cast("Sequence[Any]", value))
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token of a request is chosen and when the request ends; checked on construction.

    Raises `RequestError` for a value of the wrong type or out of range.
    """

    max_tokens: int | None = None
    """Most tokens to generate, >= 1; None = up to the context length."""
    temperature: float = 1.0
    """Divides the logits; 0 = greedy."""
    top_k: int = 0
    """Keep the k most likely tokens (and those tied with the last of them); 0 or -1 = off."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p; 1 = off."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one; 0 = off."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of prompt and output tokens (arXiv:1909.05858, 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of output tokens once per occurrence."""
    seed: int | None = None
    """Seed of the draws; None = derived from the request's id (`Request.seed`)."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the request besides the model's own end tokens."""
    ignore_eos: bool = False
    """Generate on past the model's end tokens."""
    min_tokens: int = 0
    """Tokens to generate before a stop token may be drawn."""
    logprobs: int | None = None
    """Alternatives to report with every token's log-probability; 0 = only the chosen one, None = nothing."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, value added to its logit) pairs, tokens distinct; `from_dict` takes OpenAI's form too."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_number("temperature", self.temperature, 0, 100)
        _check_int("top_k", self.top_k, -1)
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_ids("stop_ids", self.stop_ids)
        if not isinstance(cast(object, self.ignore_eos), bool):
            raise RequestError("ignore_eos", self.ignore_eos, "must be true or false")
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_bias(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature < GREEDY_BELOW

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; `from_dict` gives back an equal object."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["stop_ids"] = list(self.stop_ids)
        values["logit_bias"] = [list(pair) for pair in self.logit_bias]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Reads `to_dict`'s form; missing fields take their defaults, unknown ones raise `RequestError`.

        `logit_bias` may also be OpenAI's object `{"token id": bias}`.
        """
        _check_fields(cls, values)
        changed = dict(values)
        if "stop_ids" in values:
            changed["stop_ids"] = _as_tuple(values["stop_ids"])
        if "logit_bias" in values:
            changed["logit_bias"] = _as_pairs(values["logit_bias"])
        return cls(**changed)


MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of a generation_config.json that stand in for what a request doesn't say."""


def model_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """The sampling defaults of a model's generation_config.json, as vLLM's `--generation-config auto` takes them.

    A field that is absent or null has no default of the model's; `do_sample` is not looked at. Raises `RequestError`
    for a value that no request could send.
    """
    found = {name: generation[name] for name in MODEL_DEFAULTS if generation.get(name) is not None}
    SamplingParams(**found)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to continue. Raises `RequestError` for an empty id or prompt and for ids below 0."""

    id: str
    """Unique among the live requests; names the request in every message."""
    prompt: tuple[int, ...]
    """Prompt tokens, at least one."""
    sampling: SamplingParams = SamplingParams()
    """How to sample, when to stop."""
    adapter: str | None = None
    """Name of the adapter to run with; None = the base model."""

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.id), str) or not self.id:
            raise RequestError("id", self.id, "must be a text that isn't empty")
        _check_ids("prompt", self.prompt)
        if not self.prompt:
            raise RequestError("prompt", self.prompt, "must hold at least one token")
        if not isinstance(cast(object, self.sampling), SamplingParams):
            raise RequestError("sampling", self.sampling, "must be SamplingParams")
        if self.adapter is not None and (not isinstance(cast(object, self.adapter), str) or not self.adapter):
            raise RequestError("adapter", self.adapter, "must be an adapter's name or null")

    @property
    def seed(self) -> int:
        """The seed of its draws: `sampling.seed`, or else a hash of `id`; nothing of the batch, no clock."""
        if self.sampling.seed is not None:
            return self.sampling.seed
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=8).digest(), "little", signed=True)

    def check(self, *, vocab_size: int, max_length: int) -> None:
        """Raises `RequestError` unless all token ids are below `vocab_size` and prompt + 1 fits `max_length`.

        The API process calls it to answer 400 at once; the scheduler calls it again, for whoever didn't.
        """
        if len(self.prompt) + 1 > max_length:
            rule = f"tokens leave no room for an answer in max_length={max_length}; shorten it"
            raise RequestError("prompt", len(self.prompt), rule)
        named = {
            "prompt": self.prompt,
            "stop_ids": self.sampling.stop_ids,
            "logit_bias": tuple(token for token, _ in self.sampling.logit_bias),
        }
        for field, ids in named.items():
            largest = max(ids, default=0)
            if largest >= vocab_size:
                raise RequestError(field, largest, f"is not a token: ids end below vocab_size={vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        """The submit message: id, prompt, sampling, adapter as JSON types."""
        return {
            "id": self.id,
            "prompt": list(self.prompt),
            "sampling": self.sampling.to_dict(),
            "adapter": self.adapter,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Reads `to_dict`'s form; raises `RequestError` for missing, unknown and bad fields."""
        _check_fields(cls, values, required=("id", "prompt"))
        return cls(
            id=values["id"],
            prompt=_as_tuple(values["prompt"]),
            sampling=SamplingParams.from_dict(values.get("sampling", {})),
            adapter=values.get("adapter"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities of one generated token under the model's own, unmodified distribution."""

    id: int
    """The token that was chosen."""
    logprob: float
    """Its log-probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token, logprob) pairs, likeliest first, ties by lowest id; `id` needn't be there."""

    def to_dict(self) -> dict[str, Any]:
        """`{"id", "logprob", "top": [[id, logprob], ...]}`."""
        return {"id": self.id, "logprob": self.logprob, "top": [list(pair) for pair in self.top]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenLogprob:
        """Reads `to_dict`'s form."""
        return cls(id=values["id"], logprob=values["logprob"], top=_as_pairs(values["top"]))


class Output(NamedTuple):
    """What one engine step gave one request; a named tuple, for one is made per token."""

    id: str
    """The request."""
    tokens: tuple[int, ...] = ()
    """New tokens. If `finish` is "stop" the last one is the stop token: it counts as usage, it isn't text."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per token, if the request asked for them."""
    finish: Finish | None = None
    """Why the request ended with this step; None = it goes on."""
    error: str | None = None
    """The message that goes with finish="error"."""

    def to_dict(self) -> dict[str, Any]:
        """The output message: id, tokens, logprobs, finish, error as JSON types."""
        return {
            "id": self.id,
            "tokens": list(self.tokens),
            "logprobs": None if self.logprobs is None else [entry.to_dict() for entry in self.logprobs],
            "finish": self.finish,
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Output:
        """Reads `to_dict`'s form."""
        entries, finish, error = (values[name] for name in ("logprobs", "finish", "error"))
        assert finish is None or finish in get_args(Finish), finish
        assert (error is not None) == (finish == "error"), (finish, error)
        return cls(
            id=values["id"],
            tokens=tuple(values["tokens"]),
            logprobs=None if entries is None else tuple(TokenLogprob.from_dict(entry) for entry in entries),
            finish=finish,
            error=error,
        )
