"""Phase 7: attention variants, mixture of experts, state space."""
