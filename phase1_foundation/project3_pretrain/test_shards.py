"""Checks of shards and their manifest. --interactive then shows documents of a folder of shards."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project3_pretrain.config import SHARDS
from phase1_foundation.project3_pretrain.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    ShardWriter,
    documents_of,
    file_sha256,
    load_manifest,
    open_shard,
    token_dtype,
)

VOCAB, SEPARATOR = 300, 299


def make_shards(
    folder: Path,
    shards: Sequence[Sequence[Sequence[int]]],
    validation: Sequence[Sequence[int]] = ((1, 2, 3),),
) -> Path:
    """Write a folder of shards by hand: for each shard of the training split its documents as token ids."""
    tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [], {"<|endoftext|>": SEPARATOR})
    tokenizer.save(folder / TOKENIZER)
    entries = []
    for split, parts in (("train", shards), ("validation", [validation])):
        for number, documents in enumerate(parts):
            with ShardWriter(folder, f"{split}_{number:03}.bin", split, VOCAB, SEPARATOR) as writer:
                for ids in documents:
                    writer.add(ids, len(ids))
            entries.append(writer.entry())
    sha256 = file_sha256(folder / TOKENIZER)
    Manifest(token_dtype(VOCAB), VOCAB, SEPARATOR, sha256, entries, {}).save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "shards", [[[1, 2, 3], [4]], [[5, 6]]])


def test_a_shard_is_documents_each_after_a_separator_and_one_at_the_end(folder: Path) -> None:
    manifest = load_manifest(folder)
    first = open_shard(folder, manifest, manifest.of("train")[0])
    assert first.tolist() == [SEPARATOR, 1, 2, 3, SEPARATOR, 4, SEPARATOR]
    assert (folder / "train_000.bin").read_bytes() == np.array(first, "<u2").tobytes()
    assert [document.tolist() for document in documents_of(first, SEPARATOR)] == [[1, 2, 3], [4]]
    assert manifest.total("train", "documents") == 3
    assert manifest.total("train", "tokens") == 7 + 4
    assert manifest.total("train", "text_bytes") == 6


@settings(max_examples=25)
@given(documents=st.lists(st.lists(st.integers(0, SEPARATOR - 1), max_size=20), max_size=10))
def test_documents_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    folder = make_shards(tmp_path_factory.mktemp("shards"), [documents])
    manifest = load_manifest(folder)
    tokens = open_shard(folder, manifest, manifest.of("train")[0])
    assert [document.tolist() for document in documents_of(tokens, SEPARATOR)] == documents


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_unless_the_vocabulary_needs_four(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    assert token_dtype(vocab_size) == dtype
    with ShardWriter(tmp_path, "train_000.bin", "train", vocab_size, 0) as writer:
        writer.add([vocab_size - 1], 1)
    tokens = np.fromfile(tmp_path / "train_000.bin", dtype)
    assert tokens.tolist() == [0, vocab_size - 1, 0]


def test_the_tokens_of_a_shard_are_not_loaded_but_mapped(folder: Path) -> None:
    manifest = load_manifest(folder)
    tokens = open_shard(folder, manifest, manifest.shards[0])
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_shard_that_fails_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, "train_000.bin", "train", VOCAB, 0) as writer:
            writer.add([1, 2], 2)
            raise KeyError("half way")

    with pytest.raises(KeyError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


# What can be wrong with a folder


def test_no_shards_is_an_error_that_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no shards in .*preprocess\.py --out"):
        load_manifest(tmp_path)


def test_a_shard_cut_short_is_an_error_at_once(folder: Path) -> None:
    path = folder / "train_000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    manifest = load_manifest(folder)
    with pytest.raises(
        ValueError, match=r"^shard \(.*train_000\.bin\) must have 14 bytes and has 12: it is cut"
    ):
        open_shard(folder, manifest, manifest.shards[0], verify=False)


def test_a_shard_with_one_bit_changed_is_an_error(folder: Path) -> None:
    path = folder / "train_001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    manifest = load_manifest(folder)
    open_shard(folder, manifest, manifest.shards[0])
    with pytest.raises(
        ValueError, match=r"^shard \(.*train_001\.bin\) must have the SHA-256 of the manifest"
    ):
        open_shard(folder, manifest, manifest.shards[1])


def test_a_missing_shard_and_a_missing_tokenizer_are_errors(folder: Path) -> None:
    manifest = load_manifest(folder)
    (folder / "train_000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard .*train_000\.bin; make it with"):
        open_shard(folder, manifest, manifest.shards[0])
    (folder / TOKENIZER).unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*tokenizer\.json; make it with"):
        load_manifest(folder)


def test_another_tokenizer_is_an_error(folder: Path) -> None:
    other = BPETokenizer({i: bytes([255 - i]) for i in range(256)}, [], {"<|endoftext|>": SEPARATOR})
    other.save(folder / TOKENIZER)
    with pytest.raises(
        ValueError, match=r"^tokenizer \(\w{12}\) must be the one that made the shards, \w{12}$"
    ):
        load_manifest(folder)


def test_a_model_with_too_small_a_vocabulary_is_an_error(folder: Path) -> None:
    manifest = load_manifest(folder)
    manifest.check_vocab_size(300)
    with pytest.raises(ValueError, match=r"^vocab_size \(299\) must be at least 300, as in the shards$"):
        manifest.check_vocab_size(299)


def test_a_split_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^split \(test\) must be one of train, validation$"):
        load_manifest(folder).of("test")


def test_a_manifest_that_says_anything_else_is_an_error(folder: Path) -> None:
    good = json.loads((folder / MANIFEST).read_text())
    shard = good["shards"][0]
    bad: list[object] = [
        [],
        None,
        {},
        good | {"version": 2},
        good | {"dtype": "float64"},
        good | {"vocab_size": "300"},
        good | {"separator": -1},
        good | {"surplus": 1},
        good | {"shards": [1]},
        good | {"shards": [shard | {"tokens": 1.5}]},
        good | {"shards": [shard | {"file": "../../secret"}]},
        good | {"shards": [{name: shard[name] for name in ("file", "split")}]},
    ]
    for content in bad:
        (folder / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"^manifest \(.*\) must ") as caught:
            load_manifest(folder)
        assert "\n" not in str(caught.value)
    (folder / MANIFEST).write_bytes(b'{"version": 1, "dtyp\xff')
    with pytest.raises(ValueError, match=r"^manifest \(.*\) must be one that preprocess\.py wrote"):
        load_manifest(folder)


def interact() -> None:
    manifest = load_manifest(SHARDS)
    tokenizer = load_tokenizer(SHARDS / TOKENIZER)
    shards: list[Shard] = manifest.shards
    for number in ask(f"shard, 0 to {len(shards) - 1}> "):
        shard = shards[int(number)]
        for document in list(documents_of(open_shard(SHARDS, manifest, shard), manifest.separator))[:3]:
            print(f"{len(document):,} tokens: {tokenizer.decode(document[:100].tolist())!r}")


if __name__ == "__main__":
    run_validation(__file__, interact)
