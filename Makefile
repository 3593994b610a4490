# Short names for the uv commands of this repository; each line is what you would type yourself.
PROJECT1 = phase1_foundation/project1_minimal_gpt

.PHONY: help setup test slow lint format typecheck train sample bench plot ci
help:       ## show this list
	@grep -E '^[a-z]+: ' Makefile | sed 's/:.*##/\t/'
setup:      ## install everything into .venv
	uv sync
test:       ## the tests, about two minutes
	uv run pytest
slow:       ## the tests that compute for minutes
	uv run pytest -m "slow and not gpu"
lint:       ## style and common mistakes
	uv run ruff check
	uv run ruff format --check
format:     ## put every file into the house format
	uv run ruff format
	uv run ruff check --fix
typecheck:  ## types
	uv run mypy
train:      ## train the character GPT, three minutes
	uv run python $(PROJECT1)/train.py
sample:     ## let it write
	uv run python $(PROJECT1)/generate.py
bench:      ## its speed beside Hugging Face's
	uv run python $(PROJECT1)/benchmark.py
plot:       ## draw what it has learned
	uv run python $(PROJECT1)/visualize.py
ci:         ## all that must hold before a change lands
	.ci/run
