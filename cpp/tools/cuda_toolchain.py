#!/usr/bin/env python3
"""Find nvcc and print its path. Install it from PyPI if that is allowed and there is a GPU.

    python cpp/tools/cuda_toolchain.py             # prints the path, or nothing if there is no nvcc
    python cpp/tools/cuda_toolchain.py --install   # may install it into this Python's environment

Most users of a GPU have its driver and torch, but no compiler. NVIDIA's wheels contain the whole
compiler: 105 MB to download, without root, removed with the environment. Nothing is downloaded
without a GPU, for a torch without CUDA, or outside a virtual environment. If the installation
fails, a message says so. The rest of the project then builds without CUDA kernels.
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
# wgmma, and C++17 with current host compilers, need 12.0. The version that was run is 13.0.
OLDEST = (12, 0)
TOOLKIT = Path("/usr/local/cuda")
DRIVER = Path("/proc/driver/nvidia")
# CUDA's headers, compiler stages and static runtime. Each is a separate package since CUDA 13.
PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-nvvm",
)


def wheel_root() -> Path:
    """The folder of NVIDIA's wheels for CUDA 13 in this Python's environment."""
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"


def candidates() -> Iterator[Path]:
    """Paths at which nvcc may be. The user's choice comes first."""
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
    """The (major, minor) version of a compiler, or None if it does not start."""
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
            say(f"{nvcc} is version {version[0]}.{version[1]}, older than {needed}: not used")
    return None


def has_gpu() -> bool:
    """Whether an NVIDIA driver with at least one device is loaded."""
    listed = output("nvidia-smi", "-L") or ""
    return "GPU" in listed or any(DRIVER.glob("gpus/*"))


def torch_cuda() -> str | None:
    """The CUDA version of this Python's torch: "" for a CPU build, None if it is unknown.

    It is read from torch's version file. Importing torch takes seconds, and this runs at every
    configure.
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
    """The requirements for pip: the pins of constraints.txt if they have torch's CUDA version.

    torch brings a CUDA runtime of its own version, which must stay. A compiler of another minor
    version would replace that package.
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
    """The reason why nothing may be downloaded here, or None. "" is a reason without a message."""
    if not has_gpu():
        return ""  # the usual case, which needs no message
    cuda = torch_cuda()
    if cuda == "":
        return "nvcc is not installed, because torch here is a build without CUDA"
    if cuda is not None and not cuda.startswith("13."):
        return f"torch is for CUDA {cuda}, and PyPI has no nvcc for it: install the CUDA toolkit"
    if sys.prefix == sys.base_prefix:
        return "nvcc was not found, and it is installed only into a virtual environment"
    return None


def install() -> Path | None:
    """Install nvcc from PyPI into this environment. If that fails, say so and return None."""
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
    """Make the links that CMake and the linker look for. Wheels cannot contain links."""
    root = wheel_root()
    links = {root / "lib64": "lib"}
    for library in sorted((root / "lib").glob("libcudart.so.*")):
        links[root / "lib" / "libcudart.so"] = library.name
    for link, target in links.items():
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)


def output(*command: str) -> str | None:
    """The stdout of a command, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def say(text: str) -> None:
    """Print a message on stderr, because stdout is only for the path."""
    print(f"cuda_toolchain: {text}", file=sys.stderr)


def main() -> None:
    """Print nvcc's path. With --install, install it first if it is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install nvcc, if there is a GPU")
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
