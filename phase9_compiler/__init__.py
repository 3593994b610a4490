"""Phase 9: Triton kernels, graph compiler, tensor compiler."""
