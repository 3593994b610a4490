r"""The stages of preprocessing: each turns files into files, a chunk at a time, and never makes one twice.

PAPERS
  [1] The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale, Penedo et al., 2024,
      arXiv:2406.17557
  [2] Deduplicating Training Data Makes Language Models Better, Lee et al., 2021, arXiv:2107.06499
  [3] MapReduce: Simplified Data Processing on Large Clusters, Dean and Ghemawat, 2004 (OSDI)

FILES in the folder `stages`, for chunk 000 and so on
  clean_000.docs.txt     the documents that passed the rules, normalized
  clean_000.records      hash and bytes of each;  clean_000.signatures: its MinHash signature
  clean_000.json         what was read, dropped and kept; written last: with it the chunk is done
  duplicates.npy         of each document, in the chunks' order: whether it is a copy
  duplicates.json        how many, how alike, and examples
  tokens_000.json        entries of the shards of the chunk; written last
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.corpora import documents, write_documents
from common.files import atomic_write
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project3_pretrain.dedup import (
    MinHash,
    SignatureFile,
    exact_duplicates,
    near_duplicates,
    shingles,
    text_hash,
)
from phase1_foundation.project3_pretrain.quality import judge, normalize
from phase1_foundation.project3_pretrain.shards import TOKENIZER, Shard, ShardWriter, file_sha256

SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "validation")
EXAMPLES = 3  # of dropped documents, for each reason and chunk
EXCERPT = 200  # characters of an example
RECORD = np.dtype([("hash", "<u8"), ("bytes", "<u4")])
Records = NDArray[np.void]
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass
class Chunk:
    """Consecutive documents: what one process works on and one shard of each split comes from."""

    number: int
    first: int  # number of its first document
    kind: str  # of text, one of RULES
    texts: list[str]


def clean_chunk(chunk: Chunk, stages: Path, permutations: int) -> dict[str, Any]:
    r"""Normalize the documents of a chunk, drop those that break a rule, write the others; return the counts.

    PAPER: [1] Sec. 3 goes this way too: filter, then deduplicate; [3] for the way the work is divided.
    PAPER CONTEXT: Each language model has its pipeline, usually told in a paragraph. [1] published the
        code, and what each step does to a model that is trained on the result.
    INTUITION: First the looks at one document alone; what needs all others comes later, when there are fewer.
    IMPLEMENTATION: From here on a hash and a length, 12 bytes, stand for a document in memory, and its
        signature lies on the disk. With permutations = 0 there are no signatures.
    WHY: What comes out depends on the chunk alone. So any process can make it, in any order, and a second
        time if the first one was killed [3], and the files are the same to the bit.
    """
    minhash = MinHash(permutations) if permutations else None
    counts = {"documents": len(chunk.texts), "bytes": 0, "normalized": 0}
    dropped: dict[str, dict[str, Any]] = {}
    lines: Counter[str] = Counter()
    records: list[tuple[int, int]] = []
    signatures: list[NDArray[np.uint32]] = []

    def kept() -> Iterator[str]:
        for number, raw in enumerate(chunk.texts, start=chunk.first):
            text = normalize(raw)
            counts["normalized"] += text != raw
            counts["bytes"] += len(raw.encode())
            cleaned, broken, gone = judge(text, chunk.kind)
            lines.update(gone)
            if broken:
                count_drop(dropped, broken, number, text)
                continue
            records.append((text_hash(cleaned), len(cleaned.encode())))
            if minhash:
                signatures.append(minhash.signature(shingles(cleaned)))
            yield cleaned

    name = f"clean_{chunk.number:03}"
    write_documents(stages / f"{name}.docs.txt", kept())
    with atomic_write(stages / f"{name}.records", "wb") as file:
        file.write(np.array(records, RECORD).tobytes())
    with atomic_write(stages / f"{name}.signatures", "wb") as file:
        file.writelines(signature.tobytes() for signature in signatures)
    results = {"kept": len(records), "kept_bytes": sum(size for _, size in records)}
    summary = counts | results | {"dropped": dropped, "lines": dict(lines)}
    write_json(stages / f"{name}.json", summary)
    return summary


def count_drop(dropped: dict[str, dict[str, Any]], reason: str, number: int, text: str) -> None:
    """Count a document that goes, and keep the beginning of the first few as examples."""
    entry = dropped.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
    entry["documents"] += 1
    entry["bytes"] += len(text.encode())
    if len(entry["examples"]) < EXAMPLES:
        entry["examples"].append({"document": number, "text": text[:EXCERPT]})


def deduplicate(stages: Path, permutations: int, bands: int, threshold: float) -> NDArray[np.bool_]:
    """Return for each document that is left, in the order of the chunks, whether it is a copy and goes."""
    path = stages / "duplicates.npy"
    if path.is_file():
        return np.load(path)
    records = np.concatenate([np.zeros(0, RECORD), *map(read_records, clean_files(stages))])
    copies = exact_duplicates(records["hash"])
    exact = copies.copy()
    similarities = np.zeros(51, np.int64)  # how many copies by estimated similarity, in steps of 0.02
    examples: list[dict[str, Any]] = []
    if permutations:
        _join_signatures(stages)
        signatures = SignatureFile(stages / "signatures", permutations)
        for document, original, alike in near_duplicates(signatures, bands, threshold, ~exact):
            copies[document] = True
            similarities[round(50 * alike)] += 1
            if len(examples) < EXAMPLES:
                kept, dropped = (read_document(stages, number)[:EXCERPT] for number in (original, document))
                examples.append({"similarity": alike, "kept": kept, "dropped": dropped})
    counts = {
        f"{name}_{what}": int(value)
        for name, mask in (("exact", exact), ("near", copies & ~exact))
        for what, value in (("documents", mask.sum()), ("bytes", records["bytes"][mask].sum(dtype=np.int64)))
    }
    write_json(
        stages / "duplicates.json", counts | {"similarities": similarities.tolist(), "examples": examples}
    )
    with atomic_write(path, "wb") as done:
        np.save(done, copies)
    return copies


def _join_signatures(stages: Path) -> None:
    """Write the signatures of all chunks into one file."""
    with atomic_write(stages / "signatures", "wb") as together:
        for clean in clean_files(stages):
            with open(beside(clean, "signatures"), "rb") as part:
                shutil.copyfileobj(part, together)


def tokenize_chunk(
    stages: Path, number: int, copies: NDArray[np.bool_], validation_share: float
) -> list[Shard]:
    r"""Encode what is left of a chunk into a shard of each split; return their entries.

    PAPER: none for the split by hash; [2] for what a bad split does.
    PAPER CONTEXT: [2] found over 4% of the validation text of standard datasets in their training text. And a
        split by position or by lot moves documents to the other side as soon as documents are added.
    INTUITION: The document itself says where it belongs.
    IMPLEMENTATION: Validation, if its hash, as a fraction of 2^64, is below the share. The separator is no
        part of the text: what looks like one in a document is encoded as the letters that it is.
    WHY: The same text is on the same side in every corpus, on every machine, for ever.
    """
    shards: list[Shard] = []
    tokenizer = _tokenizer(stages.parent / TOKENIZER, file_sha256(stages.parent / TOKENIZER))
    separator = tokenizer.special_tokens[SEPARATOR]
    clean = stages / f"clean_{number:03}.docs.txt"
    with ExitStack() as stack:
        writers = []
        for split in SPLITS:
            name = f"{split}_{number:03}.bin"
            writers.append(ShardWriter(stages.parent, name, split, tokenizer.vocab_size, separator))
            stack.enter_context(writers[-1])
        for text, record, is_copy in zip(documents(clean), read_records(clean), copies, strict=True):
            if not is_copy:
                writer = writers[in_validation(record["hash"], validation_share)]
                writer.add(tokenizer.encode(text), int(record["bytes"]))
    for writer in writers:
        if writer.documents:
            shards.append(writer.entry())
        else:
            writer.path.unlink()
    write_json(stages / f"tokens_{number:03}.json", [asdict(shard) for shard in shards])
    return shards


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Any:
    """Return the tokenizer of a file, read once in each process; files of one name differ in SHA-256."""
    return load_tokenizer(path)


def in_validation(text_hash: int, share: float) -> bool:
    """Say whether a document with this hash belongs to the validation split."""
    return int(text_hash) < int(share * 2**64)


def clean_files(stages: Path) -> list[Path]:
    """Return the files of cleaned documents in the order of the chunks."""
    return [
        stages / f"clean_{number:03}.docs.txt" for number in range(len(list(stages.glob("clean_*.json"))))
    ]


def read_records(clean: Path) -> Records:
    """Return hash and bytes of each document in a file of cleaned documents."""
    return np.fromfile(beside(clean, "records"), RECORD)


def beside(clean: Path, what: str) -> Path:
    """Return the file of records or signatures of a file of cleaned documents."""
    return clean.with_name(clean.name.replace("docs.txt", what))


def read_document(stages: Path, number: int) -> str:
    """Return one cleaned document by its place among all."""
    for clean in clean_files(stages):
        if number < (count := len(read_records(clean))):
            return next(islice(documents(clean), number, None))
        number -= count
    raise ValueError(f"document ({number}) must be one of those that are left")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file)


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Yield function(job) of each job, in order, from so many processes; few jobs are in memory at once."""
    if workers == 1:
        yield from map(function, jobs)
        return
    pending: deque[Future[Result]] = deque()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent) as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(function, job))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end at once on Ctrl-C, without a traceback, and do not outlive a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
