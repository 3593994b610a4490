r"""The weights in a GGUF file: where they lie, how 32 of them share a scale, and how such a file is written.

PAPERS
  [1] GGUF (docs/gguf.md of github.com/ggml-org/ggml), Gerganov and contributors, 2023
  [2] LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, Dettmers et al., 2022,
      arXiv:2208.07339
  [3] 8-bit Optimizers via Block-wise Quantization, Dettmers et al., 2021, arXiv:2110.02861

SYMBOLS
  d  scale of a block    m  its smallest value    q  whole numbers that stand for its weights
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.files import atomic_write
from phase1_foundation.project2_tokenizer.gguf_metadata import ARRAY, SCALARS, STRING, Head, read_facts
from phase1_foundation.project2_tokenizer.token_file import naming

Bytes = NDArray[np.uint8]  # (blocks, bytes of a block)
Floats = NDArray[np.float32]
ALIGNMENT = 32  # bytes; where each tensor begins, unless the file says otherwise
MAX_DIMS = 4
SINGLE: dict[type, int] = {
    bool: 7,
    int: 4,
    float: 6,
    str: STRING,
}  # types of [1]: bool, uint32, float32, string
LISTED = SINGLE | {int: 5}  # int32, or llama.cpp refuses the list of the tokens' types


def from_f16(blocks: Bytes) -> Floats:
    """Return 16-bit floats with 5 bits of exponent: values up to 65504, about 3 decimal digits."""
    return blocks.view(np.float16).astype(np.float32)


def from_bf16(blocks: Bytes) -> Floats:
    """Return 16-bit floats with 8 bits of exponent: the upper half of a 32-bit float."""
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def from_q8_0(blocks: Bytes) -> Floats:
    """Return the weights of blocks of 34 bytes: a 16-bit scale, then 32 whole numbers from -128 to 127.

    PAPER: [3] Sec. 2.1 (blocks with a scale each); the layout is llama.cpp's, named in [1].
    PAPER CONTEXT: One scale for a whole matrix must fit its largest weight, and leaves nothing for the many
        small ones; [2] finds features up to 20 times larger than the others. [3] cuts tensors into blocks.
    INTUITION: Each 32 neighbours share a ruler whose last mark is the largest of them.
    IMPLEMENTATION: weight = d * q. The scale costs 16 bits for 32 weights: 8.5 bits per weight.
    WHY: No weight is off by more than d / 2, with d = largest / 127, which a test checks; d itself is
        rounded too.
    """
    return from_f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def from_q4_0(blocks: Bytes) -> Floats:
    """Return the weights of blocks of 18 bytes: scale d and 32 halves of bytes; weight = d * (q - 8)."""
    return from_f16(blocks[:, :2]) * (_halves(blocks[:, 2:]) - np.float32(8))


def from_q4_1(blocks: Bytes) -> Floats:
    """Return the weights of blocks of 20 bytes.

    Scale d, smallest m, 32 halves of bytes; weight = d * q + m.
    """
    return from_f16(blocks[:, :2]) * _halves(blocks[:, 4:]) + from_f16(blocks[:, 2:4])


def _halves(packed: Bytes) -> Floats:
    """Return the lower halves of 16 bytes, which are the weights 0 to 15, then the upper ones, 16 to 31."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def to_bf16(x: Floats) -> Bytes:
    """Return the nearest 16-bit floats with 8 bits of exponent, of two equally near ones the even one."""
    return torch.from_numpy(x).bfloat16().view(torch.uint8).numpy()


def to_q8_0(x: Floats) -> Bytes:
    """Return (N, 32) weights as N blocks of 34 bytes: the scale is the largest / 127."""
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = x * np.where(d == 0, 0, 1 / d).astype(np.float32)
    q = np.copysign(
        np.floor(np.abs(scaled) + np.float32(0.5)), scaled
    )  # halves away from zero, as C's roundf
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=1)


class Kind(NamedTuple):
    """A way to write numbers."""

    number: int  # by which a file names it
    weights: int  # in a block
    size: int  # bytes of a block
    read: Callable[[Bytes], Floats] | None  # None: the gguf library does it
    write: Callable[[Floats], Bytes] | None = None


