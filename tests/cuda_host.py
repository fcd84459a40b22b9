"""CUDA sources built by g++ and run on the CPU, thread for thread: see docs/cuda.md.

`run` starts a program with the kernel inside, hands it tensors and gives back what became of them; a crash, a
sanitizer's report and the executor's own messages end that program and not the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "cuda"
HOST = ROOT / "tests" / "cuda_on_host" / "host"
CACHE = ROOT / "build" / "cuda_on_host"

COMMON = ("-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing")
KINDS = {
    "plain": ("-O2",),
    "asan": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-O1", "-g", "-fsanitize=thread"),
}
"""Build -> its flags. The scheduler of `tsan` isn't instrumented itself."""

FORWARD, REVERSE = (0, 0), (1, 0)


def seeded(seed: int) -> tuple[int, int]:
    """An order of threads and blocks drawn from a seed."""
    return 2, seed


ORDERS = (FORWARD, REVERSE, seeded(1), seeded(2))


@dataclass(frozen=True)
class Outcome:
    """What one program did."""

    code: int
    """Exit code; 3 for a mistake that the executor reports, negative for a signal."""
    text: str
    """Its stderr: messages of the executor and the sanitizers."""
    runs: list[dict[str, Tensor]]
    """Per order: the tensors afterwards, by the name of their argument."""
    status: list[int]
    """Per order: what the launcher returned, 0 for success."""


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make(temporary name)` unless it is there; two processes at it don't disturb each other."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            make(made)
            made.replace(path)
    return path


def digest(parts: Iterable[str | Path]) -> str:
    """Names what is made from these texts and files."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        found.update(b"\0")
    return found.hexdigest()[:20]


def compile_with(command: Sequence[str]) -> None:
    """Runs a compiler; its complaint is the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def headers(folder: Path = KERNELS) -> list[Path]:
    """All that a kernel in this folder may include."""
    return sorted(h for place in {folder, KERNELS, HOST} for pattern in ("*.cuh", "*.h") for h in place.glob(pattern))


def program(source: Path, kind: str) -> Path:
    """The program of a .cu file and build, made if need be; headers beside the file come before those of the kernels."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the host executor needs g++ on x86-64")
    flags = ["-std=c++17", "-march=native", *COMMON, *KINDS[kind]]
    include = [f"-I{folder}" for folder in (source.parent, KERNELS, HOST)]

    def compile_host(name: str) -> Path:
        own = [f for f in flags if f != "-fsanitize=thread"] + (["-DEXECUTOR_TSAN"] if kind == "tsan" else [])
        path = CACHE / f"{Path(name).stem}-{kind}-{digest([*own, _processor(), *headers(HOST), HOST / name])}.o"
        return once(path, lambda to: compile_with(["g++", *own, "-c", str(HOST / name), "-o", str(to)]))

    def link(to: Path) -> None:
        objects = [str(compile_host("executor.cpp")), str(compile_host("driver.cpp"))]
        end = ["-x", "none", *objects, "-rdynamic", "-ldl", "-o", str(to)]
        compile_with(["g++", *flags, *include, "-x", "c++", str(source), *end])

    parts = [*flags, _processor(), *headers(source.parent), HOST / "executor.cpp", HOST / "driver.cpp", source]
    return once(CACHE / f"{source.stem}-{kind}-{digest(parts)}", link)


def mutant(folder: Path, source: str, changed: str, old: str, new: str) -> Path:
    """kernels/cuda/<source> in a copy of all kernels where `old`, which stands once in file `changed`, is `new`."""
    for path in (*KERNELS.glob("*.cu"), *headers()):
        if path.parent == KERNELS:
            shutil.copy(path, folder / path.name)
    text = (KERNELS / changed).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {changed}"
    (folder / changed).write_text(text.replace(old, new))
    return folder / source


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, changed: str, old: str, new: str) -> None:
    """From now on kernels are built from a mutant's copy in `folder`."""
    mutant(folder, changed, changed, old, new)
    monkeypatch.setitem(globals(), "KERNELS", folder)


def build(*wanted: tuple[Path, str]) -> None:
    """Builds (source, kind) pairs, two at a time: the tests behind find them."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: program(*pair), wanted))


SCALARS = {"float": ctypes.c_float, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}


@functools.cache
def arguments(header: Path) -> dict[str, type[ctypes.Structure]]:
    """The structs of a header of launchers, by name: members are pointers, float, int32_t and int64_t."""
    found = {}
    text = re.sub(r"//.*", "", header.read_text())
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        fields: list[tuple[str, type]] = []
        for declaration in body.split(";"):
            words = declaration.replace("const ", "").split(None, 1)
            for member in words[1].split(",") if words else []:
                is_pointer = "*" in member or words[0].endswith("*")
                fields.append((member.strip(" *\n"), ctypes.c_void_p if is_pointer else SCALARS[words[0]]))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=98",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=97:atexit_sleep_ms=0",
}


class _Started:
    """A running program: ThreadSanitizer takes a millisecond to make a fiber, so it answers many messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=os.environ | OPTIONS
        )

    def ask(self, message: bytes, size: int, timeout: float) -> bytes | None:
        """The answer of `size` bytes; None if the program ended instead. It is killed after `timeout` seconds."""
        watch = threading.Timer(timeout, self.process.kill)
        watch.start()
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
            answer = self.process.stdout.read(size)
        except BrokenPipeError:
            answer = b""
        finally:
            watch.cancel()
        return answer if len(answer) == size else None

    def end(self) -> tuple[int, str]:
        """Lets the program end; its exit code and stderr."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        code = self.process.wait()
        with self.log:
            self.log.seek(0)
            return code, self.log.read().decode(errors="replace")


_started: list[_Started] = []
"""The program used last, if it still runs: at most one, they take memory."""


def _end_last() -> tuple[int, str]:
    return _started.pop().end() if _started else (0, "")


atexit.register(_end_last)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run(
    path: Path,
    function: str,
    kind: type[ctypes.Structure],
    values: Mapping[str, Tensor | float | None],
    *,
    orders: Sequence[tuple[int, int]] = (FORWARD,),
    shift: Mapping[str, int] | None = None,
    timeout: float = 60,
) -> Outcome:
    """Calls `function(&struct of kind, stream)` of the program, once per order, each time on the same tensors.

    A tensor becomes a pointer to an allocation of exactly its size, on a 256-byte border; `shift` moves named ones
    up by some bytes. Members without a value are 0.
    """
    tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
    shifts = {name: (shift or {}).get(name, 0) for name in tensors}
    scalars = {name: v for name, v in values.items() if v is not None and name not in tensors}
    blobs = {name: b"\xff" * shifts[name] + _bytes(tensor) for name, tensor in tensors.items()}
    message = [struct.pack("64s4q", function.encode(), len(orders), len(blobs), len(blobs), ctypes.sizeof(kind))]
    message += [struct.pack("qQ", *order) for order in orders]
    message += [struct.pack("q", len(blob)) for blob in blobs.values()]
    message += [struct.pack("3q", getattr(kind, name).offset, i, shifts[name]) for i, name in enumerate(blobs)]
    message += [bytes(kind(**scalars)), *blobs.values()]
    if not _started or _started[0].path != path:
        _end_last()
        _started.append(_Started(path))
    size = len(orders) * (8 + sum(map(len, blobs.values())))
    answer = _started[0].ask(b"".join(message), size, timeout)
    if answer is None:
        code, text = _end_last()
        return Outcome(code, text, [], [])
    outcome = Outcome(0, "", [], [])
    rest = memoryview(bytearray(answer))
    for _ in orders:
        outcome.status.append(struct.unpack("q", rest[:8])[0])
        rest = rest[8:]
        outcome.runs.append({})
        for name, tensor in tensors.items():
            data = rest[shifts[name] : len(blobs[name])]
            result = (
                torch.frombuffer(data, dtype=torch.uint8).clone() if len(data) else torch.empty(0, dtype=torch.uint8)
            )
            outcome.runs[-1][name] = result.view(tensor.dtype).view(tensor.shape)
            rest = rest[len(blobs[name]) :]
    return outcome


DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types of the kernels -> their codes in kernels.h."""


def call(
    source: str | Path,
    op: str,
    values: Mapping[str, Tensor | float | None],
    *,
    kind: str = "plain",
    orders: Sequence[tuple[int, int]] = ORDERS,
    shift: Mapping[str, int] | None = None,
) -> list[dict[str, Tensor]]:
    """`run` of launcher `onemesh_cuda_<op>` in kernels/cuda/<source>, which must succeed, on its `<Op>Args`."""
    struct = arguments(KERNELS / "kernels.h")["".join(word.title() for word in op.split("_")) + "Args"]
    path = program(KERNELS / source, kind)
    outcome = run(path, f"onemesh_cuda_{op}", struct, values, orders=orders, shift=shift)
    assert outcome.code == 0 and not any(outcome.status), (outcome.code, outcome.status, outcome.text[:4000])
    return outcome.runs


def draw(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_plain(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error of `got` is at most twice that of the plain computation in the same dtype, plus one rounding.

    `exact` is the same in float64. No value may be missing (NaN) or infinite where it isn't in `exact`.
    """
    assert got.dtype == plain.dtype and got.shape == exact.shape
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    one_rounding = torch.finfo(got.dtype).eps * exact.abs().max()
    assert error <= 2 * allowed + one_rounding, f"error {error:.3g}, plain {allowed:.3g}, rounding {one_rounding:.3g}"
