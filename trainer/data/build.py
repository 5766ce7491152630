"""Building data sets from text, in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack

import numpy as np
from tqdm import tqdm

from griffin.trainer.data.documents import (
    DEFAULT_GLOBS,
    Encoded,
    EncodeOptions,
    cut_into_tasks,
    encode,
    find_sources,
)
from griffin.trainer.data.prefix import DataInfo, PrefixWriter, require_new
from griffin.trainer.data.tokenizer import load_tokenizer

TASKS_PER_WORKER = 3  # pending at a time: keeps workers busy and bounds memory


def build(
    prefix: str,
    inputs: Sequence[str],
    *,
    tokenizer: str,
    eod: str | None = None,
    workers: int = 1,
    globs: Sequence[str] = DEFAULT_GLOBS,
    exclude: Sequence[str] = (),
    text_key: str = "text",
    hold_out: float = 0.0,
    hold_out_prefix: str | None = None,
) -> list[DataInfo]:
    """Write PREFIX.bin, .idx and .json from the documents of `inputs`, each followed by the end-of-document token.

    A text file is a document, and so is each line of a .jsonl, .jsonl.gz or .jsonl.zst file. The result does not depend
    on `workers`. A fraction `hold_out` of the documents, chosen by a hash of their relative path (and line), goes to
    `hold_out_prefix` instead. Documents without a token are skipped and counted, and so are files that are not UTF-8,
    unless `inputs` names them.

    Returns the written data sets: one, or two with a hold-out. Raises ValueError for existing output, missing or
    unreadable input, invalid JSON, or no documents; nothing that looks like a data set is left then.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: expected at least 1")
    if (hold_out != 0) != (hold_out_prefix is not None):
        raise ValueError("--hold-out FRACTION and --hold-out-prefix PREFIX go together")
    if not 0 <= hold_out < 1:
        raise ValueError(f"--hold-out {hold_out}: expected a fraction between 0 and 1")
    prefixes = [prefix] if hold_out_prefix is None else [prefix, hold_out_prefix]
    if len({os.path.realpath(one) for one in prefixes}) < len(prefixes):
        raise ValueError(f"--hold-out-prefix {hold_out_prefix}: must differ from the prefix itself")
    for one in prefixes:
        require_new(one)
    loaded = load_tokenizer(tokenizer, eod)
    sources = find_sources(inputs, globs, exclude)
    if not sources:
        raise ValueError(f"no documents: no file in {', '.join(inputs)} matches {', '.join(globs)}")

    options = EncodeOptions(tokenizer=tokenizer, eod=eod, text_key=text_key, hold_out=hold_out)
    total = sum(source.path.stat().st_size for source in sources)
    empty = undecodable = 0
    with ExitStack() as stack:
        writers = []
        for one in prefixes:
            writers.append(PrefixWriter(one, loaded.describe(), loaded.spec, eod))
            stack.callback(writers[-1].discard)
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc=prefix, disable=None))
        for encoded in encode_in_order(cut_into_tasks(sources), options, workers):
            documents = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths.size else []
            for ids, text_bytes, held_out in zip(documents, encoded.text_bytes, encoded.held_out, strict=True):
                writers[int(held_out)].add(ids, int(text_bytes))
            empty += encoded.empty
            undecodable += encoded.undecodable
            bar.update(encoded.progress)
        for writer in writers:
            if not writer.documents:
                raise ValueError(
                    f"{writer.prefix}: no documents ({sum(w.documents for w in writers)} read in all, "
                    f"{empty} without text and {undecodable} files that are not UTF-8 skipped)"
                )
        infos = [writer.finish(inputs, empty=empty, undecodable=undecodable) for writer in writers]
        for writer in reversed(writers):  # the training set's PREFIX.json comes last
            writer.publish()
    return infos


def encode_in_order(tasks: Iterator, options: EncodeOptions, workers: int) -> Iterator[Encoded]:
    """Encode tasks in worker processes, a bounded number at a time. Yields results in the order of the tasks."""
    if workers == 1:
        for task in tasks:
            yield encode(task, options)
        return
    # Spawned, not forked: this process may have threads.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending: deque[Future[Encoded]] = deque()
        for task in tasks:
            pending.append(pool.submit(encode, task, options))
            if len(pending) >= workers * TASKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
