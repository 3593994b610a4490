"""Phase 6: pruning, distillation, low rank."""
