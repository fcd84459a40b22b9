"""What nvcc makes of the kernels for sm_80, sm_90a and sm_100: registers, shared memory, occupancy, instructions.

    python -m tests.cuda_cubins docs/benchmarks/cuda_resources.md

writes the table. What is looked up once is kept under build/, by content.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.cuda_host import CACHE, KERNELS, ROOT, compile_with, digest, headers, once

ARCHITECTURES = {"sm_80": (8, 0, 164), "sm_90a": (9, 0, 228), "sm_100": (10, 0, 228)}
"""Target -> compute capability, KB of shared memory per SM."""


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """One kernel compiled for one target."""

    kernel: str
    """Its name with template arguments."""
    architecture: str
    registers: int
    static_bytes: int
    """Shared memory of fixed size."""
    spilled_bytes: int
    instructions: dict[str, int]
    """How often each opcode with its modifiers stands in the code."""

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches the pattern from its start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is said of kernels whose name matches `kernel` from start to end; every kernel has exactly one claim."""

    kernel: str
    registers: int
    """At most."""
    threads: int
    """Per block."""
    shared: int = 0
    """Bytes of dynamic shared memory per block."""
    warps: int
    """Per SM at least, on the target with the least shared memory."""
    has: tuple[str, ...] = ()
    """Opcodes that must occur."""


def _tile_bytes(head_dim: int) -> int:
    """Two stages of 32 keys and values, 16 bytes added to every row."""
    return 4 * 32 * (head_dim + 8) * 2


HALF = "(__half|__nv_bfloat16)"
LDG, STG, MMA, COPY = r"LDG\.E\.128", r"STG\.E\.128", r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\.128"
CLAIMS = [
    Claim(kernel=r"(rms_norm|gate|rotary)<\w+, true>", registers=56, threads=128, warps=36, has=(LDG, STG)),
    Claim(kernel=r"(rms_norm|gate|rotary)<\w+, false>", registers=56, threads=128, warps=36),
    *(
        claim
        for d, split, whole in ((64, 8, 12), (128, 4, 8))
        for claim in (
            Claim(
                kernel=rf"split_mma<\w+, {d}>",
                registers=248,
                threads=64,
                shared=2 * _tile_bytes(d),
                warps=split,
                has=(MMA, COPY, "LDSM"),
            ),
            Claim(
                kernel=rf"whole_mma<\w+, {d}>",
                registers=248,
                threads=128,
                shared=_tile_bytes(d) + 256 * d,
                warps=whole,
                has=(MMA, COPY, "LDSM"),
            ),
        )
    ),
    Claim(kernel=r"attend_rows<\w+, true, \w+>", registers=128, threads=128, warps=16, has=(LDG,)),
    Claim(kernel=r"attend_rows<\w+, false, \w+>", registers=128, threads=128, warps=16),
    Claim(kernel=r"(merge_parts|row_delta)<\w+>", registers=48, threads=128, warps=40),
    *(
        claim
        for layout, narrow, wide in (
            ("false, false", 30720, 61440),
            ("false, true", 28416, 56832),
            ("true, true", 26112, 52224),
        )
        for claim in (
            Claim(
                kernel=rf"multiply<\w+, {layout}, 128, 128>",
                registers=255,
                threads=128,
                shared=wide,
                warps=8,
                has=(MMA, COPY, "LDSM"),
            ),
            Claim(
                kernel=rf"multiply<float, {layout}, 64, 64>",
                registers=168,
                threads=128,
                shared=narrow,
                warps=12,
                has=("FFMA", COPY),
            ),
        )
    ),
    Claim(
        kernel=rf"multiply<{HALF}, false, false, 16, 64>|multiply_segments<{HALF}, \w+>",
        registers=64,
        threads=128,
        shared=19200,
        warps=32,
        has=(MMA, COPY, "LDSM"),
    ),
    Claim(
        kernel=r"multiply<float, false, false, 16, 64>|multiply_segments<float, \w+>",
        registers=128,
        threads=128,
        shared=19200,
        warps=16,
        has=("FFMA", COPY),
    ),
    *(
        Claim(kernel=kernel, registers=255, threads=128, shared=shared, warps=warps, has=(*has, COPY))
        for kernel, shared, warps, has in (
            (f"grad_queries<{HALF}, 64>", 64512, 8, (MMA, "LDSM")),
            (f"grad_queries<{HALF}, 128>", 113664, 4, (MMA, "LDSM")),
            ("grad_queries<float, 128>", 105984, 4, ("FFMA",)),
            (f"grad_keys<{HALF}, 64>", 46080, 8, (MMA, "LDSM")),
            (f"grad_keys<{HALF}, 128>", 78848, 8, (MMA, "LDSM")),
            ("grad_keys<float, 128>", 110592, 4, ("FFMA",)),
            (f"grad_queries<{HALF}, 256>", 103936, 4, (MMA, "LDSM")),
            ("grad_queries<float, 256>", 101120, 4, ("FFMA",)),
            (f"grad_keys<{HALF}, 256>", 106496, 4, (MMA, "LDSM")),
            ("grad_keys<float, 256>", 102400, 4, ("FFMA",)),
        )
    ),
    Claim(kernel=r"log_sum_exp<\w+, true>", registers=40, threads=256, warps=48, has=(LDG,)),
    Claim(kernel=r"loss_gradient<\w+, \w+, true>", registers=40, threads=256, warps=48, has=(LDG, STG)),
    Claim(kernel=r"(log_sum_exp<\w+|loss_gradient<\w+, \w+), false>", registers=40, threads=256, warps=48),
    Claim(kernel=r"embedding<\w+, true>", registers=32, threads=128, warps=48, has=(LDG, STG)),
    Claim(kernel=r"embedding_grad<\w+, true>", registers=40, threads=128, warps=48, has=(LDG, STG)),
    Claim(kernel=r"embedding(_grad)?<\w+, false>", registers=40, threads=128, warps=48),
    Claim(kernel=r"merge(_grad)?<\w+, true>", registers=64, threads=128, warps=32, has=(LDG, STG)),
    Claim(kernel=r"merge(_grad)?<\w+, false>", registers=64, threads=128, warps=32),
    Claim(kernel="draw|logprobs", registers=64, threads=256, warps=32),
]


