"""The requests of the HTTP interface: OpenAI's fields plus those vLLM adds.

A field that has no effect here is refused, not ignored: unknown fields (the message names the nearest known
one) and known ones whose feature isn't there (`refused`). Only bookkeeping that can't change an answer is
taken and dropped (`user`, `metadata`, ...). A field given as null counts as not given.

Ranges of the sampling fields are checked where sampling is defined (serve.request.SamplingParams).
"""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from serve.errors import ApiError
from serve.messages import template_messages
from serve.request import RequestError, SamplingParams
from serve.text import too_long

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


def _one_or_more(value: object) -> object:
    """A string as a list of one string; anything else as it is."""
    return [value] if isinstance(value, str) else value


def _text_or_ids(value: object) -> object:
    """A prompt in any of its four forms as a list of prompts, each a string or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    items = cast("list[object]", value)
    if all(_is_id(item) for item in items):
        return [items]
    for item in items:
        is_ids = isinstance(item, list) and all(_is_id(id) for id in cast("list[object]", item))
        if not isinstance(item, str) and not is_ids:
            raise ValueError(
                "must be a string, a list of strings, a list of token ids or a list of such lists, "
                f"but holds {reprlib.repr(item)}"
            )
    return items


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


Strings = Annotated[list[str], BeforeValidator(_one_or_more)]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_text_or_ids)]


class Body(BaseModel):
    """Base of all request bodies: strict types, null is absence, nothing is silently ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    dropped: ClassVar[frozenset[str]] = frozenset()
    """Fields that can't change the answer: taken and dropped."""
    refused: ClassVar[Mapping[str, Sequence[object]]] = {}
    """Fields whose feature isn't there, with the values that mean not using it."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise ApiError(400, "the request body must be a JSON object", code="invalid_json")
        given = {str(key): value for key, value in cast("dict[object, object]", data).items() if value is not None}
        kept: dict[str, object] = {}
        for name, value in given.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.refused:
                if (type(value), value) not in [(type(neutral), neutral) for neutral in cls.refused[name]]:
                    raise ApiError(
                        400,
                        f"{name}={reprlib.repr(value)} is not supported by this server; leave it out",
                        param=name,
                        code="unsupported_parameter",
                    )
            elif name not in cls.dropped:
                near = difflib.get_close_matches(name, cls.model_fields, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ApiError(400, f"unknown field {name}{hint}", param=name, code="unknown_parameter")
        return kept


class StreamOptions(Body):
    """What a stream carries besides the text."""

    dropped = frozenset({"include_obfuscation"})

    include_usage: bool = False


class GenerationBody(Body):
    """The fields that chat and plain completions share."""

    dropped = frozenset({
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls",
    })  # fmt: skip
    refused = {
        "response_format": ({"type": "text"},),
        "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
        "structured_outputs": (),
        "use_beam_search": (False,), "length_penalty": (1.0, 1), "best_of": (1,),
        "prompt_logprobs": (), "allowed_token_ids": (), "bad_words": ([],), "logits_processors": ([],),
        "truncate_prompt_tokens": (), "spaces_between_special_tokens": (True,), "priority": (0,),
        "return_token_ids": (False,), "return_tokens_as_token_ids": (False,),
    }  # fmt: skip

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    stop: Strings = []
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    prompt_field: ClassVar[str] = "prompt"
    """The field that the prompt comes from."""
    sampling_names: ClassVar[Mapping[str, str]] = {"stop_ids": "stop_token_ids"}
    """Names of the engine's fields where clients use others."""

    @model_validator(mode="after")
    def _check_shared(self) -> "GenerationBody":
        if not 1 <= self.n <= MAX_CHOICES:
            raise ApiError(400, f"n={self.n} must be from 1 to {MAX_CHOICES}", param="n")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ApiError(400, f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", param="stop")
        if "" in self.stop:
            raise ApiError(400, "stop holds an empty string", param="stop")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        return self

    @property
    def limit_field(self) -> str:
        """The name under which the client sent the token limit."""
        return "max_tokens"

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate, as the client said; None = up to the context."""
        return getattr(self, self.limit_field)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token to report; None = no report."""
        raise NotImplementedError

    def limit_for(self, prompt_tokens: int, max_length: int) -> int:
        """The most tokens to generate after a prompt of `prompt_tokens` in a context of `max_length`.

        Raises ApiError (400) for a limit below 1 and for what doesn't fit into the context.
        """
        limit = self.token_limit
        room = max_length - prompt_tokens
        if limit is not None and limit < 1:
            raise ApiError(400, f"{self.limit_field}={limit} must be at least 1", param=self.limit_field)
        if room < 1:
            raise too_long(prompt_tokens, max_length, self.prompt_field)
        if limit is not None and limit > room:
            raise ApiError(
                400,
                f"the prompt's {prompt_tokens} tokens and {self.limit_field}={limit} exceed the model's context of "
                f"{max_length}; shorten the prompt or send {self.limit_field}<={room}",
                param=self.limit_field,
                code="context_length_exceeded",
            )
        return room if limit is None else limit

    def refusal(self, error: RequestError) -> ApiError:
        """The 400 for a value that the engine's own classes refuse, under the name the client used."""
        field = self.sampling_names.get(error.field, error.field)
        return ApiError(400, field + str(error).removeprefix(error.field), param=field)

    def sampling(self, *, max_tokens: int, choice: int, defaults: Mapping[str, float]) -> SamplingParams:
        """The engine's parameters of the `choice`-th of `n` answers; `defaults` (the model's) where nothing is said.

        Raises ApiError (400) for a value out of range. With a seed, choice i draws with seed + i.
        """
        unsaid = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        try:
            return SamplingParams.from_dict(
                {
                    "max_tokens": max_tokens,
                    "temperature": self.temperature,
                    "top_k": self.top_k,
                    "top_p": self.top_p,
                    "min_p": self.min_p,
                    "repetition_penalty": self.repetition_penalty,
                    "presence_penalty": self.presence_penalty,
                    "frequency_penalty": self.frequency_penalty,
                    "seed": None if self.seed is None else self.seed + choice,
                    "stop_ids": self.stop_token_ids,
                    "ignore_eos": self.ignore_eos,
                    "min_tokens": self.min_tokens,
                    "logprobs": self.num_logprobs,
                    "logit_bias": self.logit_bias,
                    **unsaid,
                }
            )
        except RequestError as error:
            raise self.refusal(error) from error


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    refused = {
        **GenerationBody.refused,
        "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
        "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
        "web_search_options": (), "chat_template": (), "chat_template_kwargs": ({},), "documents": ([],),
        "continue_final_message": (False,), "echo": (False,), "add_special_tokens": (False,),
    }  # fmt: skip
    prompt_field = "messages"
    sampling_names = {**GenerationBody.sampling_names, "logprobs": "top_logprobs"}

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise ApiError(
                400,
                f"max_tokens={limits[0]} and max_completion_tokens={limits[1]} differ; send one of them",
                param="max_tokens",
            )
        self.messages = template_messages(self.messages)
        return self

    @property
    def limit_field(self) -> str:
        """OpenAI's newer name if it was used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """`top_logprobs` if log-probabilities are wanted."""
        return self.top_logprobs if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    refused = {**GenerationBody.refused, "suffix": ("",), "prompt_embeds": ()}

    prompt: Prompts
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo=true with logprobs needs log-probabilities of the prompt, which "
                                "are not supported; drop one of the two", param="logprobs")  # fmt: skip
        if len(self.prompt) * self.n > 8 * MAX_CHOICES:
            raise ApiError(
                400,
                f"{len(self.prompt)} prompts with n={self.n} make more than {8 * MAX_CHOICES} answers",
                param="prompt",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """`logprobs`, a number here."""
        return self.logprobs


class TokenizeBody(Body):
    """POST /tokenize: a prompt or the messages of a chat."""

    model: str = ""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "send either prompt or messages", param="prompt")
        if self.messages is not None:
            if self.add_special_tokens:
                raise ApiError(400, "add_special_tokens is for prompt; the chat template adds its own",
                               param="add_special_tokens")  # fmt: skip
            self.messages = template_messages(self.messages)
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str = ""
    tokens: list[int]


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter: an adapter of any kind, PEFT's format, in a directory of the server's."""

    refused = {"load_inplace": (False,)}

    lora_name: str
    lora_path: str

    @model_validator(mode="after")
    def _check_names(self) -> "LoadAdapterBody":
        for field, value in (("lora_name", self.lora_name), ("lora_path", self.lora_path)):
            if not value or not value.isprintable():
                raise ApiError(400, f"{field}={value!r} must be printable text", param=field)
        return self


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    dropped = frozenset({"lora_int_id"})

    lora_name: str
