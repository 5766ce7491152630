"""Checksums of blocks of a data set's files, which locate damage."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import google_crc32c

BLOCK_BYTES = 2**22
SAMPLED_BLOCKS = 64  # verified at every start, of a file that is too large to be verified completely
DIGITS = 8  # hexadecimal digits of a checksum


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """crc32c of each block of `block_bytes` bytes of PREFIX.bin and PREFIX.idx: eight hexadecimal digits per block."""

    block_bytes: int
    bin: str
    idx: str

    def __post_init__(self) -> None:
        if type(self.block_bytes) is not int or self.block_bytes < 1:
            raise ValueError(f"block_bytes {self.block_bytes!r}: expected a positive integer")
        for digits in (self.bin, self.idx):
            if type(digits) is not str or len(digits) % DIGITS or set(digits) - set("0123456789abcdef"):
                raise ValueError(f"checksums: expected {DIGITS} hexadecimal digits per block")


class BlockChecksums:
    """Computes the checksums of a file's blocks incrementally."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._crc = self._filled = 0

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            part = view[: BLOCK_BYTES - self._filled]
            self._crc = google_crc32c.extend(self._crc, bytes(part))
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._end_block()

    def hexdigits(self) -> str:
        """The checksums of all blocks; the last block may be short. Call it once, at the end."""
        if self._filled:
            self._end_block()
        return "".join(self._done)

    def _end_block(self) -> None:
        self._done.append(f"{self._crc:0{DIGITS}x}")
        self._crc = self._filled = 0


def checksums_of_file(path: str) -> str:
    """The block checksums of a file, as `BlockChecksums.hexdigits` returns them."""
    checksums = BlockChecksums()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksums.update(block)
    return checksums.hexdigits()


def sampled(blocks: int, seed: int) -> list[int]:
    """Random numbers of up to `SAMPLED_BLOCKS` blocks, including the first and the last; the same for the same seed."""
    if blocks <= SAMPLED_BLOCKS:
        return list(range(blocks))
    inner = random.Random(seed).sample(range(1, blocks - 1), SAMPLED_BLOCKS - 2)
    return [0, *sorted(inner), blocks - 1]


def differences(path: str, digits: str, block_bytes: int, numbers: Iterable[int]) -> Iterator[str]:
    """A message for each of the blocks `numbers` that differs from its checksum."""
    with open(path, "rb") as file:
        for number in numbers:
            start = number * block_bytes
            file.seek(start)
            block = file.read(block_bytes)
            if f"{google_crc32c.value(block):0{DIGITS}x}" != digits[number * DIGITS : (number + 1) * DIGITS]:
                yield f"{path} is damaged: bytes {start} to {start + len(block) - 1} are not what was built"
