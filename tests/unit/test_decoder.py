"""The decoder in one process against transformers' models on the same random weights, every gradient included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from conf.schema import Architecture, RopeScaling
from kernels import dispatch
from parallel.comm import Group
from parallel.loss import cross_entropy
from parallel.mesh import Mesh
from parallel.model.attend import DocumentAttend
from parallel.model.decoder import Decoder
from parallel.model.hf import places, write_config
from parallel.model.load import build_decoder
from parallel.model.step import Step
from tests.models import BIASED, GEMMA2, GEMMA3, GLM, GLM4, QWEN3, TINY, RandomWeights, in_files

LENGTHS = (17, 1, 30)

ARCHITECTURES = {
    "llama": TINY,
    "llama_biases": BIASED,
    "linear": replace(TINY, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "llama3": replace(
        TINY,
        rope_scaling=RopeScaling(
            kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
        ),
    ),
    "yarn": replace(TINY, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=64)),
    "mistral_window": replace(TINY, sliding_window=7, tied_embeddings=False),
    "qwen2": replace(TINY, qkv_bias=True),
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "glm": GLM,
    "glm4": GLM4,
}


def hf_model(architecture: Architecture, weights: RandomWeights, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model with our weights."""
    fields = write_config(architecture, None, str(dtype).removeprefix("torch."))
    model_type = fields.pop("model_type")
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    state = in_files(weights.state(dtype), places(architecture, {"model_type": model_type}))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert [name for name in missing if name != "lm_head.weight"] == []
    model.tie_weights()
    return model.eval()


def our_model(weights: RandomWeights, dtype: torch.dtype, *, trainable: bool = False) -> Decoder:
    """Our decoder with the same weights in one process."""
    ops = dispatch.select(torch.device("cpu"), dtype)
    layers = [weights.architecture.num_layers]
    return build_decoder(weights, Mesh.single(), layers, dtype=dtype, ops=ops, trainable=trainable)


def documents(vocab: int) -> list[torch.Tensor]:
    """Ragged token ids."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in LENGTHS]


def packed_step(decoder: Decoder, lengths: tuple[int, ...]) -> Step:
    """A step over documents of these lengths."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    attend = DocumentAttend(decoder.architecture, decoder.here, decoder.ops, ends)
    return Step(position_T=torch.cat([torch.arange(n) for n in lengths]), attend=attend)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_give_transformers_logits(name: str) -> None:
    architecture = ARCHITECTURES[name]
    weights = RandomWeights(architecture)
    oracle, decoder = hf_model(architecture, weights, torch.float32), our_model(weights, torch.float32)
    docs = documents(architecture.vocab_size)
    with torch.no_grad():
        ours = decoder.logits(decoder(torch.cat(docs), packed_step(decoder, LENGTHS)))
        theirs = torch.cat([oracle(doc[None]).logits[0] for doc in docs])
    assert theirs.abs().max() > 0.5
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4), (ours - theirs).abs().max()


@pytest.mark.parametrize("name", ["llama", "llama_biases", "mistral_window", "qwen3", "gemma2", "gemma3", "glm4"])
def test_loss_and_every_gradient_are_transformers(name: str) -> None:
    architecture = ARCHITECTURES[name]
    weights = RandomWeights(architecture)
    oracle = hf_model(architecture, weights, torch.float64)
    decoder = our_model(weights, torch.float64, trainable=True)
    docs = documents(architecture.vocab_size)

    hidden = decoder(torch.cat(docs), packed_step(decoder, LENGTHS))
    ends = torch.tensor(LENGTHS).cumsum(0)
    rows = torch.tensor([t for t in range(sum(LENGTHS)) if t + 1 not in ends])
    loss = cross_entropy(
        hidden[rows],
        decoder.head_weight,
        torch.cat(docs)[rows + 1],
        first_row=0,
        tensor=Group("tensor"),
        ops=decoder.ops,
        cap=architecture.logit_cap,
    )
    loss.backward()

    total = torch.zeros((), dtype=torch.float64)
    for doc in docs:
        logits = oracle(doc[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], doc[1:], reduction="sum")
    total.backward()

    assert abs(loss.item() - total.item()) < 1e-5 * total.item()
    theirs = dict(oracle.named_parameters())
    found = places(architecture, {"model_type": oracle.config.model_type})  # pyright: ignore
    for spec, parameter in decoder.placed():
        place = found[spec.name]
        whole = theirs[place.name].grad
        assert parameter.grad is not None
        assert whole is not None
        expected = whole[place.first_row : place.first_row + len(parameter)]
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-5, f"{spec.name}: {error}"
