"""The rules across fields, all of them checked at once on CPU before any process group exists."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from conf.convert import build, plain, show
from conf.layout import balanced_stages, chunks_per_rank, degrees, fits, microbatches, placement, scheduled
from conf.rules import not_yet, out_of_range, unused
from conf.schema import (
    LINEARS,
    SERVING,
    Architecture,
    Config,
    ConfigError,
    GenerateConfig,
    SubmitConfig,
    memory_bytes,
)

C = TypeVar("C", bound=Config)

LONGEST_ROW = 2048
"""Tokens that `data.max_length` is at most when nobody sets it."""

MAY_CHANGE = (
    "parallel.",
    "logger.",
    "optim.kind",
    "run_dir",
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.resume",
)
"""Keys (or their beginnings) that a resumed run may have other values for."""


def check(config: C, command: str, world_size: int | None, architecture: Architecture | None) -> C:
    """The config with every derived value filled in.

    Args:
        config: what `load` returned.
        command: the command that runs.
        world_size: ranks of the launch; None (or the commands preview and submit) leaves degrees open.
        architecture: the model's; None leaves out what depends on it.

    Raises:
        ConfigError: each rule that is broken, one a line.
    """
    problems: list[str] = []
    if build(type(config), plain(config), problems) is None:
        raise ConfigError("\n".join(problems))
    problems = not_yet(config) + out_of_range(config) + unused(config) + _model(config)
    launched = None if command in ("preview", "submit") else world_size
    parallel, misfits = degrees(config.parallel, command in SERVING, launched)
    problems += misfits + scheduled(parallel)
    if architecture is not None:
        problems += _shape(architecture) + fits(parallel, architecture) + _lengths(config, architecture, command)
    problems += _serving(config, command) if command in SERVING else _training(config)
    if isinstance(config, GenerateConfig):
        problems += _generation(config)
    if isinstance(config, SubmitConfig):
        problems += _job(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return _resolve(replace(config, parallel=parallel), command, architecture)


def difference(saved: Config, now: Config) -> list[str]:
    """What a run may not change on resume and did, as `optim.lr: was 0.0001, now 0.001`.

    Both configs are checked. A decay that ends with the run (`optim.decay_steps` = `train.steps` in both)
    follows a change of train.steps.
    """
    before, after = _flat(plain(saved, "train")), _flat(plain(now, "train"))
    if (saved.optim.decay_steps, now.optim.decay_steps) == (saved.train.steps, now.train.steps):
        before.pop("optim.decay_steps")
    return [
        f"{key}: was {show(before[key])}, now {show(after.get(key))}"
        for key in before
        if before[key] != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _model(config: Config) -> list[str]:
    model = config.model
    if not model.path and model.architecture is None:
        choice = "set model.path=<HF directory, .gguf file or hub id> or choose model=smollm2"
        return [f"model.path is empty; {choice}"]
    if model.path and model.architecture is not None:
        return [
            f"model.path={model.path} has an architecture of its own, but model.architecture is set too; "
            "remove one of them (model=tiny sets model.architecture)"
        ]
    return []


def _shape(architecture: Architecture) -> list[str]:
    a = architecture
    problems = [f"the model's {problem}" for problem in out_of_range(a)]
    if problems:
        return problems
    if a.num_heads % a.num_kv_heads:
        problems.append(f"the model's num_heads={a.num_heads} is no multiple of num_kv_heads={a.num_kv_heads}")
    if a.head_dim % 2:
        problems.append(f"the model's head_dim={a.head_dim} is odd; rotary embeddings turn pairs")
    if a.rotary_dim is not None and (a.rotary_dim % 2 or a.rotary_dim > a.head_dim):
        problems.append(f"the model's rotary_dim={a.rotary_dim} must be even and at most head_dim={a.head_dim}")
    if a.rotary_dim not in (None, a.head_dim) and a.rope_scaling is not None and a.rope_scaling.kind == "yarn":
        problems.append(f"the model's rotary_dim={a.rotary_dim} excludes yarn, which would scale whole heads")
    if a.alibi and (a.rotary_dim or a.rotary_interleaved or a.rope_scaling or a.window_rope_theta):
        problems.append("the model's alibi=true leaves rotary_* and rope_* without effect; remove them")
    if a.normalised_head and a.tied_embeddings:
        problems.append("the model's normalised_head=true needs a head of its own; set tied_embeddings=false")
    if a.window_layers is not None and len(a.window_layers) != a.num_layers:
        problems.append(f"the model's window_layers has {len(a.window_layers)} entries but num_layers={a.num_layers}")
    return problems


def _training(config: Config) -> list[str]:
    data, optim, train = config.data, config.optim, config.train
    problems: list[str] = []
    if not data.path:
        problems.append("data.path is empty; set data.path=<file of rows, .jsonl or .json>")
    for key, path in (("data.path", data.path), ("data.evaluate_path", data.evaluate_path)):
        if path and not path.startswith("package:") and not Path(path).is_file():
            problems.append(f"{key}={path} is not a file; give a JSONL file or a JSON array")
    problems += _context(config)
    if data.evaluate_path == "":
        problems.append("data.evaluate_path is empty; set a file or remove it")
    if data.evaluate_path and data.evaluate_fraction:
        problems.append(
            f"data.evaluate_path={data.evaluate_path} and data.evaluate_fraction={data.evaluate_fraction} "
            "exclude each other; remove one of them"
        )
    if train.evaluate_every and not data.evaluate_path and not data.evaluate_fraction:
        problems.append(
            f"train.evaluate_every={train.evaluate_every} has nothing to evaluate; "
            "set data.evaluate_path or data.evaluate_fraction"
        )
    horizon = "optim.decay_steps" if optim.decay_steps else "train.steps"
    last = optim.decay_steps or train.steps
    if optim.schedule != "constant" and optim.warmup_steps > last:
        problems.append(
            f"optim.warmup_steps={optim.warmup_steps} exceeds {horizon}={last}; use optim.warmup_steps<={last}"
        )
    if optim.min_lr > optim.lr:
        problems.append(f"optim.min_lr={optim.min_lr} exceeds optim.lr={optim.lr}; use a smaller one")
    if train.resume not in ("auto", "never") and not Path(train.resume).is_dir():
        problems.append(f"train.resume={train.resume} is not auto, never or a checkpoint's directory")
    if config.parallel.sequence and config.parallel.tensor in (None, 1):
        advice = "remove it or set parallel.tensor>1"
        problems.append(f"parallel.sequence=true has no effect with parallel.tensor=1; {advice}")
    if config.parallel.trace and config.parallel.pipeline == 1:
        advice = "remove it or set parallel.pipeline>1"
        problems.append(f"parallel.trace=true has no effect with parallel.pipeline=1; {advice}")
    return problems + _targets(config)


def _context(config: Config) -> list[str]:
    parallel = config.parallel
    if parallel.context == 1 and parallel.context_method != "ring":
        method = f"parallel.context_method={parallel.context_method}"
        return [f"{method} has no effect with parallel.context=1; remove it or set parallel.context>1"]
    if parallel.context < 1:
        return []
    if parallel.context_method == "ulysses" and parallel.context % parallel.ulysses_size:
        fitting = [str(degree) for degree in range(1, parallel.context + 1) if parallel.context % degree == 0]
        return [
            f"parallel.ulysses={parallel.ulysses} doesn't divide parallel.context={parallel.context}; "
            f"use one of {', '.join(fitting)}"
        ]
    return []


def _targets(config: Config) -> list[str]:
    targets = config.tune.targets
    problems = [] if targets else [f"tune.targets=[] trains nothing; name some of {', '.join(LINEARS)}"]
    for name in targets:
        if name not in LINEARS:
            near = difflib.get_close_matches(name, LINEARS, n=1, cutoff=0.0)[0]
            problems.append(f"tune.targets: {name} is not one of {', '.join(LINEARS)}; did you mean {near}?")
    if len(set(targets)) < len(targets):
        problems.append(f"tune.targets={show(targets)} names a linear twice; name each once")
    return problems


def _serving(config: Config, command: str) -> list[str]:
    problems: list[str] = []
    if config.parallel.data not in (None, 1):
        problems.append(
            f"parallel.data={config.parallel.data} is not possible in {command}: there are no replicas yet; "
            "use parallel.data=1 with parallel.tensor or parallel.pipeline"
        )
    if config.parallel.context > 1:
        problems.append(
            f"parallel.context={config.parallel.context} is not possible in {command}: prompts aren't cut over ranks; "
            "use parallel.context=1 with parallel.tensor or parallel.pipeline"
        )
    try:
        memory_bytes(config.serve.kv_memory, 1)
    except ConfigError as error:
        problems.append(f"serve.kv_memory={error}")
    if config.serve.api_key == "":
        problems.append("serve.api_key is empty; set a key or remove it")
    base = config.serve.model_name or config.model.name
    for name, path in config.adapters.items():
        if not name:
            problems.append(f"adapters.={path} has no name; write adapters.<name>={path}")
        if name == base:
            problems.append(f"adapters.{name}={path} has the name of the base model; use another")
        if not Path(path).is_dir():
            problems.append(f"adapters.{name}={path} is not a directory; give the one PEFT or training wrote")
    return problems


def _generation(config: GenerateConfig) -> list[str]:
    problems: list[str] = []
    if (config.prompt is None) == (config.prompts is None):
        state = "neither is set" if config.prompt is None else "both are set"
        problems.append(f"prompt and prompts: {state}; set prompt=<text> or prompts=<file.jsonl>")
    if config.prompts is not None and not Path(config.prompts).is_file():
        problems.append(f"prompts={config.prompts} is not a file; give a JSONL file")
    if config.adapter is not None and config.adapter not in config.adapters:
        known = ", ".join(config.adapters) or "none"
        problems.append(
            f"adapter={config.adapter} is not among the adapters ({known}); set adapters.{config.adapter}=<directory>"
        )
    if config.temperature == 0:
        default = GenerateConfig()
        for key in ("top_k", "top_p", "min_p", "seed"):
            value = getattr(config, key)
            if value != getattr(default, key):
                problems.append(f"{key}={value} has no effect with temperature=0; set temperature>0")
    return problems


def _job(config: SubmitConfig) -> list[str]:
    if re.fullmatch(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}", config.time):
        return []
    return [f"time={config.time} is not a time limit; use hours:minutes:seconds or days-hours:minutes:seconds"]


def _lengths(config: Config, architecture: Architecture, command: str) -> list[str]:
    """Rows, prompts and answers that the model's context cannot hold."""
    most = architecture.max_positions
    if command in SERVING:
        key, length, room = "serve.max_length", config.serve.max_length, most
        why = f"the model's max_positions={most}"
    else:
        virtual = config.tune.virtual_tokens if config.tune.kind == "prefix" else 0
        key, length, room = "data.max_length", config.data.max_length, most - virtual
        why = f"the model's max_positions={most}" + (f" - tune.virtual_tokens={virtual}" if virtual else "")
    if room < 2:
        return [f"tune.virtual_tokens={most - room} leaves no room in the model's max_positions={most}"]
    if length is not None and length > room:
        return [f"{key}={length} exceeds {why}; use {key}<={room}"]
    return []


