r"""Tokenizers as JSON files that a person can read, and that a stranger may have written.

PAPERS
  [1] PEP 383: Non-decodable Bytes in System Character Interfaces, von Löwis, 2009
  [2] The JavaScript Object Notation (JSON) Data Interchange Format, Bray, RFC 8259, 2017
"""

import inspect
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import atomic_write
from phase1_foundation.project2_tokenizer.bpe_train import Merge
from phase1_foundation.project2_tokenizer.patterns import PATTERNS
from phase1_foundation.project2_tokenizer.tokenizer import Tokenizer

VERSION = 1
MAX_BYTES = 2**26  # of a file; the largest tokenizers in use take about half of these 64 MiB
MAX_ID = 2**24  # ids are below; an embedding table of more rows is a mistake or an attack
MAX_SCORE = 1000  # logarithms of probabilities are far below in absolute value

TRAIN_COMMAND = "uv run python phase1_foundation/project2_tokenizer/train_tokenizer.py"
show = reprlib.repr  # a hostile value may be a megabyte long; an error message quotes its ends


def kinds() -> dict[str, type[Tokenizer]]:
    """Return the class of each kind of file; imported here, because these modules import this one."""
    from phase1_foundation.project2_tokenizer.bpe import BPETokenizer
    from phase1_foundation.project2_tokenizer.unigram import UnigramTokenizer
    from phase1_foundation.project2_tokenizer.wordpiece import WordPieceTokenizer

    return {"bpe": BPETokenizer, "unigram": UnigramTokenizer, "wordpiece": WordPieceTokenizer}


def token_to_text(token: bytes) -> str:
    r"""Return the text that stands for a token in a JSON file.

    PAPER: [1] carries file names that are not UTF-8 through Python's text; [2] Section 8.2 lets a JSON string
        hold a lone surrogate, written \uXXXX.
    PAPER CONTEXT: Tokens are bytes, JSON strings are Unicode. GPT-2's files rename every byte to a printable
        letter, so that " the" reads as "Ġthe" and Greek as noise. Base64, as in tiktoken, hides all of it.
    INTUITION: Most tokens are text, so write them as text. Only a byte that is no part of valid UTF-8, as in
        half an emoji, needs another name: byte 0xF0 becomes the lone surrogate U+DCF0, in the file \udcf0.
    IMPLEMENTATION: That is Python's error handler "surrogateescape", both ways.
    WHY: Valid UTF-8 never holds a surrogate, so no two tokens get the same text, and each comes back exactly.
    """
    return token.decode("utf-8", "surrogateescape")


def text_to_token(text: str) -> bytes:
    """Return the token that a text in a JSON file stands for; UnicodeEncodeError if there is none."""
    return text.encode("utf-8", "surrogateescape")


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer, one token or merge to the line; the file is there whole or not at all."""
    kind = next((kind for kind, cls in kinds().items() if type(tokenizer) is cls), None)
    if kind is None:
        raise ValueError(f"tokenizer ({type(tokenizer).__name__}) must be one of {', '.join(kinds())}")
    fields: dict[str, Any] = {"version": VERSION, "kind": kind}
    for name in inspect.signature(type(tokenizer)).parameters:
        value = getattr(tokenizer, name)
        fields[name] = {i: token_to_text(token) for i, token in value.items()} if name == "vocab" else value
    text = ",\n".join(f"{json.dumps(name)}: {_lines(value)}" for name, value in fields.items())
    with atomic_write(path, "wb") as file:
        # The lone surrogates, and nothing else, become \udcXX, which is what JSON wants.
        file.write(f"{{\n{text}\n}}\n".encode("utf-8", "backslashreplace"))


def _lines(value: Any) -> str:
    """Return JSON in which each entry of an outer object or list has its own line."""
    dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    if not value or not isinstance(value, dict | list):
        return dump(value)
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f" {dump(str(key))}: {dump(entry)}" for key, entry in value.items()) + "\n}"
    return "[\n" + ",\n".join(f" {dump(entry)}" for entry in value) + "\n]"


def load_tokenizer(path: str | Path) -> Any:
    """Read a tokenizer that save_tokenizer wrote; ValueError in one line if the file is anything else."""
    fields = read_json(path)
    with naming(path):
        return build_tokenizer(fields)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in front of each ValueError that its content gives."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """Return the tokenizer that a file's content describes, or ValueError."""
    version, kind = fields.pop("version", None), fields.pop("kind", None)
    if version != VERSION or type(version) is not int:
        raise ValueError(f"version ({show(version)}) must be {VERSION}")
    if not isinstance(kind, str) or kind not in kinds():
        raise ValueError(f"kind ({show(kind)}) must be one of {', '.join(kinds())}")
    cls = kinds()[kind]
    names = list(inspect.signature(cls).parameters)
    if set(fields) != set(names):
        raise ValueError(f"fields ({show(sorted(fields))}) must be {', '.join(['version', 'kind', *names])}")
    values = {name: READERS[name](fields[name]) for name in names}
    check_vocab(values["vocab"], values["special_tokens"])
    if "merges" in values:
        check_merges(values["vocab"], values["merges"])
    return cls(**values)


