"""The HTTP interface: routes, and the checks that need the model."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from serve import responses
from serve.access import Guard
from serve.client import EngineClient, Model, Phase
from serve.detokenize import Detokenizer
from serve.errors import ApiError, from_validation_errors
from serve.generation import Generation
from serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from serve.request import Request as EngineRequest
from serve.request import RequestError
from serve.responses import Answer, ChatAnswer, CompletionAnswer, Head
from serve.stream import EventStream, Outbox, cancelled_with_client
from serve.text import Prompt, TextModel


@dataclass(kw_only=True)
class State:
    """What the routes share: the engine, the way out for streams, and the tokenizer once it is loaded."""

    client: EngineClient
    outbox: Outbox = field(default_factory=Outbox)
    text: TextModel | None = None

    @property
    def phase(self) -> Phase:
        """The server's phase: ready when both the engine and the tokenizer are."""
        if self.client.phase is Phase.READY and self.text is None:
            return Phase.STARTING
        return self.client.phase

    def ready(self) -> TextModel:
        """The tokenizer of a server that takes requests; raises ApiError (503) for one that doesn't."""
        if self.phase is Phase.STARTING:
            raise ApiError(503, "the model is still being loaded; try again soon", code="starting")
        if self.phase is Phase.STOPPING or self.text is None:
            raise ApiError(503, "the server is shutting down", code="stopping")
        return self.text

    def model(self, name: str) -> Model:
        """The model a request names (the base for none); raises ApiError (404) listing what is served."""
        models = self.client.models
        if not name:
            return next(iter(models.values()))
        if name not in models:
            served = ", ".join(models)
            raise ApiError(
                404,
                f"model={name} is not served here; there is {served}",
                param="model",
                code="model_not_found",
            )
        return models[name]


def create_app(state: State, *, api_key: str | None) -> FastAPI:
    """The application; what changes while it runs is in `state`. With `api_key`, clients must send it."""
    app = FastAPI(title="onemesh", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_observation(app, state)
    _add_generation(app, state)
    _add_tokens(app, state)
    _add_adapters(app, state)
    app.add_middleware(Guard, api_key=api_key)
    return app


def _add_errors(app: FastAPI) -> None:
    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(error.body(), error.status, headers)

    async def bad_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        refusal = from_validation_errors(error.errors())
        return JSONResponse(refusal.body(), refusal.status)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        message = {
            400: "the request body can't be read as JSON",
            404: f"{where}: no such route",
            405: f"{where}: the route has other methods",
        }
        refusal = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
        return JSONResponse(refusal.body(), refusal.status, error.headers)

    async def failure(_: Request, error: Exception) -> Response:
        refusal = ApiError(500, f"the server failed: {type(error).__name__}")
        return JSONResponse(refusal.body(), refusal.status)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, bad_body)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, failure)


