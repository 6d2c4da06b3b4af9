"""Compiles every kernel launch at its real shapes ahead of time, for GPUs that need not be there.

    python -m bench.kernels.compile [--arch 80 90 100] [--kernel NAME ...] [--json FILE]

Each op is called as in training, on uninitialised CPU tensors of the real shapes. Triton specialises the launch
as always (types, divisibility by 16, equality with 1), compiles it, and is stopped before it would run: what is
measured here is what would run. Registers and spills are ptxas's own count. Widths of global loads and stores (how
many in the code x bytes per thread; TMA not counted) and tensor-core instructions (mma) are read from the PTX.
Exits with 1 if a launch does not compile, spills, or asks for more than the GPU has. Triton's cache is used: what
has changed is compiled again; all is with TRITON_ALWAYS_COMPILE=1.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.cache import get_cache_manager, triton_key
from triton.runtime.jit import JITFunction

# Limits that Triton checks only when it loads or launches a kernel. Shared memory: of one program, CUDA guide.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
WARPS, TENSOR_MEMORY, GRID_YZ = 32, 512, 65535

# In PTX: ld.global.v4.b32 {..}, [..];  st.global.b16 ..;  cp.async.cg.shared.global [..], [..], 16 (a pipelined loop)
ACCESS = r"\b{}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
COPY = r"\bcp\.async\.c[ag]\..*?\], *\[.*?\], *(\w+)"
MMA = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
LOG = "ptxas.log"  # beside the kernel in Triton's cache, whose key has ptxas's version and options
WRITE = r"\b(?:st\.global|red\.|atom\.|cp\.(?:reduce\.)?async\.bulk.*global\.shared)"


@dataclasses.dataclass
class Launch:
    """A launch as compiled for one architecture, and the cases (op, shape, dtype) that led to it."""

    kernel: str
    module: str
    function: str
    arch: int
    registers: int = 0
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    shared: int = 0  # bytes
    warps: int = 0
    loads: dict[int, int] = dataclasses.field(default_factory=dict)  # width in bytes -> how many
    stores: dict[int, int] = dataclasses.field(default_factory=dict)
    mma: int = 0
    problem: str = ""
    cases: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)


class NoGPU:
    """All that Triton asks of a driver before a launch."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def assemble(ptx: str, metadata, arch: int) -> str:
    """What ptxas says. The backend's own step from PTX to machine code once more: options differ between versions."""
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        make_backend(metadata.target).make_cubin(ptx, {}, metadata, arch)
    return log.getvalue()


def measure(launch: Launch, kernel: CompiledKernel) -> None:
    ptx, metadata = kernel.asm["ptx"], kernel.metadata
    cache = get_cache_manager(kernel.hash)
    kept = None if knobs.compilation.always_compile else cache.get_file(LOG)
    said = Path(kept).read_text() if kept else assemble(ptx, metadata, launch.arch)
    launch.registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    launch.spill_stores, launch.spill_loads = (sum(map(int, column)) for column in zip(*spills, strict=True))
    if not kept:
        cache.put(said, LOG, binary=False)
    launch.shared, launch.warps = metadata.shared, metadata.num_warps
    loads, stores = (
        [int(n or 1) * int(bits) // 8 for n, bits in re.findall(ACCESS.format(verb), ptx)] for verb in ("ld", "st")
    )
    loads += [int(size, 0) for size in re.findall(COPY, ptx)]
    launch.loads, launch.stores = (dict(sorted(Counter(widths).items())) for widths in (loads, stores))
    launch.mma = len(re.findall(MMA, ptx))
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    spilled = launch.spill_stores + launch.spill_loads
    problems = {
        f"spills: {launch.spill_stores} bytes stored, {launch.spill_loads} loaded": spilled,
        f"{launch.shared} bytes of shared memory": launch.shared > SHARED_KIB[launch.arch] * 1024,
        f"{tensor_memory} columns of tensor memory": tensor_memory > TENSOR_MEMORY,
        f"{launch.warps} warps": launch.warps > WARPS,
        "writes nothing": not re.search(WRITE, ptx),  # what Triton 3.9 makes of a dot that is too large
    }
    launch.problem = "; ".join(text for text, found in problems.items() if found)


def explain(error: Exception, said: str = "") -> str:
    """The place and the reason, in a line. `said`: the compiler's own output, which has them if `error` has not."""
    while isinstance(error.__cause__, type(error)):  # in a function that the kernel calls
        error = error.__cause__
    text = str(error).split("Repro command:")[0]
    if "PassManager" in text:
        text += "\n" + "\n".join(line for line in said.splitlines() if "error:" in line)
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])}"[:600]


