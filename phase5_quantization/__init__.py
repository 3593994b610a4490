"""Phase 5: int8, GPTQ and AWQ, float formats."""
