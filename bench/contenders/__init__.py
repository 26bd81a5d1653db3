"""What competes in a case: our kernels and every peer, one file a peer."""
