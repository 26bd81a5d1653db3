"""The kernels. Importing this package registers all of them. None of them touches autograd."""

from rosa_kernels.backends import dense, native, native_cuda, reference, reference_plan

__all__ = ["dense", "native", "native_cuda", "reference", "reference_plan"]
