"""The library of CUDA ops: built, linked and loaded without a GPU; and all of it run on the host executor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cuda_ops, dispatch
from kernels.cuda_layout import CudaLayout
from tests.cuda_cubins import nvcc
from tests.cuda_host import CACHE, HOST, KERNELS, ROOT, compile_with, digest, headers, once

CUDA = torch.device("cuda")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "gate",
    "rotary",
    "write_pages",
    "rotary_write",
    "attention_varlen",
    "attention_paged",
)
SOURCES = [KERNELS / "ops.cpp", *sorted(KERNELS.glob("*.cu"))]


def python(code: str, library: Path) -> str:
    """What the code prints, run in a process of its own with the library's path as argument."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def test_it_links_loads_registers_and_refuses_tensors_on_the_cpu(library):
    """Linked with -z defs: no symbol is left to find; loaded by a torch for CPUs; each op names its first argument."""
    undefined = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, check=False)
    report = undefined.stdout + undefined.stderr
    assert "libtorch_cpu" in report and "undefined symbol" not in report and "not found" not in report
    assert "libcudart" not in report  # it is linked statically
    code = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.onemesh_cuda
x, y, z, i = torch.zeros(2, 4), torch.zeros(2, 2, 4), torch.zeros(1, 2, 2, 4), torch.zeros(2, dtype=torch.int64)
calls = dict(
    rms_norm=(x, x[0], 1e-5), add_rms_norm=(x, None, x[0], 1e-5), gate=(x, x, 0), rotary=(y, x, x),
    write_pages=(z, z, y, y, i), rotary_write=(y, y, y, x, x, z, z, i),
    attention_varlen=(y, y, y, i, i, i, None, i, 0, 1.0, 0.0), attention_paged=(y, z, z, i, i, i, i, i, None, i, i, i, 0, 0, 0, 1.0, 0.0))
for name, arguments in calls.items():
    try:
        getattr(ops, name)(*arguments)
    except RuntimeError as error:
        print(name, "|", str(error).splitlines()[0])
"""
    lines = [line.split(" | ") for line in python(code, library).splitlines()]
    assert [line[0] for line in lines] == list(OPS)
    for _, message in lines:
        assert "must be on a CUDA device" in message, message
    first = (
        "rms_norm: x",
        "rms_norm: x",
        "gate: gate",
        "rotary: x",
        "write_pages: k",
        "rotary_write: q",
        "attention_varlen: q",
        "attention_paged: q",
    )
    for (_, message), named in zip(lines, first, strict=True):
        assert named in message


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


@pytest.fixture(scope="module")
def host_library() -> Path:
    """The same ops and sources for g++, on the host executor: they take tensors on the CPU."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O2", "-fPIC", "-DONEMESH_CUDA_ON_HOST", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    flags += [
        f"-I{HOST}",
        f"-I{KERNELS}",
        f"-isystem{torch_folder / 'include'}",
        "-DTORCH_TARGET_VERSION=0x020d000000000000",
    ]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,defs"]
    own = [*SOURCES, HOST / "executor.cpp"]

    def make(to: Path) -> None:
        compile_with(["g++", *flags, "-shared", "-x", "c++", *map(str, own), "-x", "none", *links, "-o", str(to)])

    return once(CACHE / f"host-{digest([*own, *headers(), *flags, torch.__version__])}.so", make)


