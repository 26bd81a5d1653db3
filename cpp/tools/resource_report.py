#!/usr/bin/env python3
"""Report every CUDA kernel's machine code: registers, spills, shared memory, instructions.

    python cpp/tools/resource_report.py build/release/cpp/src/cuda/librosa_cuda.a

It reads any object file, library, module or cubin. It exits with 1 if a kernel spills, or lacks the
instructions that make it fast (EXPECTED below). A tile kernel without tensor cores is still
correct, so no other test would notice. No GPU is needed, but cuobjdump and nvdisasm are. They may
lie beside nvcc, on PATH or in triton's package. The wheels nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm have them, too (5 MB, part of the `dev` extra). Without them the report exits
with 77, which ctest takes for "skipped".
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cuda_toolchain

SKIPPED = 77

# The instructions that are counted, each by a pattern of its name in the machine code.
INSTRUCTIONS = {
    "HMMA": r"HMMA\b",  # tensor cores, by mma.sync
    "HGMMA": r"HGMMA\b",  # tensor cores, by wgmma
    "LDSM": r"LDSM\b",  # ldmatrix
    "LDGSTS": r"LDGSTS\b",  # cp.async
    "UBLKCP": r"UBLKCP\b",  # cp.async.bulk
    "LDG.128": r"LDG\b.*\.128\b",
    "STG.128": r"STG\b.*\.128\b",
    "LDS.128": r"LDS\b.*\.128\b",
    "local": r"(LDL|STL)\b",
    "atomics": r"(ATOM|ATOMG|ATOMS|RED)\b.*\.F(16|32|64)",
}
FORBIDDEN = {
    "local": "spills to local memory",
    "atomics": "adds floats in an order that changes from run to run",
}


@dataclass(frozen=True)
class Expectation:
    """The instructions that every kernel whose name matches `kernel` must have."""

    kernel: str
    instructions: tuple[str, ...]
    architecture: str = ""  # the only one that they are built for, if there is just one


EXPECTED = (
    Expectation(r"pack_kernel\b", ("LDG.128", "STG.128")),
    Expectation(r"sddmm_gather_kernel\b", ("LDG.128",)),
    Expectation(r"sddmm_tile_kernel\b", ("HMMA", "LDSM", "LDGSTS")),
    Expectation(r"sddmm_wgmma_kernel\b", ("HGMMA", "UBLKCP"), "sm_90a"),
    Expectation(r"spmm_gather_kernel\b", ("LDG.128",)),
    Expectation(r"spmm_staged_kernel\b", ("LDG.128", "LDS.128")),
    Expectation(r"spmm_tile_kernel\b", ("HMMA", "LDSM", "LDGSTS")),
    # A baseline must load like the code it models, or the comparison is unfair.
    Expectation(r"baselines::sputnik_style_\w+_kernel<(float, 4|Bf16, 8|Half, 8),", ("LDG.128",)),
)


# Kernels that may spill, by (kernel, architecture), and the bytes that they may spill. This one is
# a baseline on a device on which nobody measures peers. nvcc saves two registers once. Every launch
# bound that avoids this halves the blocks.
TOLERATED_STACK = {("baselines::sputnik_style_spmm_kernel<float, 4, 8, 2>", "sm_86"): 8}


@dataclass
class Kernel:
    """One kernel's code for one architecture."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def violations(self) -> Iterator[str]:
        """What is wrong with the kernel, if anything."""
        tolerated = TOLERATED_STACK.get((self.name, self.architecture), 0)
        if self.stack > tolerated:
            yield f"{self.stack} bytes of stack"
        for instruction, harm in FORBIDDEN.items():
            if self.counts[instruction] and not (instruction == "local" and tolerated):
                yield f"{self.counts[instruction]} {instruction} instructions: it {harm}"
        for expected in EXPECTED:
            if re.match(expected.kernel, self.name):
                for instruction in expected.instructions:
                    if not self.counts[instruction]:
                        yield f"expected {instruction} instructions, got none"


