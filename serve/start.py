"""From a checked configuration to a running engine on this rank: weights, pages, adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from conf.schema import Config, ConfigError, ServeConf, memory_bytes
from kernels import dispatch, sampling
from kernels.memory import keep_freed_memory
from parallel import comm
from parallel.adapters import peft
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.model.decoder import Decoder
from parallel.model.load import build_decoder
from parallel.model.source import Source
from parallel.model.tokenizer import Tokenizer
from serve.blocks import PagePool
from serve.engine import Engine
from serve.paged import KvCache, page_bytes
from serve.request import RequestError, model_defaults
from serve.runner import Runner
from serve.sampler import Sampler
from serve.scheduler import Limits, Scheduler

SPARE = 4
"""Sequences' worth of pages beyond what requests can use: room for prefixes."""


def check_adapters(adapters: Mapping[str, str], source: Source) -> None:
    """Checks the adapters' headers against the base model before anything starts.

    Raises:
        ConfigError: each one that isn't a supported adapter, or was made for another base; one a line.
    """
    problems: list[str] = []
    for name, path in adapters.items():
        try:
            peft.read(Path(path), source.architecture)
            peft.check_base(Path(path), source.fingerprint)
        except ConfigError as error:
            problems.append(f"adapters.{name}={path}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def sampling_defaults(tokenizer: Tokenizer) -> dict[str, float]:
    """What the model's generation_config.json says for requests that don't.

    Raises:
        ConfigError: a value there is out of range.
    """
    try:
        return model_defaults(tokenizer.generation)
    except RequestError as error:
        raise ConfigError(f"generation_config.json {error}; correct the model's file") from None


def build_engine(config: Config, source: Source, launch: Launch, *, max_chunk: int | None = None) -> Engine:
    """This rank's engine with `config.adapters` loaded; collective over all ranks.

    config: checked. max_chunk: most tokens of one request in a step (tests); None leaves it to the budget.

    Raises:
        ConfigError: no room for the KV cache or an adapter; the same on every rank.
    """
    data, pipeline, context, tensor = config.parallel.sizes
    mesh = Mesh.build(launch, data=data, pipeline=pipeline, context=context, tensor=tensor)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    stages = config.parallel.stages
    assert not isinstance(stages, str), "stages of an unchecked config"
    device = comm.device(launch)
    ops = dispatch.select(device, dtype)
    decoder = build_decoder(source, mesh, stages, dtype=dtype, ops=ops, trainable=False, packed=True, device=device)
    limits = _limits(config.serve, source, max_chunk)
    pool = PagePool(_num_pages(config.serve, limits, decoder, mesh, launch), config.serve.page_size)
    cache = KvCache.allocate(decoder, num_pages=pool.num_pages, page_size=pool.page_size)
    runner = Runner(decoder, mesh, cache, pool.page_size, source.fingerprint)
    paths = {name: Path(path).resolve() for name, path in config.adapters.items()}
    _agree(source, paths, mesh)
    for name, path in paths.items():
        runner.load_adapter(name, path, pool)
    eos_ids = source.tokenizer().eos_ids
    longest = min(limits.max_length, pool.num_free * pool.page_size)
    if longest < 2:
        raise ConfigError(
            f"serve.kv_memory={config.serve.kv_memory} holds {longest} tokens beside the adapters' prefixes; raise it"
        )
    keep_freed_memory()
    return Engine(runner, Scheduler(limits, pool, eos_ids), Sampler(eos_ids, sampling.select(device)), pool, longest)


def _agree(source: Source, adapters: Mapping[str, Path], mesh: Mesh) -> None:
    """Raises ConfigError on every rank when one of them would serve another model or other adapters."""
    facts = {"the weights of model.path": source.fingerprint}
    facts |= {f"adapters.{name}": str(path) for name, path in adapters.items()}
    differing = comm.disagreements(facts, mesh.world)
    if differing:
        raise ConfigError(f"[{mesh.label}] ranks disagree on {' and '.join(differing)}; give every host the same files")


def _limits(serve: ServeConf, source: Source, max_chunk: int | None) -> Limits:
    assert serve.max_length is not None, "max_length of an unchecked config"
    return Limits(
        max_length=serve.max_length,
        max_batch_tokens=serve.max_batch_tokens,
        max_sequences=serve.max_sequences,
        vocab_size=source.architecture.vocab_size,
        max_chunk=max_chunk,
    )


def _num_pages(serve: ServeConf, limits: Limits, decoder: Decoder, mesh: Mesh, launch: Launch) -> int:
    """Pages of the cache: what `serve.kv_memory` holds on the rank with the least room, never more than all
    requests and a few long prefixes can use, at least one."""
    free = available_memory(decoder.device, launch.local_size)
    one = page_bytes(decoder.architecture, decoder.here, decoder.stage, serve.page_size, decoder.dtype)
    useful = (limits.max_sequences + SPARE) * -(-limits.max_length // serve.page_size)
    mine = max(1, min(memory_bytes(serve.kv_memory, free) // max(one, 1), useful))
    return -int(comm.all_reduce(torch.tensor([-mine]), mesh.world, "max").item())


def available_memory(device: torch.device, ranks: int) -> int:
    """Bytes this rank can have: a GPU's free memory, or its share of the host's (`ranks` on it).

    The host's is MemAvailable, or what the cgroup's limit leaves where that is less (Slurm, containers).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0) // ranks
