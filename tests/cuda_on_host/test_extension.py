"""The library of CUDA ops, built by nvcc, linked and loaded without a GPU; how the backend is chosen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cuda_attention, cuda_ops, dispatch
from tests.cuda_cubins import nvcc
from tests.cuda_host import CACHE, KERNELS, ROOT, compile_with, digest, headers, once

CUDA = torch.device("cuda")
SOURCES = sorted(p for pattern in ("*.cpp", "*.hpp", "*.cu") for p in KERNELS.glob(pattern))


@pytest.fixture(scope="module")
def library() -> Path:
    """Built by CMake as for users, for one target only: the others differ in what nvcc writes, see test_nvcc."""
    nvcc()
    tools = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{tools}:{os.environ['PATH']}")
    ninja = shutil.which("ninja", path=f"{tools}:{os.environ['PATH']}")
    assert cmake and ninja, "cmake and ninja are requirements of the build"

    def make(to: Path) -> None:
        folder = to.parent / "build"
        compile_with(
            [
                cmake, "-S", str(KERNELS), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CUDA_ARCHITECTURES=80-real", f"-DPython_EXECUTABLE={sys.executable}",
            ]
        )  # fmt: skip
        compile_with([ninja, "-C", str(folder)])
        (folder / "_cuda.so").replace(to)

    own = [h for h in headers() if h.parent == KERNELS]
    return once(CACHE / f"cuda-{digest([*SOURCES, *own, KERNELS / 'CMakeLists.txt', torch.__version__])}.so", make)


def called() -> set[str]:
    """Names of the ops that kernels/*.py call."""
    texts = [path.read_text() for path in KERNELS.parent.glob("*.py")]
    return {name for text in texts for name in re.findall(r"torch\.ops\.onemesh_cuda\.(\w+)\(", text)}


def test_it_links_loads_registers_and_refuses_tensors_on_the_cpu(library):
    """Linked with -z defs: no symbol is left to find; loaded by a torch for CPUs; each op names its first tensor."""
    undefined = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, check=False)
    report = undefined.stdout + undefined.stderr
    assert "libtorch_cpu" in report and "undefined symbol" not in report and "not found" not in report
    assert "libcudart" not in report  # it is linked statically
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
values = {"Tensor": torch.zeros(2, 2), "float": 1.0, "int": 0, "bool": False, "List[Tensor]": []}
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("onemesh_cuda::"):
        op = getattr(torch.ops.onemesh_cuda, name.split("::")[1]).default
        assert all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA"))
        try:
            op(*(values.get(str(a.type)) for a in op._schema.arguments))
        except RuntimeError as error:
            print(op._schema.name, str(error).splitlines()[0], sep=" | ")
"""
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    messages = dict(line.removeprefix("onemesh_cuda::").split(" | ") for line in done.stdout.splitlines())
    assert messages.keys() == called()
    for name, message in messages.items():
        assert re.search(rf"\b{name.removeprefix('add_')}: \w+ must be on a CUDA device", message), message


def test_dispatch_chooses_by_device_and_by_what_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_ops, "LIBRARY", tmp_path / "_cuda.so")
    assert dispatch.select(CUDA, torch.bfloat16) is dispatch.REFERENCE
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"_cuda\.so doesn't load.*ONEMESH_CUDA=1 make clean install"):
        dispatch.select(CUDA, torch.bfloat16)
    monkeypatch.setattr(cuda_ops, "load", lambda: True)
    assert dispatch.select(CUDA, torch.float16) is dispatch.CUDA
    assert dispatch.select(CUDA, torch.float64) is dispatch.REFERENCE
    assert dispatch.select(torch.device("meta"), torch.float32) is dispatch.REFERENCE


def test_flash_attn_is_used_where_it_can_be(monkeypatch):
    """A stand-in with flash-attn's signature: the arguments say causal attention inside each document."""
    calls = []

    class Flash:
        @staticmethod
        def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, window_size, softmax_scale, causal, **more):
            calls.append((window_size, causal, more["max_seqlen_q"], cu_seqlens_q.dtype, more["return_attn_probs"]))
            window = None if window_size[0] < 0 else window_size[0] + 1
            out, lse = dispatch.REFERENCE.attention_varlen(q, k, v, cu_seqlens_q, window=window, scale=softmax_scale)
            return out, lse.T, None

    monkeypatch.setattr(cuda_attention, "_has_flash_attn", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", Flash)
    q, k, v = (torch.randn(9, n, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    for window in (None, 3):
        got = cuda_attention.attention_varlen(q, k, v, [0, 5, 9], window=window, scale=0.3)
        want = dispatch.REFERENCE.attention_varlen(q, k, v, [0, 5, 9], window=window, scale=0.3)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert calls == [((-1, 0), True, 5, torch.int32, True), ((2, 0), True, 5, torch.int32, True)]
    kernel = dispatch.REFERENCE.attention_varlen
    monkeypatch.setattr(cuda_attention._Pack, "attend", lambda self, *qkv: kernel(*qkv, [0, 5, 9], scale=self.scale))
    got = cuda_attention.attention_varlen(q.requires_grad_(), k, v, [0, 5, 9], scale=0.3)
    assert len(calls) == 2 and all(x.requires_grad for x in got)
