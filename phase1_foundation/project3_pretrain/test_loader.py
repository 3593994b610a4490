"""Checks of the loader. --interactive then shows the rows of a step."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project3_pretrain.config import SHARDS
from phase1_foundation.project3_pretrain.loader import Loader, Prefetcher
from phase1_foundation.project3_pretrain.loss import NO_LOSS, Batch
from phase1_foundation.project3_pretrain.shards import MANIFEST, TOKENIZER
from phase1_foundation.project3_pretrain.test_shards import SEPARATOR, make_shards

T = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of documents in which each token says of which document it is; some are long."""
    rng, names = np.random.default_rng(0), iter(range(SEPARATOR))
    shards = [[[next(names)] * int(n) for n in rng.integers(1, 20, size=9)] for _ in range(3)]
    return make_shards(tmp_path_factory.mktemp("shards"), shards, [[7] * 3, [8] * 12])


def targets_of_epoch(loader: Loader, epoch: int = 0) -> list[int]:
    """The targets of all steps of an epoch, padding left out; batches must divide epochs."""
    first = epoch * loader.batches
    batches = [loader.batch(step).targets for step in range(first, first + loader.batches)]
    return sorted(int(target) for batch in batches for target in batch.flatten() if target != NO_LOSS)


def tokens_in_shards(folder: Path, split: str) -> list[int]:
    files = sorted(folder.glob(f"{split}_*.bin"))
    return sorted(token for file in files for token in np.fromfile(file, np.uint16)[1:].tolist())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_predicts_each_token_once(folder: Path, packing: str) -> None:
    loader = Loader(folder, "train", T, 1, packing=packing)
    assert targets_of_epoch(loader) == targets_of_epoch(loader, 3) == tokens_in_shards(folder, "train")
    assert loader.targets == len(tokens_in_shards(folder, "train"))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_target_is_the_token_that_follows(folder: Path, packing: str) -> None:
    loader = Loader(folder, "train", T, 5, packing=packing, mask_documents=True)
    for step in range(loader.batches):
        batch = loader.batch(step)
        assert batch.documents is not None
        follows = (batch.documents[:, 1:] == batch.documents[:, :-1]) & (batch.targets[:, :-1] != NO_LOSS)
        assert follows.any()
        assert (batch.targets[:, :-1] == batch.tokens[:, 1:])[follows].all()
        last = batch.targets[:, :-1][~follows & (batch.targets[:, :-1] != NO_LOSS)]
        assert (last == SEPARATOR).all()  # the end of each document is predicted, whatever stands behind it


def test_a_token_knows_its_document(folder: Path) -> None:
    loader = Loader(folder, "train", T, 4, packing="best_fit")
    for step in range(loader.batches):
        batch = loader.batch(step)
        assert batch.documents is not None
        assert batch.documents.dtype == torch.int32
        for tokens, documents in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
            said = {(d, t) for d, t in zip(documents, tokens, strict=True) if t != SEPARATOR}
            assert len({d for d, _ in said}) == len({t for _, t in said}) == len(said)


def test_without_masks_a_batch_has_no_document_numbers(folder: Path) -> None:
    assert Loader(folder, "train", T, 4).batch(0).documents is None
    assert Loader(folder, "train", T, 4, mask_documents=True).batch(0).documents is not None


