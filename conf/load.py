"""The command line to a tree of dataclasses, and that tree to a file and to short and long texts.

A key names an option (`optim.lr=1e-4`) or chooses a file of a group (`tune=lora`: conf/tune/lora.yaml). Keys
come in any order; the last of a repeated one counts. hydra composes the groups and parses values. Texts and
paths are not parsed at all: whatever follows the first `=` is the value, with its spaces, quotes and braces.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from conf.convert import (
    build,
    choice_problem,
    expected,
    hint_of,
    hints,
    is_text,
    leaves,
    options,
    plain,
    section,
    show,
    suggestion,
)
from conf.rules import out_of_range, unused
from conf.schema import (
    ROOTS,
    SERVING,
    BenchConfig,
    CompareConfig,
    Config,
    ConfigError,
    GenerateConfig,
    PreviewConfig,
    ShowConfig,
    SubmitConfig,
)

FOLDER = Path(__file__).parent
UNCHECKED = ("bench", "show", "compare")
"""Commands without a model, which `conf.check` does not see."""
AXES = ("data", "pipeline", "context", "tensor")
Values = list[tuple[str, Any]]


@overload
def load(argv: Sequence[str], command: Literal["train", "serve"]) -> Config: ...
@overload
def load(argv: Sequence[str], command: Literal["preview"]) -> PreviewConfig: ...
@overload
def load(argv: Sequence[str], command: Literal["submit"]) -> SubmitConfig: ...
@overload
def load(argv: Sequence[str], command: Literal["generate"]) -> GenerateConfig: ...
@overload
def load(argv: Sequence[str], command: Literal["bench"]) -> BenchConfig: ...
@overload
def load(argv: Sequence[str], command: Literal["show"]) -> ShowConfig: ...
@overload
def load(argv: Sequence[str], command: Literal["compare"]) -> CompareConfig: ...
def load(argv: Sequence[str], command: str) -> Any:
    """The configuration of a command from its arguments (`sys.argv[1:]`), types checked.

    Rules across fields and ranges are `conf.check`'s, so that it can tell all that is wrong at once; a command that
    has no model is checked here. `--help` among the arguments prints every option and exits.

    Raises:
        ConfigError: unknown keys and choices, values of a wrong type, options without effect: one a line.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(command))
        raise SystemExit(0)
    problems: list[str] = []
    choices, values = _read(argv, command, problems)
    tree = copy.deepcopy(_compose(command, tuple(choices.items())))
    for key, value in values:
        _set(tree, key, value)
    config = build(ROOTS[command], tree, problems)
    if config is not None:
        problems += unused(config, {key for key, _ in values})
        if command in UNCHECKED:
            problems += out_of_range(config)
        else:
            problems = [problem for problem in problems if problem not in unused(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def groups(command: str) -> dict[str, list[str]]:
    """The groups that a command knows, each with its choices: the files of its folder."""
    found: dict[str, list[str]] = {}
    for field in options(ROOTS[command], command):
        files = sorted(file.stem for file in (FOLDER / field.name).glob("*.yaml"))
        if files and section(hints(ROOTS[command])[field.name]):
            found[field.name] = files
    return found


def training_arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of `slurm.submit` that go on to `train`: those that are not the job's own."""
    own = set(hints(SubmitConfig)) - set(hints(Config))
    return [argument for argument in argv if argument.partition("=")[0] not in own]


def save(config: Config, path: Path, command: str = "train") -> None:
    """Writes every option that the command reads as YAML, whole or not at all; secrets are left out."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(to_yaml(config, command), encoding="utf-8")
    temporary.replace(path)


def to_yaml(config: Config, command: str = "train") -> str:
    """Every option that the command reads, as the text that `read_saved` takes; secrets are left out."""
    return yaml.safe_dump(plain(config, command), sort_keys=False, allow_unicode=True)


def read_saved(path: Path) -> Config:
    """The config that `save` wrote.

    Raises:
        ConfigError: no such file, no YAML, or keys and values that this version does not know.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a saved config: {error}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path} is not a saved config: it holds no mapping")
    problems: list[str] = []
    config = build(Config, cast("Mapping[str, Any]", tree), problems)
    if config is None:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def short(config: Config) -> str:
    """The degrees of the layout and whatever differs from the defaults, a line per section."""
    lines: list[str] = []
    default = plain(type(config)())
    for name, value in plain(config).items():
        if isinstance(value, Mapping):
            shown = (key for key in value if value[key] != default[name].get(key) or key in AXES)
            pairs = " ".join(f"{key}={_quoted(value[key])}" for key in shown)
            lines += [f"{name:<9} {pairs}"] if pairs else []
        elif value != default[name]:
            lines.append(f"{name:<9} {_quoted(value)}")
    return "\n".join(lines)


def describe(command: str) -> str:
    """Every key of a command: its default and what it does."""
    root = ROOTS[command]
    lines = [f"Keys of {command}, written key=value:"]
    for name, files in groups(command).items():
        lines.append(f"  {name}={'|'.join(files)}\n      A file of conf/{name}.")
    for key, field in leaves(root, command).items():
        default = show(field.default) if isinstance(field.default, (str, int, float, tuple)) else ""
        lines.append(f"  {key}={default}\n      {field.metadata['doc']} [{expected(hint_of(root, key))}]")
    return "\n".join(lines)


def _read(argv: Sequence[str], command: str, problems: list[str]) -> tuple[dict[str, str], Values]:
    """Splits arguments into choices of groups and values of options."""
    choices: dict[str, str] = {}
    values: Values = []
    files, known = groups(command), leaves(ROOTS[command], command)
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            problems.append(f"{argument} is not of the form key=value")
        elif key in files:
            if text in files[key]:
                choices[key] = text
            else:
                problems.append(_choice_problem(key, text, files[key]))
        elif key.startswith("adapters.") and "adapters" in known:
            values.append((key, text))
        elif key not in known:
            problems.append(_unknown(argument, key, command, [*files, *known]))
        elif is_text(hint := hint_of(ROOTS[command], key)):
            values.append((key, text))
        else:
            values += _parse(key, text, hint, problems)
    return choices, values


def _choice_problem(group: str, choice: str, files: Sequence[str]) -> str:
    has_path = f"{group}.path" in leaves(Config)
    if has_path and ("/" in choice or "." in choice):
        return f"{group}={choice} is not one of {', '.join(files)}; did you mean {group}.path={choice}?"
    return choice_problem(group, choice, files)


def _unknown(argument: str, key: str, command: str, known: Sequence[str]) -> str:
    owners = [other for other in ROOTS if key in groups(other) or key in leaves(ROOTS[other], other)]
    if owners:
        return f"{argument} has no effect in {command}: {key} is a key of {', '.join(owners)}"
    return f"{argument}: {key} is not a key of {command}{suggestion(key, known)}"


def _parse(key: str, text: str, hint: Any, problems: list[str]) -> Values:
    """One value by hydra's grammar: numbers, true and false, null, [lists], {mappings}."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        problems.append(f"{key}={text} is not {expected(hint)}")
        return []
    if override.is_sweep_override():
        problems.append(f"{key}={text} is not {expected(hint)}; sweeps are not supported, lists are written [a,b]")
        return []
    return [(key, override.value())]


@functools.cache
def _compose(command: str, choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The chosen files of the groups as one tree of plain values."""
    if not groups(command):
        return {}
    primary = "serve" if command in SERVING else "train"
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        composed = compose(primary, [f"{group}={choice}" for group, choice in choices])
    return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".", 1) if key.startswith("adapters.") else key.split(".")
    for part in parts[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[parts[-1]] = value


def _quoted(value: object) -> str:
    if isinstance(value, str) and (not value.isprintable() or " " in value):
        return json.dumps(value, ensure_ascii=False)
    return show(value)
