"""Every architecture under layouts, in serving and in files: what one process and transformers compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conf.schema import Architecture, ModelConf, TuneConf
from parallel import checkpoint
from parallel.adapters import peft as peft_files
from parallel.adapters.prefix import Prefix, StepPrefix
from parallel.comm import Launch
from parallel.model.attend import DocumentAttend
from parallel.model.source import open_source
from parallel.model.step import Step
from parallel.model.tokenizer_bytes import byte_tokenizer
from serve.start import build_engine
from tests.commands import train as train_command
from tests.commands import write_chats
from tests.dist.test_peft_interop import PROMPTS, engine_logits, serving
from tests.dist.test_serving_parity import NEW_TOKENS, requests
from tests.dist.test_training_parity import assert_same
from tests.models import BAICHUAN_13B, GEMMA2, GEMMA3, GLM4, QWEN3, RandomWeights
from tests.serving import Served, Serving, serve
from tests.training import Outcome, layout, train
from tests.unit.test_decoder import hf_model, our_model, packed_step

ARCHITECTURES = {"qwen3": QWEN3, "gemma2": GEMMA2, "gemma3": GEMMA3, "glm4": GLM4, "baichuan": BAICHUAN_13B}
IN_TRANSFORMERS = ("qwen3", "gemma2", "gemma3", "glm4")
LAYOUTS = {
    "tensor2": layout(tensor=2),
    "tensor3_pipeline2": layout(tensor=3, pipeline=2, microbatches=2),
    "pipeline2_recompute": layout(pipeline=2, microbatches=3, recompute="full"),
}
TUNES = {"full": TuneConf(kind="full"), "lora": TuneConf(kind="lora", rank=4), "prefix": TuneConf(kind="prefix")}


@cache
def alone(name: str, tune: str) -> Outcome:
    """One process, one microbatch."""
    return train(layout(architecture=ARCHITECTURES[name], tune=TUNES[tune]))


CASES = [
    ("qwen3", "tensor2", "full"),
    ("qwen3", "tensor3_pipeline2", "full"),
    ("qwen3", "pipeline2_recompute", "lora"),
    ("gemma2", "tensor2", "lora"),
    ("gemma2", "tensor3_pipeline2", "full"),
    ("gemma2", "tensor3_pipeline2", "prefix"),
    ("gemma3", "tensor2", "full"),
    ("gemma3", "tensor3_pipeline2", "lora"),
    ("gemma3", "pipeline2_recompute", "full"),
    ("glm4", "tensor3_pipeline2", "full"),
    ("glm4", "tensor2", "prefix"),
    ("baichuan", "tensor3_pipeline2", "full"),
    ("baichuan", "tensor2", "lora"),
]


@pytest.mark.parametrize(("name", "how", "tune"), CASES, ids=str)
def test_loss_and_every_gradient_are_those_of_one_process(name: str, how: str, tune: str) -> None:
    run = replace(LAYOUTS[how], architecture=ARCHITECTURES[name], tune=TUNES[tune])
    assert_same(train(run), alone(name, tune), 1e-10)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_kernels_gradients_in_float32_are_those_of_float64(name: str) -> None:
    """The C++ kernels' caps, slopes and windows, beside the reference's."""
    run, exact = train(layout(architecture=ARCHITECTURES[name], dtype="float32", tensor=2)), alone(name, "full")
    assert run.losses == pytest.approx(exact.losses, rel=1e-6)
    for key, tensor in exact.gradients.items():
        assert (run.gradients[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def served(name: str, **how: Any) -> Serving:
    """A random model with a vocabulary for bytes."""
    architecture = replace(ARCHITECTURES[name], vocab_size=301)
    return Serving(model=ModelConf(dtype="float32", architecture=architecture), **how)


@cache
def reference(name: str) -> Served:
    """One rank, all requests at once."""
    return serve(served(name), [requests()])


def transformers_model(serving: Serving) -> Any:
    """The same weights in transformers, in float32."""
    source = open_source(serving.model)

    class Weights:
        architecture: Architecture = source.architecture

        def state(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
            whole = {name: tuple(slice(0, n) for n in source.shape(name)) for name in source.names()}
            return {name: source.read(name, index, dtype) for name, index in whole.items()}

    return hf_model(source.architecture, Weights(), torch.float32)  # pyright: ignore[reportArgumentType]


def theirs(directory: Path) -> Any:
    """A directory's model in transformers."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    oracle = transformers_model(served(name))
    oracle.generation_config.eos_token_id = None
    answers = []
    for request in requests()[::3]:
        ids = torch.tensor([request.prompt])
        out = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        answers.append(tuple(out[0, len(request.prompt) :].tolist()))
        assert list(answers[-1]) == reference(name).tokens[request.id]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(
    ("name", "pipeline", "tensor"),
    [("qwen3", 1, 3), ("gemma2", 1, 2), ("gemma3", 2, 2), ("glm4", 1, 2), ("baichuan", 2, 2)],
    ids=lambda value: str(value),
)
def test_every_layout_gives_the_same_tokens(name: str, pipeline: int, tensor: int) -> None:
    assert serve(served(name, pipeline=pipeline, tensor=tensor), [requests()]).tokens == reference(name).tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chunking_and_company_change_no_bit(name: str) -> None:
    """Also: a decode step that is replayed gives the bits of a prefill."""
    assert serve(served(name, max_chunk=7), [requests()]).logprobs == reference(name).logprobs
    for request in requests()[4::6]:
        assert serve(served(name), [[request]]).logprobs[request.id] == reference(name).logprobs[request.id]