def test_a_batch_is_a_function_of_seed_and_step(folder: Path) -> None:
    one, same, other = (Loader(folder, "train", T, 4, seed=seed) for seed in (1, 1, 2))
    for step in (0, 3, 1000):
        assert one.batch(step).tokens.tolist() == same.batch(step).tokens.tolist()
        assert one.batch(step).tokens.tolist() != other.batch(step).tokens.tolist()
    assert one.batch(0).tokens.tolist() != one.batch(one.batches).tokens.tolist()  # each epoch has its order


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_any_number_of_processes_sees_the_same_batch(folder: Path, ranks: int) -> None:
    whole = Loader(folder, "train", T, 6).batch(5)
    parts = [Loader(folder, "train", T, 6, rank=rank, world_size=ranks).batch(5) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_a_batch_may_reach_into_the_next_epoch(folder: Path) -> None:
    single, wide = Loader(folder, "train", T, 1), Loader(folder, "train", T, 7)
    rows = [single.batch(i).tokens[0] for i in range(3 * single.rows)]
    assert single.rows % 7
    for step in range(len(rows) // 7):
        assert torch.equal(wide.batch(step).tokens, torch.stack(rows[7 * step : 7 * step + 7]))


def test_the_validation_split_comes_once_and_then_there_is_nothing_to_predict(folder: Path) -> None:
    loader = Loader(folder, "validation", T, 2)
    assert targets_of_epoch(loader) == tokens_in_shards(folder, "validation")
    assert (loader.batch(loader.batches).targets == NO_LOSS).all()
    assert loader.bytes_per_token == 15 / 17


def test_what_goes_to_a_model_has_its_shapes_and_types(folder: Path) -> None:
    batch = Loader(folder, "train", T, 3).batch(0)
    assert batch.tokens.shape == batch.targets.shape == (3, T)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


def test_errors_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"packing": "worst_fit"}, r"^packing \(worst_fit\) must be one of concat, best_fit$"),
        ({"batch_size": 0}, r"^block_size \(8\) and batch_size \(0\) must be at least 1$"),
        ({"batch_size": 4, "world_size": 3}, r"^batch_size \(4\) must be divisible by the processes \(3\)$"),
        ({"split": "test"}, r"^split \(test\) must be one of train, validation$"),
    ):
        arguments: dict[str, object] = {"split": "train", "block_size": T, "batch_size": 4} | settings
        with pytest.raises(ValueError, match=message):
            Loader(folder, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^split \(train\) must hold documents$"):
        Loader(make_shards(tmp_path, [[]]), "train", T, 4)


def test_ids_beyond_the_vocabulary_are_an_error_even_if_the_shard_was_not_verified(tmp_path: Path) -> None:
    folder = make_shards(tmp_path, [[[1, 2, 3, 4]]])
    path = folder / "train_000.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[2] = 60_000
    tokens.tofile(path)
    with pytest.raises(ValueError, match="must have the SHA-256"):
        Loader(folder, "train", T, 1)
    with pytest.raises(ValueError, match=r"^shard \(.*\) must hold ids below 300, not 60000$"):
        Loader(folder, "train", T, 1, verify=False).batch(0)


# Preparing ahead


class Slow(Loader):
    """A loader of numbers that tells when it is asked, and fails at step 5."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.begun = threading.Event()

    def batch(self, step: int) -> Batch:
        self.asked.append(step)
        if step == 5:
            raise ValueError("step (5) must not be")
        if step == 1:
            self.begun.set()
        return Batch(torch.tensor([[step]]), torch.tensor([[step]]))


def test_the_next_batch_is_prepared_while_nobody_asks_for_it() -> None:
    slow = Slow()
    ahead = Prefetcher(slow)
    assert ahead.batch(0).tokens.item() == 0
    assert slow.begun.wait(timeout=10)  # step 1 has begun, though step 0 is all that was asked for
    assert [ahead.batch(step).tokens.item() for step in (1, 2, 3)] == [1, 2, 3]
    ahead.close()
    assert slow.asked[:4] == [0, 1, 2, 3]  # each once


def test_any_step_can_be_asked_for_next() -> None:
    ahead = Prefetcher(Slow())
    assert [ahead.batch(step).tokens.item() for step in (0, 9, 3, 3, 4)] == [0, 9, 3, 3, 4]
    ahead.close()


def test_an_error_comes_with_the_batch_that_it_spoilt() -> None:
    ahead = Prefetcher(Slow())
    assert ahead.batch(4).tokens.item() == 4
    with pytest.raises(ValueError, match=r"^step \(5\) must not be$"):
        ahead.batch(5)
    assert ahead.batch(6).tokens.item() == 6
    ahead.close()


def test_prepared_batches_are_those_of_the_loader(folder: Path) -> None:
    loader = Loader(folder, "train", T, 4, packing="best_fit")
    ahead = Prefetcher(loader)
    for step in range(2 * loader.batches):
        assert torch.equal(ahead.batch(step).tokens, loader.batch(step).tokens)
    ahead.close()


def interact() -> None:
    loader = Loader(SHARDS, "train", 64, 4, packing="best_fit")
    tokenizer = load_tokenizer(SHARDS / TOKENIZER)
    print(f"{SHARDS / MANIFEST}: {loader.batches:,} batches of 4 rows of 64 tokens")
    for step in ask("step> "):
        for row in loader.batch(int(step)).tokens.tolist():
            print(repr(tokenizer.decode(row)))


if __name__ == "__main__":
    run_validation(__file__, interact)
