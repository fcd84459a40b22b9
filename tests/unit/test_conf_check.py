"""The rules across fields, each with its message; what checking fills in."""

from dataclasses import replace
from pathlib import Path

import pytest

from conf.check import check
from conf.layout import balanced_stages, placement, virtual_stages
from conf.load import load, read_saved, save
from conf.schema import Architecture, Config, ConfigError, ParallelConf, RopeScaling
from parallel.pipeline.plan import Action, Plan
from tests.conf_cases import SMOLLM2, TINY, checked

pytestmark = pytest.mark.usefixtures("a_folder_with_rows")


def served(*argv: str, ranks: int = 1, architecture: Architecture | None = SMOLLM2) -> Config:
    return check(load(argv, "serve"), "serve", ranks, architecture)


def refused(*argv: str, command: str = "train", ranks: int = 1, architecture: Architecture = SMOLLM2) -> str:
    rows = ["data.path=rows.jsonl"] if command in ("train", "preview", "submit") else []
    config = load([*rows, *argv], command)  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ConfigError) as caught:
        check(config, command, ranks, architecture)
    return str(caught.value)


class TestDerivedValues:
    def test_one_rank(self) -> None:
        config = checked()
        assert config.parallel.sizes == (1, 1, 1, 1)
        assert config.parallel.stages == (30,)
        assert config.parallel.microbatches == 1
        assert config.data.max_length == 2048
        assert config.run_dir == "runs/SmolLM2-135M-Instruct.Q4_1-full"
        assert config.optim.decay_steps is None
        assert config.logger.name == ""

    def test_data_takes_the_ranks_left_over_in_training(self) -> None:
        assert checked("parallel.tensor=3", "parallel.pipeline=2", ranks=12).parallel.sizes == (2, 2, 1, 3)
        assert checked("parallel.data=2", ranks=2).parallel.sizes == (2, 1, 1, 1)

    def test_tensor_takes_the_ranks_left_over_in_serving(self) -> None:
        assert served("parallel.pipeline=2", ranks=6).parallel.sizes == (1, 2, 1, 3)
        assert served("parallel.tensor=2", "parallel.pipeline=2", ranks=4).parallel.sizes == (1, 2, 1, 2)

    def test_without_a_launch_the_degree_stays_open(self) -> None:
        assert checked(ranks=None).parallel.data is None
        job = load(["data.path=rows.jsonl", "parallel.tensor=2", "nodes=2"], "submit")
        assert check(job, "submit", 1, SMOLLM2).parallel == ParallelConf(
            tensor=2, stages=(30,), microbatches=1, virtual_stages=1
        )
        preview = load(["data.path=rows.jsonl", "parallel.tensor=2"], "preview")
        assert check(preview, "preview", 1, SMOLLM2).parallel.tensor == 2

    @pytest.mark.parametrize(
        ("argv", "ranks", "microbatches"),
        [
            (["train.batch_size=8"], 1, 1),
            (["train.batch_size=8", "parallel.pipeline=2"], 2, 4),
            (["train.batch_size=3", "parallel.pipeline=2"], 2, 3),
            (["train.batch_size=8", "parallel.microbatches=3"], 1, 3),
            (["train.batch_size=5", "parallel.microbatches=9"], 2, 9),
            (["train.batch_size=1"], 4, 1),
        ],
    )
    def test_microbatches_are_as_set_or_at_most_the_rows_of_a_data_rank(
        self, argv: list[str], ranks: int, microbatches: int
    ) -> None:
        assert checked(*argv, ranks=ranks).parallel.microbatches == microbatches

    def test_the_decay_ends_with_the_run(self) -> None:
        assert checked("optim.schedule=cosine", "train.steps=7").optim.decay_steps == 7
        assert checked("optim.schedule=linear", "train.steps=7", "optim.decay_steps=9").optim.decay_steps == 9

    def test_rows_and_prefix_fit_the_context(self) -> None:
        assert checked("tune=prefix", "model=tiny", architecture=TINY).data.max_length == 2028
        assert checked("tune=prefix").data.max_length == 2048
        assert checked("data.max_length=8192").data.max_length == 8192
        assert checked("tune=lora", architecture=None).data.max_length == 2048

    def test_names(self) -> None:
        config = checked("logger=wandb", "run_dir=runs/mine")
        assert (config.run_dir, config.logger.name) == ("runs/mine", "mine")
        assert checked("model=tiny", "tune=lora", architecture=TINY).run_dir == "runs/tiny-lora"
        assert served("model.path=some/dir/").serve.model_name == "dir"
        assert served("model=tiny", architecture=TINY).serve.model_name == "tiny"
        assert served("serve.model_name=bot").serve.model_name == "bot"

    def test_serving_length_is_the_models(self) -> None:
        assert served().serve.max_length == 8192
        assert served("serve.max_length=100").serve.max_length == 100
        assert served(architecture=None).serve.max_length is None

    def test_a_checked_config_is_checked_again_without_change(self, tmp_path: Path) -> None:
        argv = [
            "tune=lora",
            "optim.schedule=cosine",
            "logger=wandb",
            "parallel.pipeline=3",
            "train.batch_size=4",
        ]
        config = checked(*argv, ranks=6)
        assert check(config, "train", 6, SMOLLM2) == config
        save(config, tmp_path / "config.yaml")
        assert read_saved(tmp_path / "config.yaml") == config
        assert check(served("adapters.a=adapter"), "serve", 1, SMOLLM2) == served("adapters.a=adapter")

    def test_the_given_config_is_left_alone(self) -> None:
        config = load(["data.path=rows.jsonl"], "train")
        before = repr(config)
        check(config, "train", 4, SMOLLM2)
        assert repr(config) == before


