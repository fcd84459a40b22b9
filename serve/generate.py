"""`python -m serve.generate prompt="..." k=v`: answers without a server, through the same engine.

One prompt (`prompt=`, streamed to the terminal) or a JSONL file (`prompts=`, answered as one batch). Several ranks:
`torchrun --nproc-per-node=N -m serve.generate ...`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf import load
from conf.check import check
from conf.schema import ConfigError, GenerateConfig
from parallel import backend, comm
from parallel.comm import Launch
from parallel.model.source import open_source
from parallel.model.tokenizer import Tokenizer
from serve.detokenize import Detokenizer
from serve.engine import Events, Turn
from serve.request import Output, Request, RequestError, SamplingParams
from serve.start import build_engine, check_adapters


def main(arguments: Sequence[str]) -> int:
    """Answers the prompts; returns the exit code."""
    launch = Launch.from_environment()
    try:
        config = load.load(arguments, "generate")
        source = open_source(config.model)
        config = check(config, "generate", launch.world_size, source.architecture)
        check_adapters(config.adapters, source)
        backend.check_instruction_set()
        tokenizer = source.tokenizer()
        requests = read_requests(config, tokenizer)
        comm.start(launch)
        front = ListFront(requests, config, tokenizer) if launch.rank == 0 else None
        build_engine(config, source, launch).run(front)
        return 0 if front is None else front.finish()
    except (ConfigError, RequestError) as error:
        comm.tell(launch, error)
        return 2
    finally:
        comm.stop()


def read_requests(config: GenerateConfig, tokenizer: Tokenizer) -> list[Request]:
    """The requests of `prompt=` or of each line of `prompts=`.

    Raises:
        ConfigError: the file is missing or a line is neither {"prompt"} nor {"messages"}; names file and line.
    """
    if config.prompt is not None:
        return [_request(config, "0", tokenizer, {"prompt": config.prompt})]
    assert config.prompts is not None, "a checked config has prompt or prompts"
    path = Path(config.prompts)
    if not path.is_file():
        raise ConfigError(f"prompts={path} does not exist; give a JSONL file")
    requests: list[Request] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            requests.append(_request(config, str(len(requests)), tokenizer, row))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'prompts={path}:{number} is no {{"prompt": text}} or {{"messages": [...]}} ({error})'
            ) from None
    return requests


def _request(config: GenerateConfig, id: str, tokenizer: Tokenizer, row: dict[str, Any]) -> Request:
    if "messages" in row:
        ids = tokenizer.chat(row["messages"])
    elif config.chat:
        ids = tokenizer.chat([{"role": "user", "content": row["prompt"]}])
    else:
        ids = tokenizer.encode(row["prompt"], bos=True)
    sampling = SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        ignore_eos=config.ignore_eos,
    )
    return Request(id=id, prompt=tuple(ids), sampling=sampling, adapter=config.adapter)


class ListFront:
    """A fixed list of requests, submitted at once; prints or writes the answers."""

    def __init__(self, requests: Sequence[Request], config: GenerateConfig, tokenizer: Tokenizer) -> None:
        self._waiting: list[Request] = list(requests)
        self._open = {request.id: request for request in requests}
        self._tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        self._ends: dict[str, Output] = {}
        self._config, self._tokenizer = config, tokenizer
        self._stream = Detokenizer(tokenizer) if config.prompt is not None and config.out is None else None

    def events(self, *, idle: bool) -> Events:
        """All requests at first, then nothing; stop when all have ended."""
        submit, self._waiting = self._waiting, []
        return Events(submit=[request.to_dict() for request in submit], stop=not self._open)

    def deliver(self, turn: Turn) -> None:
        """Collects tokens; streams them if there is one prompt and a terminal to write to."""
        for output in turn.outputs:
            kept = output.tokens[:-1] if output.finish == "stop" else output.tokens
            self._tokens[output.id] += kept
            if self._stream is not None:
                text = "".join(self._stream.push(id) for id in kept)
                sys.stdout.write(text + (self._stream.finish() if output.finish is not None else ""))
                sys.stdout.flush()
            if output.finish is not None:
                self._ends[output.id] = output
                del self._open[output.id]

    def finish(self) -> int:
        """Writes what wasn't streamed; returns the exit code, 1 if a request failed."""
        failed = [end for end in self._ends.values() if end.error is not None]
        for end in failed:
            print(f"prompt {int(end.id) + 1}: {end.error}", file=sys.stderr)
        if self._stream is not None:
            print()
            return 1 if failed else 0
        lines = [json.dumps(self._answer(id), ensure_ascii=False) for id in self._tokens]
        text = "\n".join(lines) + "\n"
        if self._config.out is None:
            sys.stdout.write(text)
        else:
            Path(self._config.out).write_text(text, encoding="utf-8")
        return 1 if failed else 0

    def _answer(self, id: str) -> dict[str, Any]:
        tokens = self._tokens[id]
        end = self._ends[id]
        answer = {"text": self._tokenizer.decode(tokens), "tokens": tokens, "finish_reason": end.finish}
        return answer if end.error is None else {**answer, "error": end.error}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
