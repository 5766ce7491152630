"""Small data sets for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from griffin.trainer.data.prefix import PrefixWriter


def write_prefix(
    prefix: str | Path, documents: Iterable[Sequence[int]], *, vocabulary: int = 100, eod: int = 99
) -> str:
    """A prefix of documents given as token ids without their end-of-document token."""
    description = {"kind": "test", "vocabulary": vocabulary, "eod": eod, "sha256": None}
    writer = PrefixWriter(str(prefix), description, "test", None)
    for ids in documents:
        writer.add(np.array([*ids, eod]))
    writer.finish(["test"])
    writer.publish()
    return str(prefix)
