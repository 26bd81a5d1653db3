"""The kernels: importing this package registers every one of them. None touches autograd."""

from rosa_kernels.backends import native, reference

__all__ = ["native", "reference"]
