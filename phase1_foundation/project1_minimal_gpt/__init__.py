"""Project 1: a character GPT whose every line can be understood."""