def _resolve(config: C, command: str, architecture: Architecture | None) -> C:
    """Replaces each "auto" and each None that stands for a derived value."""
    parallel = config.parallel
    if architecture is not None and parallel.stages == "auto":
        stages = balanced_stages(architecture, parallel.pipeline, chunks_per_rank(parallel), placement(parallel))
        parallel = replace(parallel, stages=stages)
    if command in SERVING:
        serve = config.serve
        name = serve.model_name or config.model.name
        length = serve.max_length or (architecture.max_positions if architecture else None)
        return replace(config, parallel=parallel, serve=replace(serve, model_name=name, max_length=length))
    virtual = config.tune.virtual_tokens if config.tune.kind == "prefix" else 0
    room = min(LONGEST_ROW, architecture.max_positions - virtual) if architecture else LONGEST_ROW
    optim, logger = config.optim, config.logger
    if optim.schedule != "constant":
        optim = replace(optim, decay_steps=optim.decay_steps or config.train.steps)
    run_dir = config.run_dir or f"runs/{config.model.name}-{config.tune.kind}"
    if logger.kind == "wandb":
        logger = replace(logger, name=logger.name or Path(run_dir).name)
    return replace(
        config,
        parallel=replace(parallel, microbatches=microbatches(config), virtual_stages=chunks_per_rank(parallel)),
        data=replace(config.data, max_length=config.data.max_length or room),
        optim=optim,
        logger=logger,
        run_dir=run_dir,
    )
