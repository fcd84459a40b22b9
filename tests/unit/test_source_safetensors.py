"""Safetensors by byte range: blocks of every shape, headers checked, directories with one file or an index."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conf.schema import ConfigError, ModelConf
from parallel.model.directory import DirectorySource, SafetensorsFiles
from parallel.model.hf import parameter_shapes
from parallel.model.ranges import STAGING
from parallel.model.safetensors_io import build_header, read_block, read_header
from parallel.model.source import open_source

TENSORS: Mapping[str, Tensor] = {
    "matrix": torch.arange(35.0).view(7, 5),
    "vector": torch.arange(9.0).bfloat16(),
    "cube": torch.arange(24.0).view(3, 4, 2).half(),
    "double": torch.arange(6.0, dtype=torch.float64).view(2, 3),
    "integers": torch.arange(-4, 4, dtype=torch.int8),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    save_file(dict(TENSORS), path, metadata={"format": "pt"})
    return path


@given(data=st.data())
@settings(deadline=None)
def test_any_block_in_any_dtype(stored: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    tensor = TENSORS[name]
    index: list[slice] = []
    for dim, size in enumerate(tensor.shape):
        start = data.draw(st.integers(0, size)) if dim < 2 else 0
        stop = data.draw(st.integers(start, size)) if dim < 2 else size
        index.append(slice(start, stop))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, tensor.dtype]))
    header = read_header(stored)
    block = read_block(stored, header.entries[name], tuple(index), dtype)
    assert block.dtype == dtype and block.is_contiguous()
    assert torch.equal(block, tensor[tuple(index)].to(dtype))


def test_conversion_goes_in_chunks(tmp_path: Path) -> None:
    tensor = torch.randn(3 * STAGING // (4 * 1000), 1000)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    entry = read_header(tmp_path / "x.safetensors").entries["x"]
    for index in ((slice(1, None), slice(None)), (slice(1, None), slice(3, 900))):
        block = read_block(tmp_path / "x.safetensors", entry, index, torch.bfloat16)
        assert torch.equal(block, tensor[index].bfloat16())


def test_built_headers_are_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    raw, header = build_header(described, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(raw)
        for name, tensor in TENSORS.items():
            assert file.tell() == header.entries[name].start
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            assert file.tell() == header.entries[name].end
    assert read_header(path) == header
    assert len(raw) % 8 == 0
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, TENSORS[name])


def pack(fields: Any, data: bytes = b"") -> bytes:
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file: its header length is 0 of 0 bytes"),
        (b"\x80\x02}q\x00X\x05\x00\x00more", "is not a safetensors file: its header length is"),
        (pack({"x": entry()})[:20], "is truncated: its header ends at byte"),
        (pack(b"{'x'"), "is corrupt: its header is not JSON"),
        (pack(b"[" * 100_000), "is corrupt: its header is not JSON"),
        (pack({"__metadata__": 3}), "is corrupt: its __metadata__ is not an object"),
        (pack(b"[1, 2]"), "is corrupt: its header is not a JSON object"),
        (pack({"x": entry("F4")}, bytes(8)), "x has dtype F4; supported are F64, F32, F16, BF16"),
        (pack({"x": entry()}, bytes(7)), "is truncated: x ends at byte"),
        (pack({"x": entry()}, bytes(9)), "is corrupt: 1 bytes follow the last tensor"),
        (pack({"x": entry(shape=(3,))}, bytes(8)), "x F32 [3] can't take 8 bytes"),
        (pack({"x": entry(offsets=(8, 0))}, bytes(8)), "x F32 [2] can't take -8 bytes"),
        (pack({"x": entry(offsets=(0, 8, 9))}, bytes(8)), "the header entry of x is"),
        (pack({"x": entry(shape=(-2,))}, bytes(8)), "the header entry of x is"),
        (pack({"x": {"dtype": "F32"}}, bytes(8)), "the header entry of x is"),
        (pack({"x": 3}, bytes(8)), "the header entry of x is 3"),
        (pack({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)), "is corrupt: y overlaps x"),
        (pack({"x": entry(), "y": entry(offsets=(9, 17))}, bytes(17)), "is corrupt: y leaves a hole after x"),
    ],
    ids=itertools.count(),
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        read_header(path)


@given(position=st.integers(0, 700), value=st.integers(0, 255), cut=st.none() | st.integers(0, 800))
@settings(deadline=None, max_examples=300)
def test_damage_is_an_error_or_harmless(stored: Path, position: int, value: int, cut: int | None) -> None:
    damaged = stored.parent / "damaged.safetensors"
    content = bytearray(stored.read_bytes())
    content[min(position, len(content) - 1)] = value
    damaged.write_bytes(content[:cut])
    with contextlib.suppress(ConfigError):
        for found in read_header(damaged).entries.values():
            read_block(damaged, found, tuple(slice(0, size) for size in found.shape), found.dtype)


def test_shortened_while_open(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors").entries["x"]
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ConfigError, match=r"x\.safetensors is truncated: it ends before byte"):
        read_block(tmp_path / "x.safetensors", found, (slice(0, 100),), torch.float32)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=50,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shard", ["10GB", "10KB"])
def test_directories_saved_by_transformers(tmp_path: Path, llama: LlamaForCausalLM, shard: str) -> None:
    llama.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    source = open_source(ModelConf(path=str(tmp_path)))
    state = llama.state_dict()
    assert source.names() == tuple(parameter_shapes(source.architecture))
    assert set(source.names()) == set(state)
    for name in source.names():
        whole = tuple(slice(0, size) for size in source.shape(name))
        assert torch.equal(source.read(name, whole, torch.float32), state[name])
    part = (slice(3, 9), slice(0, 24))
    weight = state["model.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(
        source.read("model.layers.2.self_attn.q_proj.weight", part, torch.bfloat16), weight[part].bfloat16()
    )


def test_fingerprint_is_of_the_weights_not_the_files(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    prints: list[str] = []
    for shard in ("10GB", "10KB"):
        llama.save_pretrained(tmp_path / shard, max_shard_size=shard)
        prints.append(DirectorySource(tmp_path / shard).fingerprint)
    assert prints[0] == prints[1]
    with (tmp_path / "10GB" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert DirectorySource(tmp_path / "10GB").fingerprint != prints[0]


def test_index_with_a_missing_file(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="10KB")
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=rf"index\.json names {victim.name}, which is missing"):
        SafetensorsFiles(tmp_path)


def test_index_that_leaves_the_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../other.safetensors"}}')
    save_file({"x": torch.zeros(1)}, tmp_path.parent / "other.safetensors")
    with pytest.raises(ConfigError, match=r"names \.\./other\.safetensors, which is missing"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": [1]}', '{"weight_map": {"x": 3}}'])
def test_index_without_a_map(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match="has no weight_map of tensor names to file names"):
        SafetensorsFiles(tmp_path)


def test_index_that_lies(tmp_path: Path) -> None:
    save_file({"y": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    with pytest.raises(ConfigError, match=r"says x is in a\.safetensors, which doesn't hold it"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"\x80\x02}.")
    with pytest.raises(ConfigError, match=rf"has its weights as pickle \({name}\).*refused; convert it"):
        SafetensorsFiles(tmp_path)


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        SafetensorsFiles(tmp_path)


def test_config_that_does_not_fit_the_weights(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"attention_bias": False}, "q_proj.bias is there but its config has no such parameter"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**9}, "its config says 1000000000 layers, it holds 42 tensors"),
        ({"vocab_size": 51}, "model.embed_tokens.weight has shape [50, 24], its config says [51, 24]"),
        ({"model_type": "gemma"}, f"{tmp_path}: config.json model_type='gemma' is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=re.escape(message)):
            open_source(ModelConf(path=str(tmp_path)))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter; give its base model"):
        open_source(ModelConf(path=str(tmp_path)))


def test_broken_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing; a model directory needs it"):
        open_source(ModelConf(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        open_source(ModelConf(path=str(tmp_path)))
