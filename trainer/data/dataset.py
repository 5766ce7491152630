"""Training samples: sample n of a blend of data prefixes, for any n, from megatron-core's GPTDataset.

Sample n depends only on the data, the blend, the sequence length, the seed and n. Since GPTDataset's shuffle depends on
the number of samples requested, each epoch of a prefix is a GPTDataset of its own, of exactly one epoch, with the seed
seed + epoch.

An epoch concatenates the documents of a prefix in shuffled order and cuts them into pieces of `sequence_length` input
tokens; the labels of a piece are its tokens shifted by one. The last 1 to `sequence_length` tokens are not used as
input (the first of them is a label); they are of other documents in the next epoch.

No collective of torch.distributed is used. `build_index` writes the index files of all epochs that a run needs, in one
process; its caller makes the other ranks wait before they read samples. An epoch without index files is built in
memory, with the same result.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from griffin.trainer.data.index_files import Index, make_folder, read_index, write_index
from griffin.trainer.data.prefix import LAST_SEED, DataInfo, check_ids, read_blend

logger = logging.getLogger(__name__)

# Samples in one period of a blend, which then repeats: the blend index stays small, and has no length limit.
BLEND_PERIOD = 2**20
# Documents plus samples from which an epoch's index is stored in files; a smaller index is built in memory in a few ms.
INDEX_FILES_FROM = 2**14
OPEN_EPOCHS = 2


def build_index(
    entries: Sequence[str], *, sequence_length: int, seed: int, samples: int, cache: str | None = None
) -> None:
    """Write the index files that samples 0 ... samples - 1 need. Existing ones are kept; damaged ones are replaced.

    Only one rank may call it, rank 0 if torch.distributed is initialized. Files go to PREFIX.cache/, or to the folder
    `cache`. Each epoch's folder is renamed to its final name when it is complete. If PREFIX.cache/ cannot be written,
    each process builds the index in memory. Raises ValueError like `open_samples`, and if `cache` cannot be written.
    """
    opened = open_samples(entries, sequence_length=sequence_length, seed=seed, cache=cache)
    for part, count in zip(opened._parts, opened._samples_per_part(samples), strict=True):
        if not part.uses_files:
            continue
        try:
            for epoch in range(-(-count // part.samples_per_epoch)):
                part.write_index(epoch)
        except OSError as error:
            if cache is not None:
                raise ValueError(f"index cache {cache!r}: cannot be written ({error})") from error
            logger.warning("%s cannot be written (%s): every process builds its index itself", part.cache, error)


def open_samples(entries: Sequence[str], *, sequence_length: int, seed: int, cache: str | None = None) -> Samples:
    """Open the samples of a blend of "PREFIX" or "WEIGHT PREFIX"; default weights are proportional to tokens.

    Raises ValueError for bad entries, missing or damaged files, different tokenizers, or a prefix with fewer than
    `sequence_length` + 1 tokens.
    """
    return Samples(read_blend(entries), sequence_length=sequence_length, seed=seed, cache=cache)


class Samples(torch.utils.data.Dataset):
    """The endless samples of a blend. It pickles to a small size, to be sent to the workers of a DataLoader.

    samples[n], for n >= 0, is a dict of CPU tensors of length T = sequence_length: `tokens` and `labels` int64,
    `loss_mask` float32 (0 where the input token ends a document, since its label starts another), `positions` int64
    (from 0 at the start of the sample and of each document). Raises ValueError for a token id outside the vocabulary.

    The blend is that of megatron-core, which takes each sample from the prefix that is furthest behind its share. It
    repeats every `BLEND_PERIOD` samples; a period has at least one sample of each prefix.
    """

    def __init__(
        self, blend: Sequence[tuple[float, DataInfo]], *, sequence_length: int, seed: int, cache: str | None
    ) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length {sequence_length}: expected at least 2")
        if not 0 <= seed < LAST_SEED:
            raise ValueError(f"seed {seed}: expected 0 to {LAST_SEED - 1}")
        small = tuple((weight, replace(info, checksums=None)) for weight, info in blend)
        self._arguments = (small, sequence_length, seed, cache)
        self._parts = [_Part(info, sequence_length, seed, cache) for _, info in blend]
        self._source, self._place = _blend_index([weight for weight, _ in blend])
        self._per_period = np.bincount(self._source, minlength=len(blend)).tolist()
        self.tokens = sum(info.tokens for _, info in blend)
        # One pass over every prefix, if the weights are proportional to tokens.
        self.samples_per_epoch = sum(part.samples_per_epoch for part in self._parts)
        self.sequence_length = sequence_length

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        if n < 0:
            raise IndexError(f"sample {n}: samples are numbered from 0")
        period, place = divmod(n, len(self._source))
        source = int(self._source[place])
        return self._parts[source][period * self._per_period[source] + int(self._place[place])]

    def __reduce__(self):
        blend, sequence_length, seed, cache = self._arguments
        return functools.partial(Samples, blend, sequence_length=sequence_length, seed=seed, cache=cache), ()

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per predicted token over the blend; None if unknown for any prefix."""
        blend, *_ = self._arguments
        known = [(weight, info.bytes_per_token) for weight, info in blend]
        return None if any(size is None for _, size in known) else sum(weight * (size or 0.0) for weight, size in known)

    def _samples_per_part(self, samples: int) -> list[int]:
        """The number of the first `samples` samples that come from each part."""
        periods, rest = divmod(samples, len(self._source))
        counts = np.bincount(self._source[:rest], minlength=len(self._parts)).tolist()
        return [periods * full + count for full, count in zip(self._per_period, counts, strict=True)]


