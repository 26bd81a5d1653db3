"""The kernels: importing this package registers every one of them. None touches autograd."""

from rosa_kernels.backends import dense, native, native_cuda, reference, reference_plan

__all__ = ["dense", "native", "native_cuda", "reference", "reference_plan"]
