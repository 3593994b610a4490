"""Checks of preprocessing from end to end. --interactive then tells of a text what would become of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.corpora import write_documents
from common.files import ROOT
from common.script import ask, run_validation
from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
from phase1_foundation.project2_tokenizer.token_file import load_tokenizer
from phase1_foundation.project3_pretrain import pipeline, preprocess, report
from phase1_foundation.project3_pretrain.config import PreprocessConfig, ReportConfig
from phase1_foundation.project3_pretrain.dedup import text_hash
from phase1_foundation.project3_pretrain.pipeline import in_order, in_validation
from phase1_foundation.project3_pretrain.preprocess import chunks, run
from phase1_foundation.project3_pretrain.quality import RULES, judge, normalize
from phase1_foundation.project3_pretrain.shards import (
    MANIFEST,
    TOKENIZER,
    documents_of,
    load_manifest,
    open_shard,
)

SHARE = 0.2  # of validation


def texts(n: int, seed: int = 0, words: int = 100) -> list[str]:
    """Documents of random words of which nobody is like another."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(2000)]
    return [" ".join(rng.choices(vocabulary, k=words)) + ".\n" for _ in range(n)]


Configure = Callable[..., PreprocessConfig]


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw only where the picture is what is tested: it takes longer than all the rest."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(report, "draw", lambda *_: None)


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Settings to preprocess these documents, small and quick."""

    def make(documents: list[str], name: str = "corpus", **changes: Any) -> PreprocessConfig:
        path = tmp_path / f"{name}.docs.txt"
        if not path.exists():
            write_documents(path, documents)
        small: dict[str, Any] = {"quality": "none", "vocab_size": 320, "tokenizer_mb": 0.02, "shard_mb": 0.01}
        small |= {"workers": 1, "validation_share": SHARE, "permutations": 64, "bands": 8}
        return PreprocessConfig([str(path)], out=tmp_path / f"shards_of_{name}", **small | changes)

    return make


def decode(folder: Path, split: str) -> list[str]:
    """The documents in the shards of a split."""
    manifest, tokenizer = load_manifest(folder), load_tokenizer(folder / TOKENIZER)
    shards = [open_shard(folder, manifest, shard) for shard in manifest.of(split)]
    return [
        tokenizer.decode(ids.tolist())
        for tokens in shards
        for ids in documents_of(tokens, manifest.separator)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder of shards, without what tells when and from which file they were made."""
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".bin"}
    manifest = json.loads((folder / MANIFEST).read_text())
    told = json.loads((folder / report.REPORT).read_text())
    files["manifest"] = json.dumps(manifest | {"made_from": None}).encode()
    files["report"] = json.dumps(told | {"seconds": None, "mb_per_second": None}).encode()
    return files | {TOKENIZER: (folder / TOKENIZER).read_bytes()}


# From text to shards


def test_every_document_is_in_its_split_or_was_dropped_for_a_reason(configure: Configure) -> None:
    good = texts(60)
    near = good[7].replace("a", "a", 1).rsplit(" ", 1)[0] + " changed.\n"
    manifest = run(config := configure([*good, "", good[3], good[5], near, " \n"]))
    by_split = {split: [t for t in good if in_validation(text_hash(t), SHARE) == (split == "validation")]
                for split in ("train", "validation")}  # fmt: skip
    assert decode(config.out, "train") == by_split["train"]
    assert decode(config.out, "validation") == by_split["validation"]
    assert 3 < len(by_split["validation"]) < 25
    told = json.loads((config.out / report.REPORT).read_text())
    assert told["documents"] == 65
    assert told["dropped"]["has_text"]["documents"] == 2
    assert told["dropped"]["has_text"]["examples"] == [
        {"document": 60, "text": ""},
        {"document": 64, "text": " \n"},
    ]
    assert (told["copies"]["exact_documents"], told["copies"]["near_documents"]) == (2, 1)
    assert told["copies"]["examples"][0]["kept"] == good[7][:200]
    assert manifest.total("train", "text_bytes") == sum(len(t) for t in by_split["train"])
    assert len(manifest.of("train")) == told["bytes"] // 10_000 + 1  # a shard of each chunk