def _add_observation(app: FastAPI, state: State) -> None:
    @app.get("/health")
    async def health() -> Response:
        phase = state.phase
        return JSONResponse({"status": phase.value}, 200 if phase is Phase.READY else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = state.client.metrics.render() if state.client.metrics is not None else b""
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        state.ready()
        return JSONResponse({"object": "list", "data": [_card(model) for model in state.client.models.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        state.ready()
        return JSONResponse(_card(state.model(name)))


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "onemesh",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.max_length,
    }


def _add_generation(app: FastAPI, state: State) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        text = state.ready()
        model = state.model(body.model)
        prompt = await text.chat(
            body.messages, body.tools, generation_prompt=body.add_generation_prompt, limit=model.max_length
        )
        answer = ChatAnswer(
            head=_head("chatcmpl", model),
            pieces=text.tokenizer,
            with_logprobs=body.num_logprobs is not None,
            with_usage=_wants_usage(body),
        )
        generation = _generation(state, text, model, body, answer.head.id, [prompt])
        return await _respond(state, request, body, answer, generation, [prompt])

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        text = state.ready()
        model = state.model(body.model)
        prompts = [await text.prompt(item, bos=body.add_special_tokens, limit=model.max_length) for item in body.prompt]
        if body.echo:
            _check_prompts(prompts, model, body)
        answer = CompletionAnswer(
            head=_head("cmpl", model),
            pieces=text.tokenizer,
            with_logprobs=body.num_logprobs is not None,
            echo=[text.shown(prompt) for prompt in prompts for _ in range(body.n)] if body.echo else (),
            with_usage=_wants_usage(body),
        )
        if body.echo and body.max_tokens == 0:
            return _echo(body, answer, prompts)
        generation = _generation(state, text, model, body, answer.head.id, prompts)
        return await _respond(state, request, body, answer, generation, prompts)


def _head(kind: str, model: Model) -> Head:
    return Head(id=f"{kind}-{secrets.token_hex(16)}", created=int(time.time()), model=model.name)


def _wants_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _check_prompts(prompts: Sequence[Prompt], model: Model, body: GenerationBody) -> None:
    """Raises ApiError (400) for ids that the model doesn't have: they have no text to echo."""
    for prompt in prompts:
        try:
            EngineRequest(id="echo", prompt=prompt.ids).check(vocab_size=model.vocab_size, max_length=model.max_length)
        except RequestError as error:
            raise body.refusal(error) from error


def _generation(
    state: State, text: TextModel, model: Model, body: GenerationBody, id: str, prompts: Sequence[Prompt]
) -> Generation:
    """The sequences of a request, checked against the model but not yet started: n for each prompt, in order.

    Raises ApiError (400) for a prompt or a limit that the context doesn't hold, and for bad token ids.
    """
    generation = Generation(state.client)
    for prompt in prompts:
        max_tokens = body.limit_for(len(prompt.ids), model.max_length)
        for choice in range(body.n):
            try:
                request = EngineRequest(
                    id=f"{id}-{len(generation.choices)}",
                    prompt=prompt.ids,
                    sampling=body.sampling(max_tokens=max_tokens, choice=choice, defaults=text.defaults),
                    adapter=model.name if model.parent is not None else None,
                )
                request.check(vocab_size=model.vocab_size, max_length=model.max_length)
            except RequestError as error:
                raise body.refusal(error) from error
            detokenizer = Detokenizer(
                text.tokenizer,
                stop=body.stop,
                include_stop=body.include_stop_str_in_output,
                skip_special=body.skip_special_tokens,
                min_tokens=body.min_tokens,
            )
            generation.add(
                request,
                detokenizer,
                show_stop_token=body.include_stop_str_in_output,
                silent_stops=text.tokenizer.eos_ids,
            )
    return generation


async def _respond(
    state: State,
    request: Request,
    body: GenerationBody,
    answer: Answer,
    generation: Generation,
    prompts: Sequence[Prompt],
) -> Response:
    """Starts the generation and answers with a stream or, when it has ended, with one body."""
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    generation.start()
    if body.stream:
        return EventStream(generation, answer, state.outbox, prompt_tokens=prompt_tokens)
    async with cancelled_with_client(request.receive, generation):
        pieces = await generation.finished()
    counts = responses.usage(prompt_tokens, generation.num_generated)
    return Response(responses.to_json(answer.whole(pieces, counts)), media_type="application/json")


def _echo(body: CompletionBody, answer: CompletionAnswer, prompts: Sequence[Prompt]) -> Response:
    """The prompts alone, for echo=true with max_tokens=0."""
    if body.stream:
        raise ApiError(400, "max_tokens=0 has nothing to stream", param="stream")
    pieces = [responses.Piece(index=index, text="", finish_reason="length") for index in range(len(prompts) * body.n)]
    counts = responses.usage(sum(len(prompt.ids) for prompt in prompts), 0)
    return Response(responses.to_json(answer.whole(pieces, counts)), media_type="application/json")


def _add_tokens(app: FastAPI, state: State) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        text = state.ready()
        model = state.model(body.model)
        if body.messages is not None:
            prompt = await text.chat(
                body.messages, body.tools, generation_prompt=body.add_generation_prompt, limit=None
            )
        else:
            prompt = await text.prompt(body.prompt or "", bos=body.add_special_tokens is not False, limit=None)
        strings = [responses.printable(text.tokenizer.token_bytes(id)) for id in prompt.ids]
        return JSONResponse({
            "count": len(prompt.ids),
            "max_model_len": model.max_length,
            "tokens": list(prompt.ids),
            "token_strs": strings if body.return_token_strs else None,
        })  # fmt: skip

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        text = state.ready()
        model = state.model(body.model)
        bad = [id for id in body.tokens if not 0 <= id < model.vocab_size]
        if bad:
            raise ApiError(400, f"tokens holds {bad[0]}; ids go from 0 to {model.vocab_size - 1}", param="tokens")
        return JSONResponse({"prompt": text.tokenizer.decode(body.tokens, skip_special=False)})


def _add_adapters(app: FastAPI, state: State) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapterBody) -> Response:
        state.ready()
        await state.client.load_adapter(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapterBody) -> Response:
        state.ready()
        await state.client.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
