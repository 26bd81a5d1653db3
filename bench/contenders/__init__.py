"""The contenders of a case: our kernels and the peers, one file per peer."""