def _blend_index(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each position in a period: the part of its sample (int16), and that part's samples before it (int64)."""
    period = BLEND_PERIOD if len(weights) > 1 else 1
    source, place = np.zeros(period, dtype=np.int16), np.zeros(period, dtype=np.int64)
    helpers.build_blending_indices(source, place, np.array(weights, dtype=np.float64), len(weights), period, False)
    return source, place


class _Part:
    """The endless samples of one prefix."""

    def __init__(self, info: DataInfo, sequence_length: int, seed: int, cache: str | None) -> None:
        self.info = info
        self.sequence_length = sequence_length
        self.seed = seed
        self.cache = Path(cache if cache is not None else info.prefix + ".cache")
        self.samples_per_epoch = (info.tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{info.prefix} holds {info.tokens} tokens: a sample of sequence_length {sequence_length} "
                f"needs {sequence_length + 1}"
            )
        self.uses_files = info.documents + self.samples_per_epoch >= INDEX_FILES_FROM
        self._documents = IndexedDataset(info.prefix)
        self._epochs: OrderedDict[int, GPTDataset] = OrderedDict()

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(n, self.samples_per_epoch)
        sample = self._epoch(epoch)[place]
        tokens, labels = sample["tokens"], sample["labels"]
        last = int(labels[-1])
        check_ids(
            min(int(tokens.min()), last),
            max(int(tokens.max()), last),
            self.info.vocabulary,
            f"{self.info.prefix}.bin is damaged: sample {n}",
        )
        positions = sample["position_ids"]
        return {"tokens": tokens, "labels": labels, "loss_mask": sample["loss_mask"], "positions": positions}

    def write_index(self, epoch: int) -> None:
        """Write the index files of an epoch if they are missing or damaged.

        Raises ValueError if they are damaged and cannot be replaced.
        """
        folder = self._folder(epoch)
        damage = self._damage(folder)
        if damage is None:
            return
        assert not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0, "rank 0 builds the index"
        if damage:
            logger.warning("index cache %s is damaged (%s): building it again", folder, damage)
        unfinished = self.cache / f".unfinished-{uuid.uuid4().hex}"
        aside = unfinished.with_name(f"{unfinished.name}-damaged")
        try:
            make_folder(self.cache)
            dataset = self._dataset(epoch)
            write_index(unfinished, (dataset.document_index, dataset.sample_index, dataset.shuffle_index))
            if damage:
                os.rename(folder, aside)
            os.rename(unfinished, folder)
        except OSError as error:
            # Another run may have written them meanwhile, with the same content.
            left = self._damage(folder)
            if left:
                raise ValueError(
                    f"index cache {folder} is damaged ({left}) and cannot be replaced ({error}): remove it, or set "
                    "data.cache to another folder"
                ) from error
            if left is not None:
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)

    def _damage(self, folder: Path) -> str | None:
        """The damage of index files; "" if there are none, None if they are intact."""
        try:
            self._read_index(folder, ranges=True)
        except FileNotFoundError:
            return ""
        except ValueError as error:
            return str(error)
        return None

    def _read_index(self, folder: Path, *, ranges: bool) -> Index:
        return read_index(folder, documents=self.info.documents, samples=self.samples_per_epoch, ranges=ranges)

    def _folder(self, epoch: int) -> Path:
        return self.cache / f"{self.info.sha256[:16]}-length{self.sequence_length}-seed{self.seed + epoch}"

    def _epoch(self, epoch: int) -> GPTDataset:
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        self._epochs[epoch] = self._open(epoch)
        if len(self._epochs) > OPEN_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _open(self, epoch: int) -> GPTDataset:
        if not self.uses_files:
            return self._dataset(epoch)
        folder = self._folder(epoch)
        try:
            return self._dataset(epoch, self._read_index(folder, ranges=False))
        except FileNotFoundError:
            logger.warning("no index files in %s: building the index in memory", folder)
            return self._dataset(epoch)
        except ValueError as error:
            raise ValueError(f"index cache {folder} is damaged ({error}): remove it") from error

    def _dataset(self, epoch: int, index: Index | None = None) -> GPTDataset:
        """A dataset of exactly one epoch, with the given index, or with one built in memory."""
        seed = self.seed + epoch
        if seed > LAST_SEED:
            raise ValueError(f"seed {self.seed} and epoch {epoch} of {self.info.prefix} add up past {LAST_SEED}")
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self.sequence_length,
            blend_per_split=[([self.info.prefix], None), None, None],
            path_to_cache="",
            tokenizer=_DatasetTokenizer(self.info),
            reset_position_ids=True,
            reset_attention_mask=False,
            eod_mask_loss=True,
            create_attention_mask=False,
        )
        documents = np.arange(self.info.documents, dtype=np.int32)
        # Identified by content instead of path: a prefix may be moved, or rebuilt with other content.
        with _without_cache_warning():
            dataset = _Epoch(index, self._documents, self.info.sha256, documents, None, Split.train, config)
        assert len(dataset) == self.samples_per_epoch, (len(dataset), self.samples_per_epoch)
        return dataset


class _Epoch(GPTDataset):
    """GPTDataset with an index that was read already: its own reader would load pickles."""

    def __init__(self, index: Index | None, *args) -> None:
        self._index = index
        super().__init__(*args)

    def _build_document_sample_shuffle_indices(self):
        return self._index if self._index is not None else super()._build_document_sample_shuffle_indices()


class _DatasetTokenizer:
    """The attributes of a tokenizer that GPTDataset uses."""

    # GPTDataset silently replaces and masks the padding id. The default, -1, may occur in damaged data.
    pad = -(2**62)

    def __init__(self, info: DataInfo) -> None:
        self.eod = info.eod
        self.vocab_size = info.vocabulary
        self.unique_identifiers = info.tokenizer


@contextmanager
def _without_cache_warning() -> Iterator[None]:
    """Suppress the warning of GPTDataset, in every epoch, that an index built in memory is not saved."""
    megatron_logger = logging.getLogger("megatron.core.datasets.gpt_dataset")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unable to save")

    megatron_logger.addFilter(keep)
    try:
        yield
    finally:
        megatron_logger.removeFilter(keep)
