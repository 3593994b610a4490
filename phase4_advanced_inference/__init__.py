"""Phase 4: flash attention, paged attention, speculative decoding."""