KINDS = {
    "f32": Kind(0, 1, 4, lambda blocks: blocks.view(np.float32), lambda x: x.view(np.uint8)),
    "f16": Kind(1, 1, 2, from_f16, lambda x: x.astype(np.float16).view(np.uint8)),
    "bf16": Kind(30, 1, 2, from_bf16, to_bf16),
    "q8_0": Kind(8, 32, 34, from_q8_0, to_q8_0),
    "q4_0": Kind(2, 32, 18, from_q4_0),
    "q4_1": Kind(3, 32, 20, from_q4_1),
    "q5_0": Kind(6, 32, 22, None),
    "q5_1": Kind(7, 32, 24, None),
    "q2_k": Kind(10, 256, 84, None),
    "q3_k": Kind(11, 256, 110, None),
    "q4_k": Kind(12, 256, 144, None),
    "q5_k": Kind(13, 256, 176, None),
    "q6_k": Kind(14, 256, 210, None),
}
BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What the head of a file says of a tensor."""

    shape: tuple[int, ...]  # as torch has it; the file says it the other way round
    kind: str
    begin: int  # first byte in the file
    size: int  # bytes


class GGUFFile:
    r"""A GGUF file: its facts, and its tensors, each read when it is asked for.

    PAPER: [1] "File Structure": facts, then name, shape, kind and offset of each tensor, then their bytes.
    PAPER CONTEXT: Checkpoints used to be pickles: to load one was to run whatever code its author had put in.
        GGUF, like safetensors, holds numbers and names only, and its tensors can be mapped, not read.
    INTUITION: A table of contents, then the pages. Nothing of the pages is touched before a name is looked
        up.
    IMPLEMENTATION: The first size of [1] is the one that varies fastest, torch's last. Every place is checked
        against the end of the file before anything is mapped. Kinds that KINDS has no reader for are decoded
        by the gguf library; a test holds ours to it, bit for bit.
    WHY: A file that was cut short would else give zeros or a crash; here it is one line of error.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with naming(path), open(path, "rb") as file:
            head = Head(file, size)
            count, self.facts = read_facts(head)
            unplaced = [_read_info(head) for _ in range(count)]  # the end of the file ends a false count
            alignment = self.facts.get("general.alignment", ALIGNMENT)
            if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment % 8:
                raise ValueError(f"general.alignment ({alignment}) must be a multiple of 8 up to 65536")
            start = -(-file.tell() // alignment) * alignment
            self.tensors: dict[str, TensorInfo] = {}
            for name, shape, kind, offset in unplaced:
                info = TensorInfo(shape, kind, start + offset, _bytes_of(name, shape, kind))
                if name in self.tensors:
                    raise ValueError(f"tensor ({name}) must stand once")
                if offset % alignment or info.begin + info.size > size:
                    where = f"bytes {info.begin} to {info.begin + info.size}"
                    raise ValueError(
                        f"{name} ({where}) must be aligned and lie within the file's {size}: cut short?"
                    )
                self.tensors[name] = info

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32."""
        info = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, info.size, offset=info.begin)
        kind = KINDS[info.kind]
        blocks = raw.reshape(-1, kind.size)
        if kind.read:
            weights = kind.read(blocks)
        else:
            from gguf import GGMLQuantizationType, dequantize  # here: most files do without

            weights = dequantize(blocks, GGMLQuantizationType(kind.number))
        return torch.from_numpy(weights).view(info.shape)


def _read_info(head: Head) -> tuple[str, tuple[int, ...], str, int]:
    """Return name, shape, kind and offset of the next tensor."""
    name = head.name()
    (dims,) = head.unpack("I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(f"{name} ({dims} sizes) must have 1 to {MAX_DIMS}")
    *sizes, number, offset = head.unpack(f"{dims}QIQ", name)
    if number not in BY_NUMBER:
        raise ValueError(f"{name} (kind {number}) must be one of {', '.join(KINDS)}")
    return name, tuple(reversed(sizes)), BY_NUMBER[number], offset


def _bytes_of(name: str, shape: tuple[int, ...], kind: str) -> int:
    _, weights, size, *_ = KINDS[kind]
    if min(shape) < 1 or shape[-1] % weights:
        raise ValueError(f"{name} (shape {shape}) must have rows of a multiple of {weights} for {kind}")
    return math.prod(shape) // weights * size


def write_gguf(
    path: str | Path, facts: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor, str]]
) -> None:
    """Write a GGUF file of facts and of (name, tensor, kind) each.

    A whole number becomes uint32 (int32 in a list), a float float32; a list has the type of its first value.
    """
    blocks, infos, offset = [], b"", 0
    for name, tensor, kind in tensors:
        writer = KINDS[kind].write
        if writer is None:
            able = ", ".join(kind for kind, how in KINDS.items() if how.write)
            raise ValueError(f"kind ({kind}) must be one of {able} to be written")
        size = _bytes_of(name, tuple(tensor.shape), kind)
        blocks.append((tensor, kind, size))
        sizes = tuple(reversed(tensor.shape))
        infos += _string(name) + struct.pack(
            f"<I{len(sizes)}QIQ", len(sizes), *sizes, KINDS[kind].number, offset
        )
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    with atomic_write(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(blocks), len(facts)))
        for name, value in facts.items():
            file.write(_string(name) + _typed(value))
        file.write(infos)
        for tensor, kind, _ in blocks:
            _pad(file)
            writer = KINDS[kind].write
            rows = tensor.detach().float().cpu().contiguous().numpy().reshape(-1, KINDS[kind].weights)
            file.write(writer(rows).tobytes())  # type: ignore[misc]
        _pad(file)


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _typed(value: Any) -> bytes:
    """Return a fact's type and value as a file has them."""
    if isinstance(value, list):
        kind = LISTED[type(value[0])]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_plain(item, kind) for item in value)
    return struct.pack("<I", SINGLE[type(value)]) + _plain(value, SINGLE[type(value)])


def _plain(value: Any, kind: int) -> bytes:
    return _string(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)
