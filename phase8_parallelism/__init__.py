"""Phase 8: data, model, context and expert parallelism."""