class TestStages:
    @pytest.mark.parametrize("pipeline", range(1, 9))
    def test_every_layer_is_somewhere(self, pipeline: int) -> None:
        counts = balanced_stages(SMOLLM2, pipeline)
        assert (sum(counts), len(counts)) == (30, pipeline)
        assert min(counts) >= 1
        assert list(counts) == sorted(counts, reverse=True)

    def test_the_last_stage_has_the_head_and_fewer_layers(self) -> None:
        assert balanced_stages(SMOLLM2, 2) == (19, 11)  # the head weighs as much as eight layers
        assert balanced_stages(replace(SMOLLM2, vocab_size=1), 2) == (15, 15)
        assert balanced_stages(replace(SMOLLM2, vocab_size=1), 4) == (8, 8, 7, 7)
        assert balanced_stages(replace(SMOLLM2, num_layers=2), 2) == (1, 1)


class TestLayout:
    def test_product_of_the_degrees(self) -> None:
        assert refused("parallel.data=2", "parallel.tensor=2", ranks=3) == (
            "parallel.data=2 * pipeline=1 * context=1 * tensor=2 = 4 ranks but the launch has 3; "
            "start 4 ranks (torchrun --nproc-per-node=4) or change a degree"
        )

    def test_ranks_left_over(self) -> None:
        assert refused("parallel.tensor=2", ranks=3) == (
            "parallel.pipeline=1 * context=1 * tensor=2 = 2 ranks but the launch has 3, not a multiple of 2; "
            "start a multiple or change a degree"
        )
        assert "= 2 ranks but the launch has 3, not a multiple of 2" in refused(
            "parallel.pipeline=2", command="serve", ranks=3
        )
        assert "= 2 ranks but the launch has 1, not a multiple of 2" in refused("parallel.tensor=2")

    def test_more_tensor_ranks_than_heads(self) -> None:
        assert refused("parallel.tensor=10", ranks=10) == (
            "parallel.tensor=10 exceeds the model's num_heads=9; use parallel.tensor<=9"
        )
        assert "parallel.tensor=10 exceeds the model's num_heads=9" in refused(command="serve", ranks=10)
        narrow = replace(SMOLLM2, ffn_width=2)
        assert "exceeds the model's ffn_width=2" in refused("parallel.tensor=3", ranks=3, architecture=narrow)

    def test_more_stages_than_layers(self) -> None:
        assert refused("parallel.pipeline=31", ranks=31) == (
            "parallel.pipeline=31 exceeds the model's num_layers=30; use parallel.pipeline<=30"
        )

    def test_layers_per_stage(self) -> None:
        assert refused("parallel.stages=[10,10]", "parallel.pipeline=3", ranks=3).split("\n") == [
            "parallel.stages=[10,10] has 2 stages but parallel.pipeline=3; give one number of layers per stage",
            "parallel.stages=[10,10] adds up to 20 but the model's num_layers=30",
        ]
        assert checked("parallel.stages=[29,1]", "parallel.pipeline=2", ranks=2).parallel.stages == (29, 1)

    def test_chunks_of_layers_per_rank(self) -> None:
        for schedule, chunks in {"gpipe": 1, "1f1b": 1, "zero_bubble": 1, "interleaved": 2, "zbv": 2}.items():
            parallel = checked(f"parallel.schedule={schedule}", "parallel.pipeline=2", ranks=2).parallel
            assert (parallel.virtual_stages, len(parallel.stages)) == (chunks, 2 * chunks)
        given = checked(
            "parallel.schedule=interleaved", "parallel.virtual_stages=3", "parallel.stages=[20,2,2,2,2,2]",
            "parallel.pipeline=2", ranks=2,
        )  # fmt: skip
        assert given.parallel.virtual_stages == 3
        assert given.parallel.stages == (20, 2, 2, 2, 2, 2)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (
                ["parallel.schedule=interleaved", "parallel.virtual_stages=1"],
                "parallel.virtual_stages=1 leaves parallel.schedule=interleaved nothing to interleave; "
                "use parallel.virtual_stages>=2, or parallel.schedule=1f1b",
            ),
            (
                ["parallel.schedule=zbv", "parallel.virtual_stages=3"],
                "parallel.virtual_stages=3 does not fit parallel.schedule=zbv, whose ranks hold 2 chunks; "
                "use parallel.virtual_stages=2, or parallel.schedule=interleaved",
            ),
            (
                ["parallel.schedule=zero_bubble", "parallel.virtual_stages=2"],
                "parallel.virtual_stages=2 does not fit parallel.schedule=zero_bubble, whose ranks hold 1 chunk; "
                "use parallel.virtual_stages=1, or parallel.schedule=interleaved",
            ),
            (
                ["parallel.schedule=interleaved", "parallel.virtual_stages=16"],
                "parallel.pipeline=2 * parallel.virtual_stages=16 = 32 virtual stages exceed the model's "
                "num_layers=30; use fewer of one of them, or parallel.schedule=1f1b or zero_bubble with "
                "parallel.virtual_stages=1",
            ),
            (
                ["parallel.schedule=zbv", "parallel.stages=[15,15]"],
                "parallel.stages=[15,15] has 2 stages but parallel.pipeline=2 * parallel.virtual_stages=2 = 4; "
                "give the layers of each virtual stage, in the model's order",
            ),
        ],
    )
    def test_chunks_that_do_not_fit(self, argv: list[str], message: str) -> None:
        assert refused(*argv, "parallel.pipeline=2", ranks=2) == message

    @pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
    @pytest.mark.parametrize("ranks", [1, 2, 5])
    def test_chunks_lie_where_the_plan_puts_them(self, schedule: str, ranks: int) -> None:
        chunks = 1 if schedule == "1f1b" else 2
        parallel = ParallelConf(pipeline=ranks, schedule=schedule)  # pyright: ignore[reportArgumentType]
        plan = Plan(ranks, chunks, 0, ((),) * ranks, "vee" if schedule == "zbv" else "loop")
        for rank, held in enumerate(virtual_stages(ranks, chunks, placement(parallel))):
            assert held == tuple(plan.virtual_stage(rank, Action("F", 0, chunk)) for chunk in range(chunks))

    def test_sequence_parallelism_needs_tensor_ranks(self) -> None:
        for settings in (["parallel.sequence=true"], ["parallel.sequence=true", "parallel.tensor=1"]):
            assert refused(*settings) == (
                "parallel.sequence=true has no effect with parallel.tensor=1; remove it or set parallel.tensor>1"
            )
        assert checked("parallel.sequence=true", "parallel.tensor=3", ranks=3).parallel.sequence

    def test_a_trace_needs_a_pipeline(self) -> None:
        assert refused("parallel.trace=true") == (
            "parallel.trace=true has no effect with parallel.pipeline=1; remove it or set parallel.pipeline>1"
        )
        assert checked("parallel.trace=true", "parallel.pipeline=2", ranks=2).parallel.trace

    def test_serving_has_no_replicas(self) -> None:
        assert "parallel.data=2 is not possible in serve: there are no replicas yet; use parallel.data=1" in refused(
            "parallel.data=2", command="serve", ranks=2
        )
        assert "parallel.context=2 is not possible in serve: prompts aren't cut over ranks; use parallel.context=1" in (
            refused("parallel.context=2", command="serve", ranks=2)
        )

    def test_context_methods(self) -> None:
        method = "parallel.context_method=ulysses"
        assert checked("parallel.context=4", ranks=4).parallel.ulysses_size == 1
        assert checked("parallel.context=4", method, ranks=4).parallel.ulysses_size == 4
        assert checked("parallel.context=4", method, "parallel.ulysses=2", ranks=4).parallel.ulysses_size == 2
        assert refused(method) == (
            "parallel.context_method=ulysses has no effect with parallel.context=1; remove it or set parallel.context>1"
        )
        assert refused("parallel.context=4", "parallel.ulysses=2", ranks=4) == (
            "parallel.ulysses=2 has no effect with parallel.context_method=ring; "
            "remove it or set parallel.context_method=ulysses"
        )
        assert refused("parallel.context=4", method, "parallel.ulysses=3", ranks=4) == (
            "parallel.ulysses=3 doesn't divide parallel.context=4; use one of 1, 2, 4"
        )

    def test_ulysses_cuts_heads(self) -> None:
        method = "parallel.context_method=ulysses"
        assert checked("parallel.context=9", method, ranks=9).parallel.ulysses_size == 9
        assert refused("parallel.context=12", method, ranks=12) == (
            "parallel.context=12 with context_method=ulysses exceeds the model's num_heads=9; "
            "use parallel.ulysses=6, with rings of 2, or parallel.context_method=ring"
        )
        assert refused("parallel.context=10", "parallel.ulysses=5", method, "parallel.tensor=2", ranks=20) == (
            "parallel.ulysses=5 with context_method=ulysses exceeds the 3 query heads of a tensor rank; "
            "use parallel.ulysses=2, with rings of 5, or parallel.context_method=ring"
        )
        assert "parallel.context=0 is out of range" in refused("parallel.context=0", method)

    @pytest.mark.parametrize("degree", ["data", "pipeline", "context", "tensor"])
    def test_degrees_below_one(self, degree: str) -> None:
        config = Config(parallel=ParallelConf(**{degree: 0}))
        with pytest.raises(ConfigError, match=rf"parallel\.{degree}=0 is out of range; use parallel\.{degree}>=1"):
            check(config, "train", 2, SMOLLM2)