def compile_cases(cases: list, arch: int) -> list[Launch]:
    """Replaces Triton's driver and launcher: for a process of its own."""
    launches: dict[tuple, Launch] = {}
    run, case, count = JITFunction.run, None, 0

    def note(function: JITFunction | None, identity: str) -> Launch:
        module, name = (function.fn.__module__, function.fn.__name__) if function else ("", "")
        launch = launches.setdefault((module, name, identity), Launch(case.kernel, module, name, arch))
        label = (case.op, case.shape, str(case.dtype).removeprefix("torch."))
        if label not in launch.cases:
            launch.cases.append(label)
        return launch

    def compile_only(function: JITFunction, *args, grid, warmup, **kwargs) -> None:
        nonlocal count
        count += 1
        log_end = os.lseek(2, 0, os.SEEK_END)
        try:
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            launch = note(function, kernel.hash)
            if not launch.warps:
                measure(launch, kernel)
            if callable(grid):
                grid = grid(dict(zip(function.arg_names, args, strict=False)) | kwargs)
            if any(size > GRID_YZ for size in grid[1:]):
                launch.problem = launch.problem or f"grid {grid}: only its first axis may exceed {GRID_YZ}"
        except Exception as error:  # goes no further: the op may have more to launch
            problem = explain(error, os.pread(2, 1 << 20, log_end).decode(errors="replace"))
            note(function, problem).problem = problem

    triton.runtime.driver.set_active(NoGPU(arch))
    JITFunction.run = compile_only
    for case in cases:
        before, problem = count, "launches no kernel"
        try:
            case.ours(*case.empty("cpu"))
        except Exception as error:
            before, problem = count, explain(error)
        if count == before:
            note(None, problem).problem = problem
    return list(launches.values())


def compile_in_processes(groups: list[tuple[list, int]], processes: int) -> Iterator[Launch]:
    """A process for the cases of one kernel and architecture: the compiler may abort, and takes no other along."""

    def work(cases: list, arch: int, sender, log) -> None:
        os.dup2(log.fileno(), 1)  # what the compiler writes about an error fills pages
        os.dup2(log.fileno(), 2)
        sender.send(compile_cases(cases, arch))

    # what each process would do for its first launch
    importlib.import_module("triton.experimental.gluon")
    triton_key()  # a hash of all of Triton, remembered
    fork = multiprocessing.get_context("fork")
    waiting, running = groups[::-1], {}
    while waiting or running:
        while waiting and len(running) < processes:
            cases, arch = waiting.pop()
            receiver, sender = fork.Pipe(duplex=False)
            with tempfile.TemporaryFile() as log:
                child = fork.Process(target=work, args=(cases, arch, sender, log))
                child.start()
            sender.close()
            running[receiver] = child, cases, arch
        for receiver in multiprocessing.connection.wait(list(running)):
            child, cases, arch = running.pop(receiver)
            try:
                yield from receiver.recv()
                child.join()
            except EOFError:
                child.join()
                yield Launch(cases[0].kernel, "", "", arch, problem=f"the compiler died with {child.exitcode}")


HEAD = "kernel", "function", "sm", "registers", "spilled", "shared", "warps", "loads", "stores", "mma", "cases"


def row(x: Launch) -> tuple[str, ...]:
    loads, stores = (" ".join(f"{n}x{size}" for size, n in widths.items()) or "-" for widths in (x.loads, x.stores))
    numbers = (x.arch, x.registers, f"{x.spill_stores}/{x.spill_loads}", x.shared, x.warps, loads, stores, x.mma)
    ops, shapes, dtypes = (", ".join(dict.fromkeys(column)) for column in zip(*x.cases, strict=True))
    return (x.kernel, x.function, *map(str, numbers), f"{ops}: {dtypes}: {shapes}")


def main() -> int:
    # the interpreter runs kernels instead of compiling them; triton was imported with it, so begin again without
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there changes nothing, and stays free
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=SHARED_KIB, metavar="SM")
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--cases", metavar="FILE.py", help="its list CASES in place of those in bench/kernels")
    parser.add_argument("--json", metavar="FILE", help="also write the table there")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if arguments.cases:
        cases = runpy.run_path(arguments.cases)["CASES"]
    else:
        import torch._dynamo  # noqa: F401 - an op's first call imports it: here once, not in each process

        from bench.kernels.case import all_cases

        cases = all_cases()
    cases = [case for case in cases if case.real]
    known = sorted({case.kernel for case in cases})
    names = arguments.kernel or known
    if unknown := set(names) - set(known):
        parser.error(f"no case of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    groups = [([case for case in cases if case.kernel == name], arch) for name in names for arch in arguments.arch]
    launches = list(compile_in_processes(groups, arguments.processes))
    launches.sort(key=lambda x: (x.kernel, x.function, x.cases, x.arch))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"triton": triton.__version__, "launches": [dataclasses.asdict(x) for x in launches]}, file)
    rows = [HEAD, *(row(x) for x in launches if x.warps)]
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, columns, strict=True)).rstrip())
    problems = [x for x in launches if x.problem]
    print(f"triton {triton.__version__}: {len(rows) - 1} compilations, {len(problems)} problems")
    for x in problems:
        print(f"  {x.kernel} {x.function} sm_{x.arch} ({', '.join(map(' '.join, x.cases))}): {x.problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
