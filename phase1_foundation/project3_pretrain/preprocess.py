"""Raw text to shards of tokens: uv run python phase1_foundation/project3_pretrain/preprocess.py

Four stages: clean, deduplicate, learn a tokenizer (unless one is given), tokenize. It grows in the folder
OUT.part; a killed run goes on there. When all is done, what is to stay moves to OUT, the manifest last.
"""

import functools
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.corpora import ONE_PER_LINE, documents, load_corpus
from common.files import DATA, make_folder
from common.script import progress, script
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.interop import open_tokenizer
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project3_pretrain.config import TRAIN_COMMAND, PreprocessConfig
from phase1_foundation.project3_pretrain.download_data import read_documents
from phase1_foundation.project3_pretrain.pipeline import (
    SEPARATOR,
    SPLITS,
    Chunk,
    clean_chunk,
    clean_files,
    deduplicate,
    in_order,
    in_validation,
    read_records,
    tokenize_chunk,
    write_json,
)
from phase1_foundation.project3_pretrain.quality import KINDS
from phase1_foundation.project3_pretrain.report import FIGURE, REPORT, make_report
from phase1_foundation.project3_pretrain.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    file_sha256,
    load_manifest,
    token_dtype,
)

OURS = re.compile(rf"({'|'.join(SPLITS)})_\d+\.bin|" + "|".join(map(re.escape, (TOKENIZER, REPORT, FIGURE))))
PLAN, STAGES = "plan.json", "stages"
FREE_TO_CHANGE = {"source", "workers", "out", "overwrite"}  # the shards do not depend on them


def run(config: PreprocessConfig) -> Manifest:
    """Make the shards, or finish them, and return their manifest."""
    paths = find_corpora(config.data, config.source)
    plan = make_plan(config, paths)
    if is_done(config, plan):
        return load_manifest(config.out)
    work = begin(config.out, plan)
    if not (work / MANIFEST).is_file():
        make(config, paths, plan, work)
    install(work, config.out)
    print(f"written to {config.out}: shards, {MANIFEST}, {TOKENIZER}, {REPORT}, {FIGURE}")
    return load_manifest(config.out)


def find_corpora(names: list[str], source: str) -> list[Path]:
    """Return the files and folders to read; a corpus by name is fetched if need be."""
    paths = []
    for name in names:
        own = [path for path in (Path(name), DATA / f"{name}{ONE_PER_LINE}") if path.exists()]
        if not own and (Path(name).suffix or "/" in name):
            raise FileNotFoundError(f"data ({name}) must be a file or folder, or a corpus by name")
        paths.append(own[0] if own else load_corpus(name, source))
    return paths


