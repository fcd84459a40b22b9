"""The compiled CPU kernels on processors older than this one, emulated by qemu-user.

What runs is the library itself, as `make install` built it. torch dies on the older ones (SSE4.2 is not enough for it),
so a small program calls the kernels, and functions that do nothing stand in for torch's.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from kernels import cpu_ops
from tests.cuda_host import ROOT, compile_with, digest, once

SOURCES = ROOT / "kernels" / "cpu"
CACHE = ROOT / "build" / "older_processors"
PROCESSORS = {
    "core2duo": "generic",
    "Nehalem": "sse42",
    "Opteron_G5": "sse42",  # has AVX and FMA, but not AVX2
    "Haswell": "avx2",
}
"""Model in qemu -> the instruction set to choose there. AVX-512 is not among what qemu emulates."""

PLANTED = """
#define ISA sse42
#include "norm.cpp"
constexpr Kernels some() {
  Kernels kernels{};
  kernels.name = "sse42", kernels.norm = norm_sse42;
  return kernels;
}
extern "C" const Kernels kernels_sse42 = some(), kernels_generic = some();
"""


@pytest.fixture(autouse=True)
def _built() -> None:
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the program that calls the kernels needs g++ on x86-64")
    if not cpu_ops.LIBRARY.exists():
        pytest.skip(f"{cpu_ops.LIBRARY.name} isn't built: there was no C++ compiler at `make install`")


@pytest.fixture
def qemu() -> str:
    path = shutil.which("qemu-x86_64")
    if path is None:
        pytest.skip("qemu-user isn't installed (apt install qemu-user)")
    return path


def program() -> Path:
    flags = ["-std=c++17", "-O1", "-Wall", f"-I{SOURCES}"]
    source = ROOT / "tests" / "unit" / "older_processors.cpp"
    parts = [*flags, source, SOURCES / "kernels.h", SOURCES / "attention_args.h"]
    return once(
        CACHE / f"program-{digest(parts)}",
        lambda to: compile_with(["g++", *flags, str(source), "-ldl", "-o", str(to)]),
    )


def stand_ins() -> list[Path]:
    """Libraries with the names of torch's, and the functions of its stable ABI that ours asks for."""
    command = ["nm", "-D", "--undefined-only", str(cpu_ops.LIBRARY)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = "".join(f"int {name}(void) {{ return 0; }}\n" for name in re.findall(r"\b(?:aoti_)?torch_\w+", symbols))
    assert text

    def make(to: Path) -> None:
        source = to.with_suffix(".c")
        source.write_text(text)
        compile_with(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{to.name}", str(source), "-o", str(to)])

    return [once(CACHE / f"torch-{digest([text])}" / name, make) for name in ("libtorch_cpu.so", "libc10.so")]


def planted(flags: list[str]) -> Path:
    """A library whose kernels for SSE4.2, of which it has one, are compiled with these flags."""
    common = ["g++", "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", f"-I{SOURCES}"]

    def make(to: Path) -> None:
        source, compiled = to.with_suffix(".cpp"), to.with_suffix(".o")
        source.write_text(PLANTED)
        compile_with([*common, *flags, "-c", str(source), "-o", str(compiled)])
        compile_with(
            [*common, "-shared", "-DONEMESH_SSE42", str(SOURCES / "dispatch.cpp"), str(compiled), "-o", str(to)]
        )

    parts = [*common, *flags, PLANTED, SOURCES / "norm.cpp", SOURCES / "dispatch.cpp", *sorted(SOURCES.glob("*.h"))]
    return once(CACHE / f"planted-{digest(parts)}.so", make)


def run(folder: Path, *libraries: Path, under: tuple[str, ...] = (), isa: str = "") -> subprocess.CompletedProcess[str]:
    """The program on these libraries, natively or under an emulator; `isa` forces an instruction set."""
    command = [*under, program(), *libraries]
    environment = os.environ | {"ONEMESH_CPU_ISA": isa}
    # an emulated program that crashes leaves its memory in the working directory
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def native(folder: Path, isa: str) -> list[str]:
    """What this processor prints with an instruction set; skips if it doesn't have that."""
    done = run(folder, *stand_ins(), cpu_ops.LIBRARY, isa=isa)
    if f"ONEMESH_CPU_ISA={isa} is not one of" in done.stderr:
        pytest.skip(f"this processor or the library has no {isa} to compare with")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_program_calls_every_kernel_and_sees_its_bits(tmp_path):
    chosen, *results = native(tmp_path, "sse42")
    assert chosen == "sse42"
    named = re.findall(r"^  X\((\w+),", (SOURCES / "kernels.h").read_text(), re.MULTILINE)
    assert len(named) > 20 and {line.split()[0] for line in results} == set(named)
    wide = native(tmp_path, "avx2")[1:]  # fused multiply-adds round once
    differing = {a.split()[0] for a, b in zip(results, wide, strict=True) if a != b}
    assert {"linear", "norm", "gate", "attend", "attend_backward", "log_sum_exp"} <= differing


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_older_processor_gets_its_kernels_and_their_bits(processor, qemu, tmp_path):
    isa = PROCESSORS[processor]
    expected = native(tmp_path, isa)
    done = run(tmp_path, *stand_ins(), cpu_ops.LIBRARY, under=(qemu, "-cpu", processor))
    if isa == "avx2" and re.search(r"doesn't support requested feature: .*\.(avx2|fma)\b", done.stderr):
        pytest.skip("this qemu can't emulate AVX2; 7.2 can")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == expected
    assert expected[0] == isa


def test_an_instruction_set_that_the_processor_lacks_is_refused(qemu, tmp_path):
    done = run(tmp_path, *stand_ins(), cpu_ops.LIBRARY, under=(qemu, "-cpu", "Nehalem"), isa="avx2")
    assert done.returncode == 1
    assert "ONEMESH_CPU_ISA=avx2 is not one of sse42, generic" in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("flags", [["-mavx"], ["-mavx2", "-mfma"]])
def test_kernels_with_instructions_of_newer_processors_are_found(flags, qemu, tmp_path):
    under = (qemu, "-cpu", "Nehalem")
    good = run(tmp_path, planted(["-msse4.2"]), under=under)
    assert good.returncode == 0 and [line.split()[0] for line in good.stdout.splitlines()] == ["sse42", "norm", "norm"]
    bad = run(tmp_path, planted(flags), under=under)
    assert (bad.returncode, bad.stdout) == (-signal.SIGILL, "sse42\n"), bad.stderr
