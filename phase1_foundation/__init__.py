"""Phase 1: a character GPT, a tokenizer, pretraining."""
