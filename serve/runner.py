"""The model side of the engine on one rank: decoder, cache and adapters. Knows no text and makes no decisions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel import checkpoint, comm
from parallel.adapters import lora, peft
from parallel.adapters.prefix import Prefix
from parallel.mesh import Mesh
from parallel.model.decoder import Decoder
from parallel.model.rope import paired
from parallel.model.step import Step
from parallel.pipeline import run
from parallel.pipeline.run import Border
from parallel.sharding import partition
from serve import batch
from serve.batch import Batch, LoadedAdapter
from serve.blocks import OutOfPages, PagePool
from serve.paged import KvCache, PagedAttend
from serve.replay import Replays
from serve.scheduler import Chunk


@dataclass
class Runner:
    """Runs a plan's chunks through this rank's stage; every rank of the mesh calls the same methods in step."""

    decoder: Decoder
    mesh: Mesh
    cache: KvCache
    page_size: int
    base: str
    """Fingerprint of the base model's weights."""
    adapters: dict[str, LoadedAdapter] = field(default_factory=dict)
    replays: Replays = field(init=False)
    _columns: list[int] = field(init=False)
    """Of the logits, on each tensor rank."""

    def __post_init__(self) -> None:
        self.replays = Replays(self._compute, self.decoder.ops, self.page_size)
        offsets = partition(self.decoder.architecture.vocab_size, self.mesh.tensor.size)
        self._columns = [stop - start for start, stop in itertools.pairwise(offsets)]

    def forward(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Computes the chunks and returns logits [B', V] float32: of the B of them that sample, in order, this tensor
        rank's share (`shares`). The next call may overwrite them.

        Only the last pipeline stage returns any, the others None, as does a step in which nothing samples.
        Communicates T * D elements to the next stage, 2 * T * D a layer over tensor, at most B * V/tp at the end.
        """
        samples = any(chunk.samples for chunk in chunks)
        output = self._stage(chunks, None) if self.mesh.pipeline.size == 1 else self._pipeline(chunks)
        if output is None or not samples:
            return None
        return self._whole_rows(output)

    def shares(self, count: int) -> list[slice]:
        """Which of `count` rows of logits each tensor rank gets, to sample from."""
        return [slice(*bounds) for bounds in itertools.pairwise(partition(count, self.mesh.tensor.size))]

    def _whole_rows(self, logits_BV: Tensor) -> Tensor:
        """From this rank's columns [B, V/tp] of all rows to all columns [B', V] of its share of them."""
        tensor = self.mesh.tensor
        if tensor.size == 1:
            return logits_BV
        rows = [logits_BV[share] for share in self.shares(logits_BV.shape[0])]
        shapes = [(rows[tensor.rank].shape[0], columns) for columns in self._columns]
        return torch.cat(comm.all_to_all(rows, tensor, shapes), dim=1)

    @torch.inference_mode()
    def _pipeline(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """What the last stage computes, on that stage."""
        num_tokens = sum(chunk.length for chunk in chunks)
        border = Border([(num_tokens, self.decoder.architecture.width)], self.decoder.dtype, self.decoder.device)
        outputs = run.forward_only(self.mesh.pipeline, lambda _, hidden: self._stage(chunks, hidden), border=border)
        return outputs[0] if outputs else None

    def _stage(self, chunks: Sequence[Chunk], hidden: Tensor | None) -> Tensor:
        """`_compute` of the chunks, replayed if they allow it."""
        used = [None if chunk.adapter is None else self.adapters[chunk.adapter] for chunk in chunks]
        replayed = self.replays.run(chunks, used, hidden)
        if replayed is not None:
            return replayed
        decoder = self.decoder
        with torch.inference_mode():
            return self._compute(batch.build(chunks, used, decoder.ops, self.page_size, decoder.device), hidden)

    def _compute(self, step_batch: Batch, hidden: Tensor | None) -> Tensor:
        """This stage's hidden states [T, D], on the last stage its columns of the logits [B, V/tp] in float32."""
        decoder = self.decoder
        attend = PagedAttend(
            decoder.architecture, decoder.here, decoder.ops, self.cache, step_batch.layout, step_batch.slot_T
        )
        step = Step(
            position_T=step_batch.position_T,
            attend=attend,
            adapters=step_batch.segments,
            rows=step_batch.rows,
        )
        x = decoder(step_batch.id_T if hidden is None else hidden, step)
        return decoder.logits(x).float() if decoder.stage.is_last else x

    def load_adapter(self, name: str, directory: Path, pool: PagePool) -> None:
        """Reads this rank's part of the PEFT adapter in `directory` and serves it as `name`.

        A prefix takes pages of `pool` for as long as it is loaded.

        Raises:
            ConfigError: not a supported adapter, made for another base, the name is taken, or no pages are left;
                nothing of it stays then.
        """
        directory = directory.resolve()  # `latest` may move on while its files are read
        self.replays.forget()
        if name in self.adapters:
            raise ConfigError(f"adapters.{name} is already loaded; unload it first or choose another name")
        adapter = peft.read(directory, self.decoder.architecture)
        peft.check_base(directory, self.base)
        read = checkpoint.reader(directory / peft.WEIGHTS)
        if adapter.kind == "lora":
            taken = {other.slot for other in self.adapters.values()}
            slot = next(i for i in range(len(taken) + 1) if i not in taken)
            try:
                lora.install(self.decoder, adapter, slot, read, trainable=False)
            except BaseException:
                lora.remove(self.decoder, slot)
                raise
            self.adapters[name] = LoadedAdapter(name, slot=slot)
            return
        try:
            pages = pool.allocate(pool.pages_for(adapter.virtual_tokens))
        except OutOfPages as error:
            raise ConfigError(
                f"adapters.{name}={directory}: no room in the KV cache for its prefix ({error}); raise serve.kv_memory"
            ) from None
        try:
            self._write_prefix(Prefix(adapter, [self.decoder], read, trainable=False), pages)
        except BaseException:
            pool.free(pages)
            raise
        self.adapters[name] = LoadedAdapter(name, pages=tuple(pages), length=adapter.virtual_tokens)

    @torch.inference_mode()
    def _write_prefix(self, prefix: Prefix, pages: Sequence[int]) -> None:
        kv = prefix()[0].to(self.decoder.dtype)
        places = torch.arange(kv.shape[0], device=kv.device)
        slots = (
            torch.tensor(pages, device=kv.device)[places // self.page_size] * self.page_size + places % self.page_size
        )
        for i, (keys, values) in enumerate(zip(self.cache.keys, self.cache.values, strict=True)):
            key = paired(kv[:, i, 0], self.decoder.architecture)
            self.decoder.ops.write_pages(keys, values, key, kv[:, i, 1], slots)

    def unload_adapter(self, name: str, pool: PagePool) -> None:
        """Forgets the adapter; no live request may use it.

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self.adapters:
            raise ConfigError(f"adapters.{name} is not loaded; loaded are {sorted(self.adapters) or 'none'}")
        self.replays.forget()
        adapter = self.adapters.pop(name)
        if adapter.slot is not None:
            lora.remove(self.decoder, adapter.slot)
        pool.free(adapter.pages)