def test_the_backend_as_a_whole_on_the_host(host_library):
    """Python, the registered ops, launchers and kernels: as the reference, and row-invariant, bit for bit."""
    code = """
import sys, torch
from dataclasses import replace
from kernels import autograd, dispatch
from kernels.cuda_layout import CudaLayout
from kernels.dispatch import CUDA, REFERENCE
from kernels.reference import working_dtype
from tests.cuda_host import assert_as_plain
torch.ops.load_library(sys.argv[1])
draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
tables = dict(page_size=16, prefix_lengths=[0, 20, 3], prefix_tables=[[], [20, 21], [22]])
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q, k, v = draw(0, 60, 5, 64), draw(1, 23, 16, 2, 64), draw(2, 23, 16, 2, 64)
    angle, x, y, grad = draw(3, 60, 64), draw(4, 60, 77) * 4, draw(5, 60, 77), draw(6, 60, 77)
    def attend(ops, t):
        layout = ops.paged_layout([1, 50, 9], [200, 90, 9], [range(13), range(13, 19), [19]], **tables)
        options = dict(kv_index=(0, 1, 1, 0, 0), window=60, scale=0.2, soft_cap=3.0, alibi_slopes=[0.1, 0.2, 0.3, 0.4, 0.5])
        return ops.attention_paged(t(q), t(k), t(v), layout, **options)[0]
    def pages(ops, t):
        keys, values = torch.zeros(4, 16, 5, 64, dtype=t(k).dtype), torch.zeros(4, 16, 5, 64, dtype=t(k).dtype)
        ops.write_pages(keys, values, t(q), t(q) * 2, torch.randperm(64, generator=torch.Generator().manual_seed(8))[:60])
        return torch.cat([keys, values])
    def gradient(ops, t):
        a, b = t(x).requires_grad_(), t(y[0]).requires_grad_()
        with torch.enable_grad():
            total, normed = ops.add_rms_norm(ops.rms_norm(a, b, 1e-5), a, b, 1e-5)
            ops.silu_gate(normed, ops.gelu_gate(total, a)).backward(t(grad))
        return torch.cat([a.grad, b.grad[None]])
    def varlen(ops, t):
        out, lse = ops.attention_varlen(t(q), t(k.flatten(0, 1)[:60]), t(v.flatten(0, 1)[:60]), [0, 1, 40, 40, 60],
                                        kv_index=(0, 1, 1, 0, 0), window=9, scale=0.2, soft_cap=2.0)
        return torch.cat([out.flatten(1), lse.to(out.dtype)], 1)
    cases = dict(
        attention_varlen=varlen,
        attention_paged=attend, write_pages=pages, gradient=gradient,
        silu_gate=lambda o, t: o.silu_gate(t(x), t(y)), gelu_gate=lambda o, t: o.gelu_gate(t(x), t(y)), rms_norm=lambda o, t: o.rms_norm(t(x), t(y[0]), 1e-5),
        rotary=lambda o, t: o.rotary(t(q), angle.cos().to(working_dtype(t(q).dtype)), angle.sin().to(working_dtype(t(q).dtype))),
    )
    with torch.no_grad():
        for name, case in cases.items():
            low = lambda t: t.to(dtype)
            assert_as_plain(case(CUDA, low), case(REFERENCE, low), case(REFERENCE, torch.Tensor.double))
    with torch.no_grad():
        a, b, w = x.to(dtype), y.to(dtype), y[0].to(dtype)
        total, out = CUDA.add_rms_norm(a, b, w, 1e-5)
        assert total.equal(a + b) and out.equal(CUDA.rms_norm(a + b, w, 1e-5))
        cos, sin, rows, slots = angle.cos(), angle.sin(), q.to(dtype), torch.arange(60).flip(0)
        keys, values = torch.zeros(2, 4, 16, 5, 64, dtype=dtype)
        turned = CUDA.rotary_write(rows, rows * 2, rows * 3, cos, sin, keys, values, slots)
        assert turned.equal(CUDA.rotary(rows, cos, sin)) and values.flatten(0, 1)[slots].equal(rows * 3)
        assert keys.flatten(0, 1)[slots].equal(CUDA.rotary(rows * 2, cos, sin))
        for none in (torch.zeros(0, 8), torch.zeros(3, 0)):
            none = none.to(dtype)
            assert CUDA.silu_gate(none, none).shape == CUDA.rms_norm(none, none.new_zeros(none.shape[1]), 1e-5).shape == none.shape
        assert CUDA.rotary(rows[:0], cos[:0], sin[:0]).shape == (0, 5, 64)
        out, lse = CUDA.attention_paged(rows[:0], keys, values, CUDA.paged_layout([], [], [], page_size=16), scale=1.0)
        assert out.shape == (0, 5, 64) and lse.shape == (0, 5)
bad = draw(0, 3, 4)
for name, call in dict(
    weight=lambda: CUDA.rms_norm(bad, bad[0, :3], 1e-5), up=lambda: CUDA.silu_gate(bad, bad[:2]),
    dtype=lambda: CUDA.silu_gate(bad, bad.half()), cos=lambda: CUDA.rotary(bad[None], bad, bad),
    odd=lambda: CUDA.rotary(bad[None, :, :3], bad[:1, :3], bad[:1, :3]),
).items():
    try:
        with torch.no_grad():
            call()
    except RuntimeError as error:
        print(str(error).splitlines()[0])
print("checked")
"""
    text = python(code, host_library)
    assert text.endswith("checked\n")
    for part in (
        "rms_norm: weight has size 3 in dim 0, not 4",
        "gate: up has size 2 in dim 0, not 3",
        "gate: up has another dtype than gate",
        "rotary: cos has size 3 in dim 0, not 1",
        "rotary: x has an odd head dim 3",
    ):
        assert part in text


def test_paged_attention_needs_its_own_layout():
    q, cache = torch.zeros(1, 2, 4), torch.zeros(1, 4, 2, 4)
    plain = dispatch.REFERENCE.paged_layout([1], [1], [[0]], page_size=4)
    with pytest.raises(ValueError, match="layout must come from this backend's paged_layout, got PagedLayout"):
        cuda_ops.attention_paged(q, cache, cache, plain, scale=1.0)
    layout = CudaLayout.build([1], [1], [[0]], page_size=4)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        cuda_ops.attention_paged(q, cache, cache, layout, window=0, scale=1.0)


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

    monkeypatch.setattr(cuda_ops, "_has_flash_attn", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", Flash)
    q, k, v = (torch.randn(9, n, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    for window in (None, 3):
        got = cuda_ops.attention_varlen(q, k, v, [0, 5, 9], window=window, scale=0.3)
        want = dispatch.REFERENCE.attention_varlen(q, k, v, [0, 5, 9], window=window, scale=0.3)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert calls == [((-1, 0), True, 5, torch.int32, True), ((2, 0), True, 5, torch.int32, True)]
    cuda_ops.attention_varlen(q.requires_grad_(), k, v, [0, 5, 9], scale=0.3)
    assert len(calls) == 2
