"""cpp/tools: the search for nvcc, its installation, and the resource report."""

from __future__ import annotations

import sys
from pathlib import Path

import cuda_toolchain
import pytest
import resource_report
from resource_report import Kernel

ROOT = Path(__file__).resolve().parents[2]


def script(path: Path, text: str) -> Path:
    """Writes a shell script that stands in for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulates a machine without GPU and CUDA. Returns the only folder on its PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(cuda_toolchain, "wheel_root", lambda: tmp_path / "cu13")
    monkeypatch.setattr(cuda_toolchain, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setattr(cuda_toolchain, "DRIVER", tmp_path / "driver")
    return tools


def nvcc(path: Path, version: str) -> Path:
    return script(path, f"echo 'Cuda compilation tools, release {version}, V{version}.88'")


def test_nvcc_is_searched_in_order_and_checked(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda_toolchain.find() is None
    wheel = nvcc(tmp_path / "cu13/bin/nvcc", "13.0")
    (tmp_path / "cu13/lib").mkdir()
    (tmp_path / "cu13/lib/libcudart.so.13").touch()
    assert cuda_toolchain.find() == wheel
    # CMake and the linker ask for this file.
    assert (tmp_path / "cu13/lib64/libcudart.so").resolve().name == "libcudart.so.13"
    toolkit = nvcc(tmp_path / "toolkit/bin/nvcc", "13.1")
    assert cuda_toolchain.find() == toolkit
    home = nvcc(tmp_path / "home/bin/nvcc", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_toolchain.find() == home
    script(bare / "nvcc", "exit 1")
    assert cuda_toolchain.find() == home
    nvcc(bare / "nvcc", "11.8")
    assert cuda_toolchain.find() == home
    assert "11.8, older than 12.0: not used" in capsys.readouterr().err
    monkeypatch.setenv("CUDACXX", str(wheel))
    assert cuda_toolchain.find() == wheel


def test_nvcc_is_installed_only_if_useful(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise AssertionError("install was called")

    monkeypatch.setattr(cuda_toolchain, "install", refuse)
    monkeypatch.setattr(sys, "argv", ["cuda_toolchain", "--install"])
    cuda_toolchain.main()
    assert capsys.readouterr() == ("", "")  # without a GPU nothing is printed
    script(bare / "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'")
    monkeypatch.setattr(cuda_toolchain, "torch_cuda", lambda: "")
    cuda_toolchain.main()
    assert "a build without CUDA" in capsys.readouterr().err
    monkeypatch.setattr(cuda_toolchain, "torch_cuda", lambda: "12.6")
    cuda_toolchain.main()
    assert "CUDA 12.6" in capsys.readouterr().err


def test_a_failed_installation_leaves_a_cpu_build(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(bare / "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'")
    script(bare / "python", "echo no index >&2; exit 1")
    monkeypatch.setattr(cuda_toolchain, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(sys, "executable", str(bare / "python"))
    monkeypatch.setattr(sys, "prefix", "/some/environment")
    monkeypatch.setattr(sys, "argv", ["cuda_toolchain", "--install"])
    cuda_toolchain.main()
    out, err = capsys.readouterr()
    assert out == ""
    assert "nvcc could not be installed" in err
    assert "building without CUDA kernels" in err


def test_the_compilers_version_matches_torchs_cuda() -> None:
    pinned = cuda_toolchain.requirements("13.0")
    assert pinned == cuda_toolchain.requirements(None)
    assert {r.split("==")[0] for r in pinned} == set(cuda_toolchain.PACKAGES)
    assert all(r.split("==")[1].startswith("13.0.") for r in pinned)
    other = cuda_toolchain.requirements("13.2")
    assert "nvidia-cuda-nvcc==13.2.*" in other
    assert "nvidia-cuda-cccl==13.*" in other


def test_torch_version_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    assert cuda_toolchain.torch_cuda() == (torch.version.cuda or "")
    monkeypatch.setattr(cuda_toolchain.importlib.util, "find_spec", lambda name: None)
    assert cuda_toolchain.torch_cuda() is None


# Output of cuobjdump, for one architecture. The test makes two of them, one with spills.
RESOURCES = """
Fatbin elf code:
================
arch = {arch}
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4rosa4cuda19sddmm_gather_kernelIfEEvi:
  REG:96 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = {arch}
	code for {arch}
		Function : _ZN4rosa4cuda19sddmm_gather_kernelIfEEvi
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   LDG.E R16, [R28.64] ;         /* 0x000000041c107981 */
                                                                 /* 0x000ea8000c1e1900 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R16, [R16.64] ;  /* 0x0000000410107981 */
        /*0020*/              {extra} [R1], R2 ;                 /* 0x0000000410107981 */
"""


def test_the_report_finds_spills_and_lost_instructions(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["resource_report", "library.a"])
    assert resource_report.main() == resource_report.SKIPPED
    capsys.readouterr()

    for option, text in (("-res-usage", RESOURCES), ("-sass", SASS)):
        good = text.format(arch="sm_80", stack=0, extra="STG.E")
        bad = text.format(arch="sm_90", stack=16, extra="@P1 STL")
        (bare / option).write_text(good + bad)
    script(bare / "cuobjdump", f'exec /bin/cat {bare}/"$1"')
    script(bare / "nvdisasm", "")
    assert resource_report.main() == 1
    out, err = capsys.readouterr()
    assert "2 kernels" in out
    assert "(sm_90): 16 bytes of stack" in err
    assert "(sm_90): 1 local instructions: it spills" in err
    assert "(sm_80)" not in err
    # A missing kernel is reported, unless the build lacks the kernel's architecture.
    assert "sddmm_tile_kernel\\b, got none" in err
    assert "sddmm_wgmma_kernel" not in err


def test_kernel_names_are_shortened() -> None:
    demangled = "void rosa::cuda::(anonymous namespace)::f<rosa::cuda::Bf16, (int)8, (bool)1>(int)"
    assert resource_report.short_name(demangled) == "f<Bf16, 8, 1>"
    tile = Kernel("sddmm_tile_kernel<Bf16>", "sm_80")
    assert list(tile.violations()) == [
        f"expected {name} instructions, got none" for name in ("HMMA", "LDSM", "LDGSTS")
    ]