class TestTraining:
    def test_data_path(self) -> None:
        config = load(["train.steps=1"], "train")
        with pytest.raises(ConfigError, match=r"^data\.path is empty; set data\.path=<file of rows"):
            check(config, "train", 1, SMOLLM2)
        assert (
            refused("data.path=none.jsonl") == "data.path=none.jsonl is not a file; give a JSONL file or a JSON array"
        )

    def test_evaluation(self) -> None:
        assert (
            refused("data.evaluate_path=none.jsonl")
            == "data.evaluate_path=none.jsonl is not a file; give a JSONL file or a JSON array"
        )
        assert refused("data.evaluate_path=") == "data.evaluate_path is empty; set a file or remove it"
        assert refused("data.evaluate_path=other.jsonl", "data.evaluate_fraction=0.1") == (
            "data.evaluate_path=other.jsonl and data.evaluate_fraction=0.1 exclude each other; remove one of them"
        )
        assert refused("train.evaluate_every=5") == (
            "train.evaluate_every=5 has nothing to evaluate; set data.evaluate_path or data.evaluate_fraction"
        )
        config = checked("train.evaluate_every=5", "data.evaluate_fraction=0.2")
        assert config.data.evaluate_stride == 5
        assert Config().data.evaluate_stride is None

    def test_warm_up(self) -> None:
        assert checked("optim.warmup_steps=200").optim.warmup_steps == 200  # train.steps is only where this run stops
        assert refused("optim.warmup_steps=200", "optim.schedule=cosine") == (
            "optim.warmup_steps=200 exceeds train.steps=100; use optim.warmup_steps<=100"
        )
        assert refused("optim.warmup_steps=9", "optim.schedule=linear", "optim.decay_steps=8") == (
            "optim.warmup_steps=9 exceeds optim.decay_steps=8; use optim.warmup_steps<=8"
        )
        leg = checked("optim.warmup_steps=9", "optim.schedule=linear", "optim.decay_steps=10", "train.steps=3")
        assert leg.optim.warmup_steps == 9

    def test_lowest_learning_rate(self) -> None:
        assert refused("optim.schedule=cosine", "optim.min_lr=1", "optim.lr=0.5") == (
            "optim.min_lr=1.0 exceeds optim.lr=0.5; use a smaller one"
        )

    def test_resume(self) -> None:
        assert refused("train.resume=nevr") == "train.resume=nevr is not auto, never or a checkpoint's directory"
        assert checked("train.resume=adapter").train.resume == "adapter"

    def test_targets(self) -> None:
        linears = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
        assert refused("tune=lora", "tune.targets=[q_prj]") == (
            f"tune.targets: q_prj is not one of {linears}; did you mean q_proj?"
        )
        assert refused("tune=lora", "tune.targets=[lm_head]").startswith("tune.targets: lm_head is not one of")
        assert refused("tune=lora", "tune.targets=[]") == f"tune.targets=[] trains nothing; name some of {linears}"
        assert refused("tune=lora", "tune.targets=[q_proj,q_proj]") == (
            "tune.targets=[q_proj,q_proj] names a linear twice; name each once"
        )

    def test_lengths(self) -> None:
        assert refused("data.max_length=9000") == (
            "data.max_length=9000 exceeds the model's max_positions=8192; use data.max_length<=8192"
        )
        assert refused("data.max_length=8190", "tune=prefix") == (
            "data.max_length=8190 exceeds the model's max_positions=8192 - tune.virtual_tokens=20; "
            "use data.max_length<=8172"
        )
        assert refused("tune=prefix", "tune.virtual_tokens=8191") == (
            "tune.virtual_tokens=8191 leaves no room in the model's max_positions=8192"
        )

    def test_job(self) -> None:
        assert refused("time=soon", command="submit") == (
            "time=soon is not a time limit; use hours:minutes:seconds or days-hours:minutes:seconds"
        )
        for time in ("30", "30:00", "1:00:00", "2-12", "2-12:30:00"):
            check(load(["data.path=rows.jsonl", f"time={time}"], "submit"), "submit", 1, SMOLLM2)


