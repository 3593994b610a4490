"""Phase 2: instruction tuning, LoRA, alignment."""