def read_text(path: str | Path) -> str:
    """Read a file of UTF-8; ValueError if it is too long or anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file; make a tokenizer with: {TRAIN_COMMAND}")
    with naming(path):
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"size ({size} bytes) must be at most {MAX_BYTES}")
        content = path.read_bytes()
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} ({content[error.start]:#x}) must be UTF-8") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file of one JSON object; ValueError if it is too long, too deep, ambiguous, or anything else."""
    text = read_text(path)
    with naming(path):
        try:
            fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"content ({error}) must be JSON") from None
        return read_object(fields, "content")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, but not one that says a name twice: readers disagree on which of the two counts."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"name {show(name)} stands twice in one object")
        fields[name] = value
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")  # Python reads NaN and Infinity, which [2] does not know


def read_id(value: Any, name: str) -> int:
    """Return a token id, or ValueError; True and 1.0 are no ids."""
    if type(value) is not int or not 0 <= value < MAX_ID:
        raise ValueError(f"{name} ({show(value)}) must be a whole number from 0 to {MAX_ID - 1}")
    return value


def read_object(value: Any, name: str) -> dict[str, Any]:
    """Return a JSON object, or ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} ({show(value)}) must be an object")
    return value


def read_list(value: Any, name: str) -> list[Any]:
    """Return a JSON list, or ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"{name} ({show(value)}) must be a list")
    return value


def _read_key(key: str, name: str) -> int:
    i = int(key) if key.isdecimal() and len(key) < 10 else -1
    if str(i) != key:  # "007" and "٧" would be 7, a second time
        raise ValueError(f"{name} ({show(key)}) must have ids for names")
    return read_id(i, name)


def _read_vocab(value: Any) -> dict[int, bytes]:
    vocab = {}
    for key, text in read_object(value, "vocab").items():
        i = _read_key(key, "vocab")
        try:
            vocab[i] = text_to_token(text)
        except (AttributeError, UnicodeEncodeError):
            raise ValueError(f"vocab[{key}] ({show(text)}) must be the text of a token") from None
    return vocab


def _read_merges(value: Any) -> list[Merge]:
    merges = []
    for i, merge in enumerate(read_list(value, "merges")):
        if not isinstance(merge, list) or len(merge) != 3:
            raise ValueError(f"merges[{i}] ({show(merge)}) must be [left, right, id]")
        left, right, new = (read_id(part, f"merges[{i}]") for part in merge)
        merges.append((left, right, new))
    return merges


def _read_special_tokens(value: Any) -> dict[str, int]:
    tokens = read_object(value, "special_tokens")
    return {name: read_id(i, f"special_tokens[{show(name)}]") for name, i in tokens.items()}


def _read_pattern(value: Any) -> str:
    if not isinstance(value, str) or value not in PATTERNS:  # a name: a file cannot bring its own regex along
        raise ValueError(f"pattern ({show(value)}) must be one of {', '.join(PATTERNS)}")
    return value


def _read_scores(value: Any) -> dict[int, float]:
    scores = {}
    for key, score in read_object(value, "scores").items():
        if type(score) not in (int, float) or not abs(score) < MAX_SCORE:
            rule = f"must be a number between -{MAX_SCORE} and {MAX_SCORE}"
            raise ValueError(f"scores[{show(key)}] ({show(score)}) {rule}")
        scores[_read_key(key, "scores")] = float(score)
    return scores


def _read_ignore_merges(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"ignore_merges ({show(value)}) must be true or false")
    return value


READERS: Mapping[str, Callable[[Any], Any]] = {
    "vocab": _read_vocab,
    "merges": _read_merges,
    "special_tokens": _read_special_tokens,
    "pattern": _read_pattern,
    "scores": _read_scores,
    "ignore_merges": _read_ignore_merges,
}


def check_vocab(vocab: Mapping[int, bytes], special_tokens: Mapping[str, int]) -> None:
    """Raise ValueError unless each id has one token, no token is empty, and no token has two ids."""
    if not vocab:
        raise ValueError("vocab (empty) must hold a token")
    seen: dict[bytes, int] = {}
    for i, token in vocab.items():
        if not token:
            raise ValueError(f"vocab[{i}] (empty) must have a byte")
        if seen.setdefault(token, i) != i:
            raise ValueError(f"vocab[{i}] ({show(token)}) must differ from vocab[{seen[token]}]")
    names: dict[int, str] = {}
    for name, i in special_tokens.items():
        if not name or not is_text(name):
            raise ValueError(f"special_tokens ({show(name)}) must have text for names")
        if i in vocab or names.setdefault(i, name) != name:
            raise ValueError(f"special_tokens[{show(name)}] ({i}) must be an id that nothing else has")


def check_merges(vocab: Mapping[int, bytes], merges: Iterable[Merge]) -> None:
    """Raise ValueError unless each merge joins two tokens into the token that is exactly both.

    So no merge can lead back to its own parts, for a token is longer than any part of it.
    """
    seen = set()
    for i, (left, right, new) in enumerate(merges):
        for part in (left, right, new):
            if part not in vocab:
                raise ValueError(f"merges[{i}] ({part}) must be an id of vocab")
        if vocab[left] + vocab[right] != vocab[new]:
            rule = f"must make {show(vocab[left] + vocab[right])} of {left} and {right}"
            raise ValueError(f"merges[{i}] ({new}: {show(vocab[new])}) {rule}")
        if (left, right) in seen:
            raise ValueError(f"merges[{i}] ({left}, {right}) must be a pair that no earlier merge has")
        seen.add((left, right))


def is_text(text: str) -> bool:
    """Say whether a string can be written as UTF-8, which one with a lone surrogate cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
