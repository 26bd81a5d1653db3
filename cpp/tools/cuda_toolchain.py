#!/usr/bin/env python3
"""Find nvcc; on a machine with an NVIDIA GPU and none, install it from PyPI. Prints its path.

    python cpp/tools/cuda_toolchain.py             # prints the path, or nothing where there is none
    python cpp/tools/cuda_toolchain.py --install   # may install it into this Python's environment

Most users of a GPU have its driver and torch, but no compiler. The wheels hold all of it: 105 MB to
download, no root, removed with the environment. Nothing is ever downloaded without a GPU, for a
torch without CUDA, or outside a virtual environment; a failure is said and costs the CUDA kernels
alone, since the rest of the project builds without them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# wgmma and the compilation of C++17 with current host compilers begin there; 13.0 is what was run.
OLDEST = (12, 0)
TOOLKIT = Path("/usr/local/cuda")
DRIVER = Path("/proc/driver/nvidia")
# CUDA's headers, compiler stages and static runtime, each a package of its own since CUDA 13.
PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-nvvm",
)


def wheel_root() -> Path:
    """Where NVIDIA's wheels for CUDA 13 put their files in this Python's environment."""
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"


def candidates() -> Iterator[Path]:
    """Where nvcc may be, what the user chose first."""
    if chosen := os.environ.get("CUDACXX"):
        yield Path(shutil.which(chosen) or chosen)
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            yield Path(folder) / "bin" / "nvcc"
    yield TOOLKIT / "bin" / "nvcc"
    yield wheel_root() / "bin" / "nvcc"


def version_of(nvcc: Path) -> tuple[int, int] | None:
    """(major, minor) of a compiler that starts, or None."""
    match = re.search(r"release (\d+)\.(\d+)", output(str(nvcc), "--version") or "")
    return (int(match[1]), int(match[2])) if match else None


def find() -> Path | None:
    """The first nvcc that starts and is not too old, or None."""
    for nvcc in candidates():
        version = version_of(nvcc)
        if version is not None and version >= OLDEST:
            if nvcc.parent.parent == wheel_root():
                link_libraries()
            return nvcc
        if version is not None:
            needed = ".".join(map(str, OLDEST))
            say(f"{nvcc} is version {version[0]}.{version[1]}, older than {needed}: passed over")
    return None


def has_gpu() -> bool:
    """Whether an NVIDIA driver with at least one device is loaded."""
    listed = output("nvidia-smi", "-L") or ""
    return "GPU" in listed or any(DRIVER.glob("gpus/*"))


def torch_cuda() -> str | None:
    """The CUDA version this Python's torch was built with; "" for a CPU build, None if unknown.

    Read from its version file: importing torch takes seconds, and this runs at every configure.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*= *(?:'([\d.]+)'|None)", text, re.MULTILINE)
    return None if match is None else match[1] or ""


def requirements(torch_version: str | None) -> list[str]:
    """What pip is asked for: the pins of constraints.txt if they are of torch's CUDA version.

    torch brings a CUDA runtime of its own version, which must stay; another minor version of the
    compiler beside it would replace that package.
    """
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==", 1) for line in lines if "==" in line)
    pinned = minor(pins["nvidia-cuda-nvcc"])
    wanted = minor(torch_version) if torch_version else pinned
    if wanted == pinned:
        return [f"{name}=={pins[name]}" for name in PACKAGES]
    # CCCL's own minor versions do not follow CUDA's.
    major = wanted.split(".")[0]
    return [
        f"{name}=={major}.*" if name == "nvidia-cuda-cccl" else f"{name}=={wanted}.*"
        for name in PACKAGES
    ]


def minor(version: str) -> str:
    """ "13.0.88" -> "13.0"."""
    return ".".join(version.split(".")[:2])


def reason_not_to_install() -> str | None:
    """Why nothing may be downloaded here, or None."""
    if not has_gpu():
        return ""  # the usual case, and nothing to tell
    cuda = torch_cuda()
    if cuda == "":
        return "nvcc is not installed, since torch here is a build without CUDA"
    if cuda is not None and not cuda.startswith("13."):
        return f"torch here is for CUDA {cuda}, whose nvcc PyPI lacks: install the CUDA toolkit"
    if sys.prefix == sys.base_prefix:
        return "nvcc was not found, and is only installed into a virtual environment"
    return None


def install() -> Path | None:
    """nvcc from PyPI, in this environment; None, with a sentence on stderr, where it fails."""
    wanted = requirements(torch_cuda())
    say(f"no nvcc was found: installing {', '.join(wanted)}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([*command, *wanted], check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"nvcc could not be installed ({error})")
        return None
    return find()


def link_libraries() -> None:
    """The names under which CMake and the linker look, which wheels cannot hold."""
    root = wheel_root()
    links = {root / "lib64": "lib"}
    for library in sorted((root / "lib").glob("libcudart.so.*")):
        links[root / "lib" / "libcudart.so"] = library.name
    for link, target in links.items():
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def output(*command: str) -> str | None:
    """What a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def say(text: str) -> None:
    """For people: stdout is for the path alone."""
    print(f"cuda_toolchain: {text}", file=sys.stderr)


def main() -> None:
    """Print nvcc's path, after installing it if that is asked for and needed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", help="from PyPI, where there is a GPU")
    arguments = parser.parse_args()
    nvcc = find()
    if nvcc is None and arguments.install:
        reason = reason_not_to_install()
        nvcc = install() if reason is None else None
        if reason:
            say(reason)
        if nvcc is None and reason != "":
            say("building without CUDA kernels")
    if nvcc is not None:
        print(nvcc)


if __name__ == "__main__":
    main()
