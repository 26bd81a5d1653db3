#!/usr/bin/env python3
"""Plants faults into the CUDA kernels, one at a time, and expects the emulated tests to find each.

    python cpp/tests/simt/mutants.py                      # all of mutant_list.py
    python cpp/tests/simt/mutants.py --only tile          # mutants with "tile" in their names
    python cpp/tests/simt/mutants.py --sources cpp --build build/mutants

A test that passes on a broken kernel is worth nothing. With missing barriers, one cannot see by
reading whether a test would fail: if warps advance in step, nearly every missing barrier is hidden.
So each mutant replaces a piece of a kernel's text in a copy of its file. The C++ compiler (CXX, or
g++) compiles every source that includes the file, and the mutant's test runs until its first error.

A mutant that survives is a failure. So is a mutant whose text is not found exactly once: its kernel
has changed, and the mutant must be adapted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutant_list import MUTANTS, Mutant

FOLDER = Path(__file__).resolve().parent
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-pthread", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fno-strict-aliasing"),
    *("-DROSA_SIMT=1", "-DROSA_OPENMP=0", "-DROSA_X86=0", "-DROSA_TEST_REDUCED=1"),
]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
}
LIMIT_S = 600


class Outcome(NamedTuple):
    """Whether one mutant was killed, and how."""

    killed: bool
    what: str


class Failed(Exception):
    """The compiler failed. The text is its message."""


def run(command: Iterable[str | Path]) -> None:
    """Runs a command, and raises Failed if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(done.stderr[-4000:])


class Objects:
    """Compiled sources. They are kept between calls, and rebuilt if a dependency has changed.

    Args:
        sources: The folder that holds src, include and tests.
        folder: Where the objects go.
        sanitizer: A key of SANITIZERS.
    """

    def __init__(self, sources: Path, folder: Path, sanitizer: str) -> None:
        self.sources = sources
        self.folder = folder
        self.flags = [*FLAGS, *SANITIZERS[sanitizer]]
        self.compiler = os.environ.get("CXX", "g++")
        folder.mkdir(parents=True, exist_ok=True)

    def common(self) -> list[Path]:
        """The sources that every test is linked with: kernels, emulator, and CPU sources."""
        src, simt = self.sources / "src", self.sources / "tests" / "simt"
        return [
            *sorted((src / "cuda").rglob("*.cu")),
            *sorted(path for path in simt.glob("*.cpp") if not path.name.startswith("test_")),
            *sorted((src / "cpu").glob("*.cpp")),
            src / "cpu" / "isa" / "isa.cpp",
            src / "cpu" / "isa" / "portable.cpp",
        ]

    def test(self, name: str) -> Path:
        """The source of a test."""
        return self.sources / "tests" / "simt" / f"{name}.cpp"

    def object_of(self, source: Path) -> Path:
        """Where the object of a source lies."""
        return self.folder / ("_".join(source.relative_to(self.sources).parts) + ".o")

    def compile(self, source: Path, to: Path, first: Path | None = None) -> None:
        """Compiles `source` and lists its dependencies. Headers in `first` take precedence."""
        include = [first] if first else []
        include += [self.sources / name for name in ("include", "src", "tests")]
        run(
            [
                self.compiler,
                *self.flags,
                *(f"-I{path}" for path in include),
                *("-x", "c++", "-MMD", "-MF", to.with_suffix(".d"), "-c", source, "-o", to),
            ]
        )

    def dependencies(self, source: Path) -> list[Path]:
        """The files that the object of `source` was made from."""
        text = self.object_of(source).with_suffix(".d").read_text()
        names = text.partition(":")[2].replace("\\\n", " ").split()
        return [Path(name).resolve() for name in names]

    def stale(self, source: Path) -> bool:
        """Whether the object is missing or older than a dependency."""
        made = self.object_of(source)
        if not made.exists() or not made.with_suffix(".d").exists():
            return True
        age = made.stat().st_mtime
        return any(
            not path.exists() or path.stat().st_mtime > age for path in self.dependencies(source)
        )

    def update(self, tests: set[str]) -> None:
        """Compiles the stale sources that these tests need."""
        wanted = [*self.common(), *(self.test(name) for name in sorted(tests))]
        stale = [source for source in wanted if self.stale(source)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: self.compile(source, self.object_of(source)), stale))

    def link(self, mutant: Mutant, scratch: Path) -> Path:
        """The executable of the mutant's test, built with the mutated copy of its file."""
        original = self.sources / "src" / mutant.file
        copy = scratch / mutant.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(original.read_text().replace(mutant.original, mutant.replacement))
        objects = []
        changed = []
        for source in [*self.common(), self.test(mutant.test)]:
            if source == original:
                changed.append((copy, scratch / f"{source.name}.o"))
            elif original.resolve() in self.dependencies(source):
                changed.append((source, scratch / f"{source.name}.o"))
            else:
                objects.append(self.object_of(source))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: self.compile(pair[0], pair[1], scratch), changed))
        objects += [made for _, made in changed]
        executable = scratch / mutant.test
        run([self.compiler, *self.flags, *objects, "-o", executable])
        return executable