class Disassembler:
    """cuobjdump, with nvdisasm on its PATH, which it calls."""

    def __init__(self) -> None:
        folders = [str(folder) for folder in self._folders()]
        path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
        self._environment = {**os.environ, "PATH": path}
        self.found = all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm"))

    @staticmethod
    def _folders() -> Iterator[Path]:
        nvcc = cuda_toolchain.find()
        if nvcc is not None:  # the same version as nvcc comes first
            yield nvcc.resolve().parent
        yield cuda_toolchain.TOOLKIT / "bin"
        yield cuda_toolchain.wheel_root() / "bin"
        triton = importlib.util.find_spec("triton")
        if triton is not None and triton.origin is not None:
            yield Path(triton.origin).parent / "backends" / "nvidia" / "bin"

    def lines(self, option: str, file: Path) -> list[str]:
        """The lines that `cuobjdump option file` prints."""
        done = subprocess.run(
            ["cuobjdump", option, str(file)],
            env=self._environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"resource_report: cuobjdump {option} {file} failed: {done.stderr.strip()}")
        return done.stdout.splitlines()


def read(disassembler: Disassembler, file: Path) -> list[Kernel]:
    """Every kernel in a file, by name and architecture."""
    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = name = ""
    for line in disassembler.lines("-res-usage", file):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            key = (name, architecture)
            kernels[key] = Kernel(name, architecture, registers, stack, shared)
    patterns = {name: re.compile(pattern) for name, pattern in INSTRUCTIONS.items()}
    counts: Counter[str] = Counter()
    for line in disassembler.lines("-sass", file):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\t\tFunction : (\S+)", line):
            # A template's kernel may be in several objects of a library. Only one copy counts.
            counts = kernels[match[1], architecture].counts = Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S+)", line):
            for instruction, pattern in patterns.items():
                counts[instruction] += bool(pattern.match(match[1]))
    demangle(list(kernels.values()))
    return sorted(kernels.values(), key=lambda k: (k.name, k.architecture))


def demangle(kernels: list[Kernel]) -> None:
    """Give kernels their C++ names, without namespaces and arguments, where c++filt is found."""
    try:
        names = "\n".join(kernel.name for kernel in kernels)
        done = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    for kernel, name in zip(kernels, done.stdout.splitlines(), strict=True):
        kernel.name = short_name(name)


def short_name(demangled: str) -> str:
    """ "void rosa::cuda::f<rosa::cuda::Bf16, (int)8>(int)" -> "f<Bf16, 8>"."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|rosa::(cuda::)?", "", demangled)
    name = re.sub(r"\((?:bool|int|unsigned int|long)\)(?=[\d-])", "", name)
    name = name.removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def missing(kernels: list[Kernel]) -> Iterator[str]:
    """Expectations that match no kernel, so that no renamed kernel escapes the check."""
    architectures = {kernel.architecture for kernel in kernels}
    for expected in EXPECTED:
        if expected.architecture and expected.architecture not in architectures:
            continue
        if not any(re.match(expected.kernel, kernel.name) for kernel in kernels):
            yield f"expected a kernel that matches {expected.kernel}, got none"


def table(kernels: list[Kernel]) -> Iterator[str]:
    """The lines of the report, in aligned columns. A dot stands for zero."""
    head = ["kernel", "arch", "regs", "stack", "shared", *INSTRUCTIONS]
    rows = [
        [
            kernel.name,
            kernel.architecture,
            *(str(n or ".") for n in (kernel.registers, kernel.stack, kernel.shared)),
            *(str(kernel.counts[instruction] or ".") for instruction in INSTRUCTIONS),
        ]
        for kernel in kernels
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def main() -> int:
    """Print the report and all violations. Returns 1 if there is a violation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="objects, libraries, modules or cubins")
    arguments = parser.parse_args()
    disassembler = Disassembler()
    if not disassembler.found:
        print("resource_report: cuobjdump and nvdisasm were not found (the dev extra has them)")
        return SKIPPED
    kernels = [kernel for file in arguments.files for kernel in read(disassembler, file)]
    for line in table(kernels):
        print(line)
    wrong = [
        f"{kernel.name} ({kernel.architecture}): {violation}"
        for kernel in kernels
        for violation in kernel.violations()
    ]
    wrong += missing(kernels)
    for line in wrong:
        print(f"resource_report: {line}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(wrong)} violations")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