ADAPTERS = {"qwen3": "all-linear", "gemma2": "all-linear", "gemma3": "all-linear", "glm4": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(("name", "kind"), [*((name, "lora") for name in ADAPTERS), ("glm4", "prefix")])
def test_an_adapter_of_peft_serves_here(name: str, kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    transformers_model(served(name)).save_pretrained(str(base))
    byte_tokenizer().save(base)
    torch.manual_seed(1)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=ADAPTERS[name], task_type="CAUSAL_LM", init_lora_weights=False)
    prefix = PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM")
    model = get_peft_model(theirs(base), {"lora": lora, "prefix": prefix}[kind])
    model.save_pretrained(str(tmp_path / "adapter"))
    oracle, plain = PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval(), theirs(base)
    alone = serving(base, tmp_path / "adapter")
    engine = build_engine(alone.config, open_source(alone.model), Launch())
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected, without = oracle(input_ids=ids).logits[0], plain(input_ids=ids).logits[0]
        assert (expected - without).abs().max() > 0.05, "the adapter hardly does anything"
        assert torch.allclose(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
        if kind == "prefix":
            ours = logits_behind_prefix(open_source(alone.model), tmp_path / "adapter", prompt)
            assert torch.allclose(ours, expected, atol=1e-4, rtol=0)


def logits_behind_prefix(source: Any, adapter: Path, ids: Sequence[int]) -> torch.Tensor:
    """As training computes them."""
    decoder = our_model(source, torch.float32)
    found = peft_files.read(adapter, source.architecture)
    prefix = Prefix(found, [decoder], checkpoint.reader(adapter / peft_files.WEIGHTS), trainable=False)
    layers = StepPrefix.begin(prefix).layers(0, torch.float32)
    attend = DocumentAttend(source.architecture, decoder.here, decoder.ops, [0, len(ids)], layers)
    positions = torch.arange(len(ids)) + found.virtual_tokens
    with torch.no_grad():
        return decoder.logits(decoder(torch.tensor(ids), Step(position_T=positions, attend=attend)))


@pytest.mark.parametrize("name", ["gemma3", "glm4"])
def test_a_full_checkpoint_opens_in_transformers_and_trains_on(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    transformers_model(served(name)).save_pretrained(str(base))
    byte_tokenizer().save(base)
    options = [
        f"model.path={base}", "model=hf", "model.dtype=float32", f"data.path={write_chats(tmp_path / 'chats.jsonl')}",
        "data.max_length=100", f"run_dir={tmp_path / 'run'}", "optim.lr=0.003", "tune=full",
    ]  # fmt: skip
    code, printed = train_command(3, [*options, "train.steps=2", "parallel.tensor=3"])
    assert code == 0, printed
    code, printed = train_command(2, [*options, "train.steps=3", "parallel.pipeline=2"])
    assert code == 0, printed
    directory = tmp_path / "run" / "checkpoints" / "latest"
    oracle = theirs(directory)
    source = open_source(ModelConf(path=str(directory), dtype="float32"))
    decoder = our_model(source, torch.float32)  # pyright: ignore[reportArgumentType]
    ids = torch.tensor(PROMPTS[0])
    with torch.no_grad():
        ours = decoder.logits(decoder(ids, packed_step(decoder, (len(ids),))))
        expected = oracle(ids[None]).logits[0]
        before = transformers_model(served(name))(ids[None]).logits[0]
    assert torch.allclose(ours, expected, atol=1e-4)
    assert (expected - before).abs().max() > 0.01


def test_random_weights_feel_the_caps() -> None:
    """Without them the tests above would pass with the caps left out."""
    for field in ("score_cap", "logit_cap"):
        other = RandomWeights(replace(GEMMA2, **{field: None}))
        ids = torch.arange(20)
        ours, without = our_model(RandomWeights(GEMMA2), torch.float32), our_model(other, torch.float32)
        with torch.no_grad():
            a, b = (d.logits(d(ids, packed_step(d, (20,)))) for d in (ours, without))
        assert (a - b).abs().max() > 0.01, field
