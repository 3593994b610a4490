"""Phase 10: inference server, chat application, production."""
