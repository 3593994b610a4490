"""Project 2: byte-level BPE, Unigram and WordPiece in plain Python, compatible with what the field uses."""