class TestModel:
    def test_no_path(self) -> None:
        assert refused("model=hf", "model.path=") == (
            "model.path is empty; set model.path=<HF directory, .gguf file or hub id> or choose model=smollm2"
        )

    def test_a_path_and_an_architecture(self) -> None:
        assert refused("model=tiny", "model.path=adapter").startswith(
            "model.path=adapter has an architecture of its own, but model.architecture is set too; remove"
        )

    def test_impossible_shapes(self) -> None:
        bad = replace(SMOLLM2, num_kv_heads=2, head_dim=3, sliding_window=4, window_layers=(True,))
        assert refused(architecture=bad).split("\n") == [
            "the model's num_heads=9 is no multiple of num_kv_heads=2",
            "the model's head_dim=3 is odd; rotary embeddings turn pairs",
            "the model's window_layers has 1 entries but num_layers=30",
        ]
        bad = replace(SMOLLM2, rotary_dim=66, alibi=True, normalised_head=True, tied_embeddings=True)
        assert refused(architecture=bad).split("\n") == [
            "the model's rotary_dim=66 must be even and at most head_dim=64",
            "the model's alibi=true leaves rotary_* and rope_* without effect; remove them",
            "the model's normalised_head=true needs a head of its own; set tied_embeddings=false",
        ]
        partial = replace(SMOLLM2, rotary_dim=32, rope_scaling=RopeScaling(kind="yarn", factor=2.0))
        assert refused(architecture=partial) == "the model's rotary_dim=32 excludes yarn, which would scale whole heads"
        scaled = replace(SMOLLM2, rope_scaling=RopeScaling(kind="linear", factor=0.5))
        assert refused(architecture=scaled) == (
            "the model's rope_scaling.factor=0.5 is out of range; use rope_scaling.factor>=1"
        )
        assert "the model's num_kv_heads=0 is out of range" in refused(architecture=replace(SMOLLM2, num_kv_heads=0))


