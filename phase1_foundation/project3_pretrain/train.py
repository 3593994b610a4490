"""Pretrain, doing first what is missing: uv run python phase1_foundation/project3_pretrain/train.py

Unchanged on several GPUs: uv run torchrun --nproc_per_node 8 phase1_foundation/project3_pretrain/train.py
"""

import hashlib
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from common.device import seed_everything
from common.script import script
from phase1_foundation.project1_minimal_gpt.generate import generate
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project3_pretrain import preprocess
from phase1_foundation.project3_pretrain.config import Config, DataConfig, PreprocessConfig
from phase1_foundation.project3_pretrain.distributed import World, join_world
from phase1_foundation.project3_pretrain.loader import Loader
from phase1_foundation.project3_pretrain.model import Decoder
from phase1_foundation.project3_pretrain.shards import MANIFEST, TOKENIZER, Manifest, load_manifest
from phase1_foundation.project3_pretrain.trainer import Trainer


def run(config: Config, world: World | None = None) -> list[float]:
    """Train and return the loss of every step; main() calls it, and so do the tests, with a tiny config."""
    world = world or World()
    return make_trainer(config, world).train()


def make_trainer(config: Config, world: World) -> Trainer:
    """Return a trainer of a new model on the shards, or of the one to go on with."""
    data, train = config.data, config.train
    manifest = find_shards(data, world)
    tokenizer = load_tokenizer(data.shards / TOKENIZER)
    shape = replace(config.model, vocab_size=config.model.vocab_size or manifest.vocab_size)
    manifest.check_vocab_size(shape.vocab_size)
    loaders = {split: make_loader(config, split, world) for split in ("train", "validation")}
    seed_everything(train.seed)  # the same weights on every process
    model = Decoder(shape)
    start = [manifest.separator, *tokenizer.encode(data.prompt)]

    def sample(model: Any) -> str:
        ids = takewhile(lambda token: token != manifest.separator, generate(model, start, data.sample_tokens))
        return data.prompt + tokenizer.decode(ids)

    digest = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()[:12]

    return Trainer(
        model,
        loaders["train"],
        train,
        validation=loaders["validation"],
        sample=sample if data.sample_tokens else None,
        bytes_per_token=loaders["validation"].bytes_per_token,
        entries={"tokenizer": (data.shards / TOKENIZER).read_text(encoding="utf-8")},
        settings=config.to_dict() | {"sha256_of_shards": digest},
        world=world,
    )


def find_shards(data: DataConfig, world: World) -> Manifest:
    """Return the manifest of the shards; the first process makes them if there are none."""
    there = (data.shards / MANIFEST).is_file()
    if not there and world.rank == 0:
        preprocess.run(PreprocessConfig(data=[data.corpus or "stdlib"], out=data.shards))
    world.wait()
    manifest = load_manifest(data.shards)
    made_of = manifest.made_from.get("data")
    if data.corpus and made_of != [data.corpus]:
        raise ValueError(
            f"corpus ({data.corpus}) must be {made_of}, as in {data.shards}; or name other --shards"
        )
    train, validation = (manifest.total(split, "tokens") for split in ("train", "validation"))
    sizes = f"{train:,} tokens to train on, {validation:,} to validate, {manifest.vocab_size:,} different"
    world.print(f"shards      {data.shards}: {sizes}")
    return manifest


def make_loader(config: Config, split: str, world: World) -> Loader:
    """Return the batches of a split for this process; the first one verifies the files."""
    data = config.data
    return Loader(
        data.shards,
        split,
        config.model.block_size,
        data.batch_size,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
        packing=data.packing,
        mask_documents=data.mask_documents,
        verify=world.rank == 0,
    )


@script
def main() -> None:
    """Parse, print, train."""
    config = Config.from_cli()
    with join_world(config.train.device) as world:
        world.print(config.to_yaml(), end="")
        try:
            run(config, world)
        except torch.OutOfMemoryError as error:
            rows, more = config.train.micro_batch_size, "--checkpointing or, on several GPUs, --parallel fsdp"
            raise ValueError(
                f"micro_batch_size ({rows}) must fit into the GPU's memory; or use {more}"
            ) from error
        world.print("next: uv run python phase1_foundation/project3_pretrain/generate.py --interactive")


if __name__ == "__main__":
    main()
