"""Phase 3: KV cache, sampling, continuous batching."""