class TestServing:
    def test_lengths(self) -> None:
        assert refused("serve.max_length=9000", command="serve") == (
            "serve.max_length=9000 exceeds the model's max_positions=8192; use serve.max_length<=8192"
        )

    @pytest.mark.parametrize("value", ["much", "2GiBi", "-1", "0", "2 apples"])
    def test_memory(self, value: str) -> None:
        assert refused(f"serve.kv_memory={value}", command="serve").startswith("serve.kv_memory=")

    def test_adapters(self) -> None:
        assert (
            refused("adapters.a=none", command="serve")
            == "adapters.a=none is not a directory; give the one PEFT or training wrote"
        )
        assert refused("adapters.=adapter", command="serve") == (
            "adapters.=adapter has no name; write adapters.<name>=adapter"
        )
        assert refused("adapters.bot=adapter", "serve.model_name=bot", command="serve") == (
            "adapters.bot=adapter has the name of the base model; use another"
        )

    def test_api_key_and_watch(self) -> None:
        assert refused("serve.api_key=", command="serve") == "serve.api_key is empty; set a key or remove it"
        assert "serve.watch=runs/x is not available yet" in refused("serve.watch=runs/x", command="serve")

    def test_generate(self) -> None:
        assert refused(command="generate") == (
            "prompt and prompts: neither is set; set prompt=<text> or prompts=<file.jsonl>"
        )
        assert refused("prompt=x", "prompts=rows.jsonl", command="generate").startswith("prompt and prompts: both are")
        assert (
            refused("prompts=none.jsonl", command="generate") == "prompts=none.jsonl is not a file; give a JSONL file"
        )
        assert refused("prompt=x", "adapter=b", "adapters.a=adapter", command="generate") == (
            "adapter=b is not among the adapters (a); set adapters.b=<directory>"
        )
        assert refused("prompt=x", "top_p=0.5", command="generate") == (
            "top_p=0.5 has no effect with temperature=0; set temperature>0"
        )
        argv = ["prompt=", "adapter=a", "adapters.a=adapter", "temperature=1", "top_p=0.5", "seed=3"]
        assert check(load(argv, "generate"), "generate", 1, SMOLLM2).prompt == ""


