"""Training samples: sample n of a blend of data prefixes, for any n, from megatron-core's GPTDataset.

Sample n depends on the data, the blend, the sequence length, the seed and n. GPTDataset's shuffle depends on the number
of samples asked for, so each epoch of a prefix is a GPTDataset of its own, of exactly one epoch, seeded with
seed + epoch.

An epoch lays the documents of a prefix end to end in a shuffled order and cuts them into pieces of `sequence_length`
input tokens; each piece's labels are its tokens shifted by one. The 1 to `sequence_length` tokens left at the end are
no input (the first of them is a label); other documents land there in the next epoch.

No collective of torch.distributed is used. `build_index` writes the index files of all the epochs that a run needs, in
one process; whoever calls it makes the other ranks wait before they draw samples. An epoch without index files is built
in memory, with the same result.
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

# Samples in one period of a blend, which then starts over: the blend index stays small and needs no length.
BLEND_PERIOD = 2**20
# Documents plus samples from which an epoch's index is kept in files; a smaller one is built in memory in a few ms.
INDEX_FILES_FROM = 2**14
OPEN_EPOCHS = 2


def build_index(
    entries: Sequence[str], *, sequence_length: int, seed: int, samples: int, cache: str | None = None
) -> None:
    """Writes the index files that samples 0 ... samples - 1 need; those already there are kept, and
    damaged ones written again.

    To be called by one rank, which must be rank 0 where torch.distributed is initialised. Files go to PREFIX.cache/, or
    to the folder `cache`. Each epoch's folder appears under its name once it is complete. Where PREFIX.cache/ cannot be
    written the index is left to be built in memory. Raises ValueError as `open_samples`, or if `cache` cannot be
    written.
    """
    opened = open_samples(entries, sequence_length=sequence_length, seed=seed, cache=cache)
    for part, drawn in zip(opened._parts, opened._drawn(samples), strict=True):
        if not part.uses_files:
            continue
        try:
            for epoch in range(-(-drawn // part.samples_per_epoch)):
                part.write_index(epoch)
        except OSError as error:
            if cache is not None:
                raise ValueError(f"index cache {cache!r}: cannot be written ({error})") from error
            logger.warning("%s cannot be written (%s): every process builds its index itself", part.cache, error)


def open_samples(entries: Sequence[str], *, sequence_length: int, seed: int, cache: str | None = None) -> Samples:
    """Samples of a blend: `entries` are "PREFIX" or "WEIGHT PREFIX", weights by default proportional to tokens.

    Raises ValueError for bad entries, missing or damaged files, different tokenizers, or a prefix with fewer than
    `sequence_length` + 1 tokens.
    """
    return Samples(read_blend(entries), sequence_length=sequence_length, seed=seed, cache=cache)


class Samples(torch.utils.data.Dataset):
    """Endless samples of a blend. Pickles small, so that it can be sent to the workers of a DataLoader.

    samples[n], for n >= 0, is a dict of CPU tensors of length T = sequence_length: `tokens` and `labels` int64,
    `loss_mask` float32 (0 where the input token ends a document, as its label starts another), `positions` int64
    (from 0 at the start of the sample and of each document). Raises ValueError for a token id outside the vocabulary.

    A blend follows megatron-core's greedy blending, which takes each sample from the prefix furthest behind its share.
    It starts over every `BLEND_PERIOD` samples; a period has at least one sample of each prefix.
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
        # One pass over every prefix, where the weights are proportional to tokens.
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
        """Bytes of text of a predicted token, in the mean over the blend; None where not known of every prefix."""
        blend, *_ = self._arguments
        known = [(weight, info.bytes_per_token) for weight, info in blend]
        return None if any(size is None for _, size in known) else sum(weight * (size or 0.0) for weight, size in known)

    def _drawn(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each part."""
        periods, rest = divmod(samples, len(self._source))
        counts = np.bincount(self._source[:rest], minlength=len(self._parts)).tolist()
        return [periods * full + count for full, count in zip(self._per_period, counts, strict=True)]


def _blend_index(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a period: the part to draw from (int16), and how many it gave before in this period (int64)."""
    period = BLEND_PERIOD if len(weights) > 1 else 1
    source, place = np.zeros(period, dtype=np.int16), np.zeros(period, dtype=np.int64)
    helpers.build_blending_indices(source, place, np.array(weights, dtype=np.float64), len(weights), period, False)
    return source, place


class _Part:
    """Endless samples of one prefix."""

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
        """Writes the index files of an epoch, if they are not there, or are damaged.

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
            # Another run may have been first, with the same content.
            left = self._damage(folder)
            if left:
                raise ValueError(
                    f"index cache {folder} is damaged ({left}) and cannot be replaced ({error}): remove it, or state "
                    "another folder as data.cache"
                ) from error
            if left is not None:
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with index files; "" where there are none, None where they are whole."""
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
        """Exactly one epoch, with the index given, or one built in memory."""
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
        # The content stands for the path: a prefix may be moved, or rebuilt with other content.
        with _without_cache_warning():
            dataset = _Epoch(index, self._documents, self.info.sha256, documents, None, Split.train, config)
        assert len(dataset) == self.samples_per_epoch, (len(dataset), self.samples_per_epoch)
        return dataset


class _Epoch(GPTDataset):
    """GPTDataset with an index that was read before: its own reader runs what a pickle says."""

    def __init__(self, index: Index | None, *args) -> None:
        self._index = index
        super().__init__(*args)

    def _build_document_sample_shuffle_indices(self):
        return self._index if self._index is not None else super()._build_document_sample_shuffle_indices()


class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer."""

    # GPTDataset silently replaces and masks the padding id, -1 by default, which damaged data may contain.
    pad = -(2**62)

    def __init__(self, info: DataInfo) -> None:
        self.eod = info.eod
        self.vocab_size = info.vocabulary
        self.unique_identifiers = info.tokenizer


@contextmanager
def _without_cache_warning() -> Iterator[None]:
    """Keeps GPTDataset from warning, at every epoch, that an index built in memory is not saved."""
    megatron_logger = logging.getLogger("megatron.core.datasets.gpt_dataset")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unable to save")

    megatron_logger.addFilter(keep)
    try:
        yield
    finally:
        megatron_logger.removeFilter(keep)