def test_a_newcomer_sees_a_table_and_a_picture(
    configure: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config := configure([*texts(40), ""]))
    printed = capsys.readouterr().out
    assert "read                                      41  100.00%" in printed
    assert "dropped: has_text                          1    2.44%      0.00 MB\n" in printed
    assert "has_text: At least one word. Unlike 40: ''\n" in printed
    assert (config.out / report.FIGURE).read_bytes().startswith(b"\x89PNG")
    (config.out / report.FIGURE).unlink()
    report.run(ReportConfig(config.out))
    assert "dropped: has_text" in capsys.readouterr().out
    assert (config.out / report.FIGURE).is_file()


def test_quality_rules_fit_the_corpus(configure: Configure, tmp_path: Path) -> None:
    for name in ("stdlib", "wikitext2-valid", "mine"):
        write_documents(tmp_path / f"{name}.docs.txt", texts(5))
    config = configure(texts(5), "more", quality="auto")
    paths = [tmp_path / f"{name}.docs.txt" for name in ("stdlib", "wikitext2-valid", "mine")]
    kinds = [(chunk.kind, chunk.number, chunk.first) for chunk in chunks(config, paths)]
    assert kinds == [("code", 0, 0), ("none", 1, 5), ("prose", 2, 10)]
    assert {chunk.kind for chunk in chunks(replace(config, quality="web"), paths)} == {"web"}


def test_odd_text_survives(configure: Configure) -> None:
    odd = [
        "<|endoftext|> is no end here",
        "a\\nb\\",
        "你好 \U0001f600 e\u0301",
        "tab\tand \x00control",
        "x" * 5000,
    ]
    config = configure([*texts(30), *odd])
    run(config)
    both = decode(config.out, "train") + decode(config.out, "validation")
    assert {normalize(text) for text in odd} <= set(both)
    assert "你好 \U0001f600 é" in both


def test_two_processes_make_the_same_files_as_one(configure: Configure) -> None:
    documents = [*texts(80), "", *texts(5)]
    run(one := configure(documents, "one"))
    run(two := configure(documents, "two", workers=2))
    assert contents(one.out) == contents(two.out)


def test_a_document_stays_in_its_split_when_others_are_added(configure: Configure) -> None:
    few, many = texts(40), texts(100, seed=1)
    run(before := configure(few, "few"))
    run(after := configure([*many[:50], *few, *many[50:]], "many"))
    for split in ("train", "validation"):
        assert set(decode(before.out, split)) <= set(decode(after.out, split))


def test_without_near_duplicates_only_exact_copies_go(configure: Configure) -> None:
    good = texts(30)
    near = good[7] + "changed"
    run(config := configure([*good, near, good[0]], near_duplicates=0.0))
    assert len(decode(config.out, "train") + decode(config.out, "validation")) == 31


# The tokenizer


def test_the_tokenizer_is_learned_from_the_training_split_alone(configure: Configure) -> None:
    secret = "zqzqzqzq " * 300
    salt = next(i for i in range(1000) if in_validation(text_hash(f"{secret}{i}"), SHARE))
    run(config := configure([*texts(40), f"{secret}{salt}"], tokenizer_mb=1.0))
    assert f"{secret}{salt}" in decode(config.out, "validation")
    assert not [token for token in load_tokenizer(config.out / TOKENIZER).vocab.values() if b"zq" in token]