def claim_for(kernel: str) -> Claim:
    """The one claim about this kernel."""
    found = [claim for claim in CLAIMS if re.fullmatch(claim.kernel, kernel)]
    assert len(found) == 1, f"{kernel} has {len(found)} claims in CLAIMS"
    return found[0]


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm of the development packages; the packages come without the right to execute them."""
    try:
        package = importlib.metadata.distribution(f"nvidia-cuda-{name}")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"nvidia-cuda-{name} isn't installed: pip install .[dev]")
    path = Path(str(package.locate_file(next(f for f in package.files or () if f.name == name))))
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | 0o111)
    return path


def nvcc() -> str:
    """The compiler's path."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("there is no nvcc on PATH")
    return found


def release() -> str:
    """Of nvcc, such as 13.0."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found, text
    return found[1]


def _demangled(names: Sequence[str]) -> list[str]:
    """`whole_mma<__half, 64>` from the mangled names."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"\(anonymous namespace\)::", "", line) for line in text.splitlines())
    return [re.sub(r"^void ", "", re.sub(r"\(.*\)$", "", line)) for line in short]


def cubins(source: Path) -> list[Cubin]:
    """Every kernel of a .cu file for every target."""
    compiler, dump, disassembler = nvcc(), tool("cuobjdump"), tool("nvdisasm")
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    flags = ["-std=c++17", "-Ikernels/cuda", "-Ikernels", *targets, "--threads=2", "--resource-usage", "-fatbin"]
    own = [h for h in headers() if h.parent == KERNELS]

    def make(to: Path) -> None:
        code = to.with_suffix(".fatbin")
        command = [compiler, *flags, "-o", str(code), str(source.relative_to(ROOT))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        environment = os.environ | {"PATH": f"{disassembler.parent}:{os.environ['PATH']}"}
        sass = subprocess.run([dump, "-sass", code], env=environment, capture_output=True, text=True, check=True).stdout
        to.write_text(json.dumps([asdict(c) for c in _parse(done.stderr, sass)]))

    name = f"{source.stem}-{digest([source, *own, *flags, release(), inspect.getsource(_parse)])}.json"
    return [Cubin(**c) for c in json.loads(once(CACHE / name, make).read_text())]


def _parse(resources: str, sass: str) -> list[Cubin]:
    """From ptxas' messages and the disassembly."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    opcodes: dict[tuple[str, str], Counter[str]] = {}
    architecture, counter = "", Counter[str]()
    for line in sass.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s+Function : (\w+)", line):
            counter = opcodes[found[1], architecture] = Counter()
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            counter[found[1]] += 1
    found = pattern.findall(resources)
    return [
        Cubin(
            kernel=kernel,
            architecture=architecture,
            registers=int(registers),
            static_bytes=int((re.search(r"(\d+) bytes smem", rest) or ["", "0"])[1]),
            spilled_bytes=int(spilled),
            instructions=dict(opcodes[mangled, architecture]),
        )
        for kernel, (mangled, architecture, spilled, registers, rest) in zip(
            _demangled([f[0] for f in found]), found, strict=True
        )
    ]


def warps_per_sm(cubin: Cubin) -> int:
    """Warps that fit an SM at once, by NVIDIA's own formula (cuda_occupancy.h, compiled for the host)."""
    claim = claim_for(cubin.kernel)
    include = Path(nvcc()).resolve().parents[1] / "include"
    candidates = [include, *Path("/usr/local").glob("cuda*/include")]
    found = next((p for p in candidates if (p / "cuda_occupancy.h").exists()), None)
    assert found, f"no cuda_occupancy.h in {candidates}"
    source = ROOT / "tests" / "cuda_on_host" / "occupancy.cpp"
    path = once(
        CACHE / f"occupancy-{digest([source, found / 'cuda_occupancy.h'])}",
        lambda to: compile_with(["g++", "-O1", f"-I{found}", str(source), "-o", str(to)]),
    )
    numbers = [*ARCHITECTURES[cubin.architecture], claim.threads, cubin.registers, cubin.static_bytes, claim.shared]
    done = subprocess.run([path, *map(str, numbers)], capture_output=True, text=True, check=True)
    return int(done.stdout) * claim.threads // 32


def every_cubin() -> list[Cubin]:
    """Of all sources, two compiled at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [c for found in pool.map(cubins, sorted(KERNELS.glob("*.cu"))) for c in found]


def table() -> str:
    """The report in Markdown: one row per kernel, registers and warps per SM by target."""
    rows: dict[str, dict[str, Cubin]] = {}
    for cubin in every_cubin():
        rows.setdefault(cubin.kernel, {})[cubin.architecture] = cubin
    lines = [
        "# What nvcc makes of the CUDA kernels",
        "",
        "Written by `python -m tests.cuda_cubins docs/benchmarks/cuda_resources.md`; compiled by nvcc",
        f"{release()}, not run. Registers per thread and warps per SM (of 64) stand as {' / '.join(ARCHITECTURES)};",
        "shared memory is bytes per block. Warps are what registers and shared memory admit, by `cuda_occupancy.h`. Nothing",
        "spills.",
        "",
        "| kernel | threads | registers | shared | warps per SM | instructions (sm_80) |",
        "|---|---|---|---|---|---|",
    ]
    names = {"HMMA": "HMMA", "LDSM": "LDSM", "LDGSTS": "LDGSTS", "LDG.128": LDG, "STG.128": STG}
    for kernel, by_target in rows.items():
        each = [by_target[a] for a in ARCHITECTURES]
        claim = claim_for(kernel)
        counts = ", ".join(f"{n} {name}" for name, pattern in names.items() if (n := each[0].count(pattern)))
        lines.append(
            f"| `{kernel.replace('__nv_bfloat16', 'bf16').replace('__half', 'fp16')}` | {claim.threads} "
            f"| {' / '.join(str(c.registers) for c in each)} | {each[0].static_bytes + claim.shared} "
            f"| {' / '.join(str(warps_per_sm(c)) for c in each)} | {counts} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table())