def first_complaint(executable: Path, pattern: str) -> Outcome:
    """Runs a test until its stderr matches `pattern`."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        test = subprocess.Popen([executable], stdout=subprocess.DEVNULL, stderr=said, text=True)
        try:
            while True:
                ended = test.poll() is not None
                said.seek(0)
                text = said.read()
                found = re.search(pattern, text, re.MULTILINE)
                if found:
                    line = text[text.rfind("\n", 0, found.start()) + 1 :].split("\n")[0]
                    return Outcome(True, f"{time.monotonic() - start:.1f} s: {line[:200]}")
                if ended and test.returncode == 0:
                    return Outcome(False, "SURVIVED")
                if ended:
                    return Outcome(False, f"failed, but without {pattern!r}: {text[:300]}")
                if time.monotonic() - start > LIMIT_S:
                    return Outcome(False, f"neither failed nor ended within {LIMIT_S} s")
                time.sleep(0.05)
        finally:
            test.kill()
            test.wait()


def plant(mutant: Mutant, objects: Objects) -> Outcome:
    """Builds a mutant, and runs its test."""
    original = (objects.sources / "src" / mutant.file).read_text()
    found = original.count(mutant.original)
    if found != 1:
        return Outcome(False, f"expected its text once in {mutant.file}, got it {found} times")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            executable = objects.link(mutant, Path(scratch))
        except Failed as failure:
            return Outcome(False, f"does not compile:\n{failure}")
        return first_complaint(executable, mutant.seen_as)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=Path, default=FOLDER.parents[1], help="the folder cpp")
    parser.add_argument("--build", type=Path, help="for objects (default: build/mutants)")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of mutants")
    parser.add_argument("--list", action="store_true", help="only print them")
    arguments = parser.parse_args()
    sources = arguments.sources.resolve()
    build = arguments.build or sources.parent / "build" / "mutants"

    mutants = [m for m in MUTANTS if any(part in m.name for part in arguments.only)]
    if not mutants:
        parser.error(f"no mutant has any of {arguments.only} in its name")
    if arguments.list:
        for mutant in mutants:
            print(f"{mutant.name} ({mutant.file}, {mutant.test}): {mutant.why}")
        return 0
    objects = {}
    for sanitizer in sorted({mutant.sanitizer for mutant in mutants}):
        tests = {mutant.test for mutant in mutants if mutant.sanitizer == sanitizer}
        objects[sanitizer] = Objects(sources, build.resolve() / (sanitizer or "plain"), sanitizer)
        try:
            objects[sanitizer].update(tests)
        except Failed as failure:
            print(failure, file=sys.stderr)
            return 1
    survivors = 0
    for mutant in mutants:
        outcome = plant(mutant, objects[mutant.sanitizer])
        survivors += not outcome.killed
        print(f"{'killed' if outcome.killed else 'FAILED'}  {mutant.name}: {outcome.what}")
        sys.stdout.flush()
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
