"""What loading holds in anonymous memory: the block itself and little more, measured in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from conf.schema import Architecture
from parallel.model.hf import parameter_shapes, write_config
from parallel.model.safetensors_io import build_header
from tests.gguf_files import add_architecture, their_name

BIG = Architecture(
    num_layers=8,
    width=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    ffn_width=4096,
    vocab_size=32000,
    max_positions=128,
)

PROBE = """
import json, sys, threading, time
import torch
from conf.schema import ModelConf
from parallel.model.source import open_source
from kernels.dispatch import select
from kernels.ops import Packed
from parallel.mesh import Mesh
from parallel.model import gguf_file  # the decoder's imports are no part of loading
from parallel.model.load import build_decoder

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

path, dtype, rank, size = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
ops = select(torch.device("cpu"), dtype)
torch.zeros(4096, 4096).bfloat16()  # thread pools and allocator start here
peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
source = open_source(ModelConf(path=path))
kept = []
if len(sys.argv) > 5:  # as the server does, on the whole model
    decoder = build_decoder(
        source, Mesh.single(), [source.architecture.num_layers], dtype=dtype, ops=ops, trainable=False, packed=True
    )
    kept = [getattr(module, name) for module in decoder.modules() for name in getattr(module, "specs", {})]
    kept = [p.data if isinstance(p, Packed) else p for p in kept]
for name in () if kept else source.names():
    shape = source.shape(name)
    index = [slice(0, extent) for extent in shape]
    if len(shape) == 2:
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        share = shape[dim] // size
        index[dim] = slice(rank * share, (rank + 1) * share)
    kept.append(source.read(name, tuple(index), dtype))
done = True
watcher.join()
print(json.dumps({"kept": sum(x.numel() * x.element_size() for x in kept), "grown": peak - before}))
"""


def write_safetensors(folder: Path, architecture: Architecture, dtype: torch.dtype) -> Path:
    """A model directory of zeros that takes no disk."""
    shapes = parameter_shapes(architecture)
    raw, header = build_header({name: (dtype, shape) for name, shape in shapes.items()}, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(max(entry.end for entry in header.entries.values()))
    (folder / "config.json").write_text(json.dumps(write_config(architecture, None, "bfloat16")))
    return folder


def write_gguf(path: Path, architecture: Architecture, kind: GGMLQuantizationType) -> Path:
    """The same as a quantised GGUF file, with a vocabulary in its header."""
    writer = gguf.GGUFWriter(path, "llama")
    add_architecture(writer, architecture)
    writer.add_token_list([f"token {number}" for number in range(150_000)])
    end = 0
    for name, shape in parameter_shapes(architecture).items():
        stored = kind if len(shape) == 2 else GGMLQuantizationType.F32
        block, block_bytes = GGML_QUANT_SIZES[stored]
        length = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(their_name(name), shape, torch.zeros(0).numpy().dtype, length, raw_dtype=stored)
        end += -(-length // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + end)
    return path


def loading(path: Path, dtype: str, rank: int, size: int, *more: str) -> tuple[int, int]:
    """(bytes kept, growth of anonymous memory at its peak) of reading rank's share of everything."""
    command = [sys.executable, "-c", PROBE, str(path), dtype, str(rank), str(size), *more]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout)
    return figures["kept"], figures["grown"]


@pytest.mark.parametrize(
    ("kind", "dtype", "rank", "size"),
    [
        ("safetensors", "bfloat16", 0, 1),
        ("safetensors", "float32", 3, 4),
        ("Q8_0", "bfloat16", 1, 2),
        ("Q4_K", "float32", 0, 1),
    ],
)
def test_loading_holds_the_shard_and_little_more(tmp_path: Path, kind: str, dtype: str, rank: int, size: int) -> None:
    if kind == "safetensors":
        path = write_safetensors(tmp_path, BIG, torch.bfloat16)
    else:
        architecture = replace(BIG, num_layers=2) if kind == "Q4_K" else BIG
        path = write_gguf(tmp_path / "big.gguf", architecture, GGMLQuantizationType[kind])
    kept, grown = loading(path, dtype, rank, size)
    assert kept > 40 * 2**20
    assert grown > 0.9 * kept, "the probe must see the shard itself"
    assert grown <= 1.15 * kept + 64 * 2**20
    assert grown <= kept + 48 * 2**20, "staging is bounded whatever the size"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_server_packs_its_weights_one_at_a_time(tmp_path: Path, dtype: str) -> None:
    kept, grown = loading(write_safetensors(tmp_path, BIG, torch.bfloat16), dtype, 0, 1, "decoder")
    assert kept > 200 * 2**20
    assert 0.9 * kept < grown <= 1.15 * kept + 64 * 2**20
