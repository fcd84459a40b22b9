"""Runs the engine on a list of requests under any layout, for parity tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conf.schema import Architecture, Config, ModelConf, ParallelConf, ServeConf
from parallel.comm import Launch
from parallel.model.source import open_source
from serve.engine import Events, Turn
from serve.paged import page_bytes
from serve.request import Output, Request
from serve.start import build_engine
from tests.ranks import on_ranks

SERVED = Architecture(
    num_layers=5,
    width=72,
    num_heads=9,
    num_kv_heads=3,
    head_dim=8,
    ffn_width=100,
    vocab_size=301,
    max_positions=256,
    tied_embeddings=True,
)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How to serve: layout, limits, adapters."""

    pipeline: int = 1
    tensor: int = 1
    model: ModelConf = field(default_factory=lambda: ModelConf(dtype="float32", architecture=SERVED))
    pages: int | None = None
    """Pages of the pool; None for plenty."""
    page_size: int = 4
    max_chunk: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_length: int = 256
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        source = open_source(self.model)
        layers = source.architecture.num_layers
        stages = tuple(layers // self.pipeline + (i < layers % self.pipeline) for i in range(self.pipeline))
        return Config(
            model=self.model,
            parallel=ParallelConf(data=1, pipeline=self.pipeline, tensor=self.tensor, stages=stages),
            serve=ServeConf(
                max_length=self.max_length,
                page_size=self.page_size,
                max_batch_tokens=self.max_batch_tokens,
                max_sequences=self.max_sequences,
            ),
            adapters=self.adapters,
        )


@dataclass(frozen=True)
class Served:
    """What came out: tokens by request, how requests ended, and the scheduler's last gauges."""

    tokens: dict[str, list[int]]
    ends: dict[str, Output]
    logprobs: dict[str, list[float]]
    stats: dict[str, int]


class ListFront:
    """Submits requests, one batch a turn from a list of batches; collects everything."""

    def __init__(self, batches: Sequence[Sequence[Request]]) -> None:
        self._batches = [list(batch) for batch in batches]
        self._open = {request.id for batch in batches for request in batch}
        self.result = Served({id: [] for id in self._open}, {}, {id: [] for id in self._open}, {})

    def events(self, *, idle: bool) -> Events:
        """The next batch; stop after the last request."""
        batch = self._batches.pop(0) if self._batches else []
        return Events(submit=[request.to_dict() for request in batch], stop=not self._open)

    def deliver(self, turn: Turn) -> None:
        """Collects."""
        self.result.stats.update(turn.stats)
        for output in turn.outputs:
            self.result.tokens[output.id] += output.tokens
            self.result.logprobs[output.id] += [entry.logprob for entry in output.logprobs or ()]
            if output.finish is not None:
                self.result.ends[output.id] = output
                self._open.discard(output.id)


def serve(serving: Serving, batches: Sequence[Sequence[Request]]) -> Served:
    """Serves the batches of requests, on forked ranks if the layout has several."""
    ranks = serving.pipeline * serving.tensor
    if ranks == 1:
        return serve_rank(Launch(), serving, batches)
    return on_ranks(ranks, serve_rank, serving, batches, timeout_s=240)[0]


def serve_rank(launch: Launch, serving: Serving, batches: Sequence[Sequence[Request]]) -> Any:
    """One rank's part; rank 0 returns what was served. Asserts that every page came back."""
    config = serving.config
    if serving.pages is not None:
        source = open_source(serving.model)
        config = replace(config, serve=replace(config.serve, kv_memory=_memory(serving, config, source.architecture)))
    engine = build_engine(config, open_source(serving.model), launch, max_chunk=serving.max_chunk)
    pinned = engine.pool.num_used
    front = ListFront(batches) if launch.rank == 0 else None
    engine.run(front)
    engine.scheduler.check()
    assert engine.pool.num_used == pinned, "pages leaked"
    return None if front is None else front.result


def _memory(serving: Serving, config: Config, architecture: Architecture) -> int:
    """Bytes of `pages` pages on the rank that holds most."""
    import torch

    from parallel.model.load import stage_of
    from parallel.sharding import cut

    stages = config.parallel.stages
    assert not isinstance(stages, str)
    dtype = getattr(torch, serving.model.dtype)
    assert serving.pages is not None
    return max(
        serving.pages
        * page_bytes(
            architecture, cut(architecture, serving.tensor, rank), stage_of(stages, s), serving.page_size, dtype
        )
        for rank in range(serving.tensor)
        for s in range(serving.pipeline)
    )