def test_a_given_tokenizer_is_used_and_kept_beside_the_shards(configure: Configure, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train("some other text " * 50, 270, special_tokens=["<|endoftext|>"])
    tokenizer.save(tmp_path / "mine.json")
    manifest = run(config := configure(texts(30), tokenizer=str(tmp_path / "mine.json")))
    assert (manifest.vocab_size, manifest.separator) == (tokenizer.vocab_size, tokenizer.vocab_size - 1)
    assert load_tokenizer(config.out / TOKENIZER).merges == tokenizer.merges
    BPETokenizer.train("no special token " * 50, 270).save(tmp_path / "bare.json")
    with pytest.raises(
        ValueError, match=r"^tokenizer \(.*bare\.json\) must have the special token <\|endoftext\|>$"
    ):
        run(configure(texts(30), "other", tokenizer=str(tmp_path / "bare.json")))


# Stopping and going on


class Stopped(Exception):  # noqa: N818
    """Stands for a power cut."""


@pytest.mark.parametrize(("stage", "after"), [("clean_chunk", 0), ("clean_chunk", 3), ("tokenize_chunk", 2)])
def test_what_was_done_is_not_done_again(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, stage: str, after: int
) -> None:
    documents = [*texts(80), "", *texts(5)]
    run(whole := configure(documents, "whole"))
    cut = configure(documents, "cut")
    calls = 0

    def stop(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise Stopped
        return getattr(pipeline, stage)(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, stage, stop)
        with pytest.raises(Stopped):
            run(cut)
    assert not cut.out.exists()
    calls = after + 1  # from here on count, and do not stop
    monkeypatch.setattr(preprocess, stage, stop)
    run(cut)
    assert calls - after - 1 == len(load_manifest(cut.out).of("train")) - after
    assert contents(cut.out) == contents(whole.out)
    assert not cut.out.with_name(f"{cut.out.name}.part").exists()


@pytest.mark.parametrize(
    "marker", [pytest.param("clean_002.json", marks=pytest.mark.slow), "tokens_001.json"]
)
def test_a_run_that_was_killed_goes_on_and_leaves_no_processes(configure: Configure, marker: str) -> None:
    documents = texts(300)
    run(whole := configure(documents, "whole"))
    cut = configure(documents, "cut", workers=2)
    flags = [f"--{name}={value}" for name, value in cut.to_dict().items()
             if name not in ("data", "overwrite")] + ["--data", *cut.data]  # fmt: skip
    command = [sys.executable, preprocess.__file__, *flags]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    stages = cut.out.with_name(f"{cut.out.name}.part") / "stages"
    deadline = time.monotonic() + 60
    while not (stages / marker).exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(
        timeout=30
    )  # ends when the last process that holds the pipe has ended: no worker is left
    assert killed.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert not (cut.out / MANIFEST).exists()
    (stages.parent / ".train_099.bin.abc.tmp").write_bytes(b"half a shard")  # as a kill may leave one
    run(replace(cut, workers=1))
    assert contents(cut.out) == contents(whole.out)
    assert {file.name for file in whole.out.iterdir()} | {report.FIGURE} == {
        file.name for file in cut.out.iterdir()
    } | {report.FIGURE}


def test_a_run_killed_while_it_moved_its_files_is_finished(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(60)
    run(whole := configure(documents, "whole"))
    cut, moved = configure(documents, "cut"), 0
    move = Path.replace

    def stop(self: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        if moved == 4:
            raise Stopped
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(Stopped):
            run(cut)
    assert cut.out.exists()
    assert not (cut.out / MANIFEST).exists()
    monkeypatch.setattr(preprocess, "clean_chunk", None)  # nothing is computed again
    run(cut)
    assert contents(cut.out) == contents(whole.out)


def test_shards_that_are_there_are_left_alone(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(texts(30))
    first = run(config)
    monkeypatch.setattr(preprocess, "make", None)
    assert run(replace(config, workers=7)) == first


def test_other_settings_do_not_replace_shards_unless_told_to(configure: Configure, tmp_path: Path) -> None:
    config = configure(texts(30))
    run(config)
    with pytest.raises(
        ValueError, match=r"^out \(.*\) has shards made with vocab_size 320; --overwrite replaces them"
    ):
        run(replace(config, vocab_size=300))
    manifest = run(replace(config, vocab_size=300, shard_mb=1.0, overwrite=True))
    assert manifest.vocab_size == 300
    assert len(list(config.out.glob("train_*.bin"))) == 1  # those of before are gone
    with open(config.data[0], "a") as file:
        file.write("one more\n")
    with pytest.raises(ValueError, match=r"has shards made with other files; --overwrite"):
        run(replace(config, vocab_size=300, shard_mb=1.0))


def test_settings_changed_after_a_kill_begin_anew(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(40)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "tokenize_chunk", None)
        with pytest.raises(TypeError):
            run(configure(documents))
    changed = run(configure(documents, bands=16))
    assert changed.made_from["bands"] == 16
    run(other := configure(documents, "other", bands=16))
    assert contents(other.out) == contents(configure(documents).out)


def test_a_folder_with_other_things_in_it_is_not_touched(configure: Configure) -> None:
    config = configure(texts(30))
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"^out \(.*\) must be an empty folder, or one of shards$"):
        run(replace(config, overwrite=True))
    part = config.out.with_name("elsewhere.part")
    part.mkdir()
    (part / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"^out \(.*elsewhere\) must be another: the folder to work in"):
        run(replace(config, out=config.out.with_name("elsewhere")))
    assert (part / "thesis.tex").exists()


# What cannot be done


def test_too_little_text_is_one_clear_error(configure: Configure) -> None:
    with pytest.raises(
        ValueError, match=r"^validation_share \(0\.2\) must leave some of the 0 documents for train and"
    ):
        run(configure([], "none"))
    alone = next(text for text in texts(50) if not in_validation(text_hash(text), SHARE))
    with pytest.raises(ValueError, match=r"must leave some of the 1 documents for validation$"):
        run(configure([alone], "one"))


def test_settings_that_make_no_sense_are_errors(tmp_path: Path) -> None:
    for settings, message in (
        ({"bands": 10}, r"^permutations \(128\) must be divisible by bands \(10\)$"),
        ({"validation_share": 0.6}, r"^validation_share \(0\.6\) must be between 0 and 0\.5$"),
        ({"near_duplicates": 1.5}, r"^near_duplicates \(1\.5\) must be between 0 and 1$"),
        ({"shard_mb": 0.0}, r"^shard_mb \(0\.0\) must be above 0$"),
        ({"data": []}, r"^data \(\) must name a corpus or a file$"),
        ({"workers": 0}, r"^workers \(0\) must be at least 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            PreprocessConfig(**settings).validate_config()
    with pytest.raises(
        FileNotFoundError, match=r"^data \(no/such\.txt\) must be a file or folder, or a corpus"
    ):
        run(PreprocessConfig(["no/such.txt"], out=tmp_path / "shards"))


def test_an_error_in_a_worker_is_the_error_of_the_run() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_order(int, ["1", "2", "three", "4"], workers=2))


# Memory


def measure_peak(config: PreprocessConfig) -> int:
    """Return the most bytes that Python and numpy had in use at once."""
    tracemalloc.start()
    run(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_ten_times_the_text_needs_no_more_memory(configure: Configure) -> None:
    settings: dict[str, Any] = {"shard_mb": 0.05, "tokenizer_mb": 0.05}
    run(configure(texts(50), "first", **settings))  # imports and caches
    small = measure_peak(configure(texts(60, words=200), "small", **settings))
    large = measure_peak(configure(texts(600, words=200), "large", **settings))
    assert large < small + 250 * 540  # for each document more, which has 1,100 bytes of text


RUN_AND_TELL = """
from phase1_foundation.project3_pretrain import preprocess, report
report.draw = lambda *_: None  # the library that draws takes more than all the rest
preprocess.run(preprocess.PreprocessConfig.from_cli())
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""  # the greatest size of the process so far in kB; getrusage would tell the parent's, if that was greater


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells the size of a process so"
)
def test_ten_times_the_text_needs_no_more_memory_of_the_machine(configure: Configure) -> None:
    settings: dict[str, Any] = {"shard_mb": 1.0, "tokenizer_mb": 1.0, "vocab_size": 1000}
    peaks = []
    for name, count in (("small", 4_000), ("large", 40_000)):  # 3.3 and 33 MB
        config = configure(texts(count, words=150), name, **settings)
        flags = [
            f"--{key}={value}" for key, value in config.to_dict().items() if key not in ("data", "overwrite")
        ]
        command = [sys.executable, "-c", RUN_AND_TELL, *flags, "--data", *config.data]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def interact() -> None:
    for text in ask("text> "):
        kinds = {kind: judge(normalize(text), kind)[1] or "kept" for kind in RULES}
        split = "validation" if in_validation(text_hash(normalize(text)), 0.02) else "train"
        print(f"{kinds}; its split would be {split}, its hash {text_hash(normalize(text)):016x}")


if __name__ == "__main__":
    run_validation(__file__, interact)