def make_plan(config: PreprocessConfig, paths: list[Path]) -> dict[str, Any]:
    """Return all that the shards depend on: settings, and name, size and time of each file."""
    plan = {name: value for name, value in config.to_dict().items() if name not in FREE_TO_CHANGE}
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    if Path(config.tokenizer).is_file():
        stats.append((config.tokenizer, Path(config.tokenizer).stat()))
    return plan | {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def is_done(config: PreprocessConfig, plan: dict[str, Any]) -> bool:
    """Say whether `out` has these very shards. ValueError if it has others, or anything else."""
    out = config.out
    if not (out / MANIFEST).is_file():
        if out.exists() and not (out.is_dir() and all(is_ours(file) for file in out.iterdir())):
            raise ValueError(f"out ({out}) must be an empty folder, or one of shards")
        return False
    if config.overwrite:
        return False
    before = load_manifest(out).made_from
    for name in plan:
        if before.get(name) != plan[name]:
            was = "other files" if name == "files" else f"{name} {before.get(name)}"
            raise ValueError(f"out ({out}) has shards made with {was}; --overwrite replaces them")
    print(f"{out}: these shards are already there")
    return True


def is_ours(file: Path) -> bool:
    """Say whether a file may be in a folder of shards; one without a manifest was left by a killed run."""
    return bool(OURS.fullmatch(file.name))


def begin(out: Path, plan: dict[str, Any]) -> Path:
    """Return the folder to work in, with what a killed run of the same plan left there."""
    work = out.with_name(f"{out.name}.part")
    if (work / PLAN).is_file():
        if json.loads((work / PLAN).read_text(encoding="utf-8")) == plan:
            print(f"{work}: going on with what is there")
            return work
        shutil.rmtree(work)
    elif work.exists() and any(work.iterdir()):
        raise ValueError(f"out ({out}) must be another: the folder to work in, {work}, holds something else")
    make_folder(work / STAGES)
    write_json(work / PLAN, plan)
    return work


def make(config: PreprocessConfig, paths: list[Path], plan: dict[str, Any], work: Path) -> None:
    """Go through the stages, and write manifest and report."""
    stages, seconds = work / STAGES, dict[str, float]()
    resumed = any(stages.iterdir())
    with _clock(seconds, "clean"):
        summaries = clean(config, paths, stages)
    with _clock(seconds, "deduplicate"):
        permutations = config.permutations if config.near_duplicates else 0
        copies = deduplicate(stages, permutations, config.bands, config.near_duplicates)
    with _clock(seconds, "learn"):
        tokenizer = make_tokenizer(config, stages, copies)
    with _clock(seconds, "tokenize"):
        shards = tokenize(config, stages, copies)
    sha256 = file_sha256(work / TOKENIZER)
    separator, size = tokenizer.special_tokens[SEPARATOR], tokenizer.vocab_size
    manifest = Manifest(token_dtype(size), size, separator, sha256, shards, plan)
    if missing := set(SPLITS) - {shard.split for shard in shards}:
        left = sum(summary["kept"] for summary in summaries) - int(copies.sum())
        share = f"validation_share ({config.validation_share})"
        raise ValueError(
            f"{share} must leave some of the {left} documents for {' and '.join(sorted(missing))}"
        )
    duplicates = json.loads((stages / "duplicates.json").read_text(encoding="utf-8"))
    make_report(work, summaries, duplicates, manifest, {} if resumed else seconds)
    manifest.save(work)


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def clean(config: PreprocessConfig, paths: list[Path], stages: Path) -> list[dict[str, Any]]:
    """Clean all chunks and return their summaries."""
    done = stages / "clean.json"
    if not done.is_file():
        text_only = not any(path.is_dir() or path.suffix == ".parquet" for path in paths)
        total = sum(path.stat().st_size for path in paths) if text_only else None
        bar: Any = progress([], desc="clean", unit="B", unit_scale=True, total=total)
        permutations = config.permutations if config.near_duplicates else 0
        job = functools.partial(clean_chunk, stages=stages, permutations=permutations)

        def todo() -> Iterator[Chunk]:
            for chunk in chunks(config, paths):
                if (stages / f"clean_{chunk.number:03}.json").is_file():
                    bar.update(sum(map(len, chunk.texts)))
                else:
                    yield chunk

        with bar:
            for summary in in_order(job, todo(), config.workers):
                bar.update(summary["bytes"])
        write_json(done, len(clean_files(stages)))
    files = [stages / f"clean_{number:03}.json" for number in range(json.loads(done.read_text()))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def chunks(config: PreprocessConfig, paths: list[Path]) -> Iterator[Chunk]:
    """Yield the documents of the files in chunks of about shard_mb; a chunk has text of one kind only."""
    number = first = 0
    for path in paths:
        corpus = re.split(r"[.-]", path.name)[0]  # wikitext2-valid.txt: wikitext2
        kind = KINDS.get(corpus, "prose") if config.quality == "auto" else config.quality
        print(f"{path}: rules for {kind}", flush=True)
        texts: list[str] = []
        size = 0
        for text in read_documents(path, config.column):
            texts.append(text)
            size += len(text)
            if size >= config.shard_mb * 1e6:
                yield Chunk(number, first, kind, texts)
                number, first, texts, size = number + 1, first + len(texts), [], 0
        if texts:
            yield Chunk(number, first, kind, texts)
            number, first = number + 1, first + len(texts)


def make_tokenizer(config: PreprocessConfig, stages: Path, copies: NDArray[np.bool_]) -> Any:
    """Return the tokenizer of the shards, learned from the training split unless one is given."""
    path = stages.parent / TOKENIZER
    if not path.is_file():
        given = config.tokenizer != "train"
        tokenizer = open_tokenizer(config.tokenizer) if given else learn(config, stages, copies)
        if SEPARATOR not in tokenizer.special_tokens:
            raise ValueError(f"tokenizer ({config.tokenizer}) must have the special token {SEPARATOR}")
        tokenizer.save(path)
    return load_tokenizer(path)


def learn(config: PreprocessConfig, stages: Path, copies: NDArray[np.bool_]) -> BPETokenizer:
    """Return a tokenizer learned from a sample of the training split."""
    sample = progress(training_sample(config, stages, copies), desc="learn", unit=" documents")
    return BPETokenizer.train_from_iterator(sample, config.vocab_size, special_tokens=[SEPARATOR])


def training_sample(config: PreprocessConfig, stages: Path, copies: NDArray[np.bool_]) -> Iterator[str]:
    """Yield about tokenizer_mb of the training split, from everywhere in it; the hashes choose."""
    files = clean_files(stages)
    share = min(1.0, config.tokenizer_mb * 1e6 / max(1, sum(file.stat().st_size for file in files)))
    first = 0
    for file in files:
        records = read_records(file)
        for text, record, is_copy in zip(documents(file), records, copies[first:], strict=False):
            hashed = int(record["hash"])
            chosen = hashed >= (1 - share) * 2**64  # the other end of the range from the validation split
            if chosen and not is_copy and not in_validation(hashed, config.validation_share):
                yield text
        first += len(records)


def tokenize(config: PreprocessConfig, stages: Path, copies: NDArray[np.bool_]) -> list[Shard]:
    """Tokenize all chunks and return the entries of their shards."""
    total = first = 0
    markers, jobs = [], []
    for number, file in enumerate(clean_files(stages)):
        records = read_records(file)
        markers.append(stages / f"tokens_{number:03}.json")
        if not markers[-1].is_file():
            jobs.append((number, copies[first : first + len(records)]))
            total += int(records["bytes"][~copies[first : first + len(records)]].sum())
        first += len(records)
    job = functools.partial(_tokenize_job, stages=stages, validation_share=config.validation_share)
    bar: Any = progress([], desc="tokenize", unit="B", unit_scale=True, total=total)
    with bar:
        for shards in in_order(job, jobs, config.workers):
            bar.update(sum(shard.text_bytes for shard in shards))
    return [Shard(**entry) for marker in markers for entry in json.loads(marker.read_text())]


def _tokenize_job(job: tuple[int, NDArray[np.bool_]], stages: Path, validation_share: float) -> list[Shard]:
    return tokenize_chunk(stages, *job, validation_share)


def install(work: Path, out: Path) -> None:
    """Move the finished files to `out`, where they take the place of older shards; the manifest goes last."""
    shutil.rmtree(work / STAGES, ignore_errors=True)
    make_folder(out)
    if (out / MANIFEST).is_file():
        (out / MANIFEST).unlink()
        for file in filter(is_ours, list(out.iterdir())):
            file.unlink()
    for file in [*filter(is_ours, list(work.iterdir())), work / MANIFEST]:
        file.replace(out / file.name)
    shutil.rmtree(work)  # the plan, and halves of files that a killed run left


@script
def main() -> None:
    config = PreprocessConfig.from_cli()
    run(config)
    print(f"next: {TRAIN_COMMAND}")


if __name__ == "__main__":
    main()