class TestAllAtOnce:
    def test_every_violation_is_listed(self) -> None:
        argv = [
            "parallel.tensor=10",
            "parallel.pipeline=40",
            "parallel.context=2",
            "data.path=none",
            "tune=lora",
        ]
        lines = refused(
            *argv, "tune.targets=[x_proj]", "optim.warmup_steps=101", "optim.schedule=linear", ranks=3
        ).split("\n")
        beginnings = [
            "parallel.pipeline=40 * context=2 * tensor=10 = 800 ranks but the launch has 3, not",
            "parallel.tensor=10 exceeds",
            "parallel.pipeline=40 exceeds",
            "data.path=none is not",
            "optim.warmup_steps=101 exceeds",
            "tune.targets: x_proj is not",
        ]
        assert [line.startswith(start) for line, start in zip(lines, beginnings, strict=True)] == [True] * 6

    def test_configs_built_in_code_have_their_types_checked(self) -> None:
        config = Config(parallel=ParallelConf(schedule="pipedream", tensor="two"))  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError) as caught:
            check(config, "train", 1, SMOLLM2)
        assert str(caught.value).split("\n") == [
            "parallel.tensor=two is not an integer or null",
            "parallel.schedule=pipedream is not available yet; use one of gpipe, 1f1b, interleaved, zero_bubble, zbv",
        ]
