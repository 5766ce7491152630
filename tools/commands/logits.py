"""`griffin logits`: write the logits of a checkpoint's model for given tokens, for evaluation and comparison."""

from __future__ import annotations

import argparse
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from griffin.tools.commands.generate import add_model_arguments
from griffin.trainer.checkpoint.zarr_io import naming, synchronise
from griffin.trainer.files import is_integer, open_regular

if TYPE_CHECKING:
    from griffin.parallel.world.ranks import Ranks
    from griffin.tools.inference.model import InferenceCheckpoint

SLICE_ELEMENTS = 2**24  # logits computed at a time
_MOST_TOKENS = 2**40
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "logits",
        help="write a model's logits for the tokens of a file",
        description="Write the logits of CHECKPOINT's model for the rows of FILE, integers [B, T], each a document, as "
        "float32 [B, T, V]. Under torchrun, srun or mpiexec this process is one of the tensor ranks.",
    )
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE.npy", help="token ids, integers [B, T]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="file to create; must not exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from griffin.tools.inference.model import InferenceCheckpoint, run_on_ranks

    checkpoint = InferenceCheckpoint.find(args.checkpoint, args.tensor, args.dtype)
    tokens = read_tokens(args.tokens, checkpoint.manifest.model.vocabulary)
    _check_target(args.out, tokens.size * checkpoint.manifest.model.vocabulary * 4)
    with _temporary_file(args.out) as file:
        return run_on_ranks(write_logits, checkpoint.tensor, (checkpoint, tokens, file, args.out))


class _ShapeError(ValueError):
    """The file holds an array, but not of tokens."""


def read_tokens(path: Path, vocabulary: int) -> np.ndarray:
    if not path.exists():
        raise ValueError(f"--tokens {path}: no such file")
    try:
        with open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"its version {version} is not supported")
            shape, in_columns, dtype = _HEADERS[version](file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            sizes_fit = len(shape) == 2 and all(is_integer(size, 1, _MOST_TOKENS) for size in shape)
            if not sizes_fit or dtype.kind not in "iu":
                raise _ShapeError(f"--tokens {path}: holds {dtype} {list(shape)}; must be integers [B, T], not empty")
            # Compared before allocating as much memory.
            size, found = math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size - file.tell()
            if found != size:
                raise ValueError(f"it has {found:,} bytes of values instead of {size:,}")
            tokens = np.frombuffer(file.read(size), dtype).reshape(shape, order="F" if in_columns else "C")
    except _ShapeError:
        raise
    except Exception as error:  # numpy evaluates the header as Python, which raises anything
        why = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise ValueError(f"--tokens {path}: not a .npy file of numbers ({why})") from None
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"--tokens {path}: holds {wrong}; the model's tokens are 0 to {vocabulary - 1}")
    return tokens.astype(np.int64)


def _check_target(path: Path, size: int) -> None:
    if path.exists() or path.is_symlink():
        raise ValueError(f"--out {path}: exists, and is not overwritten")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out {path}: must be in a folder that exists; {folder} does not")
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"--out {path}: needs {size:,} bytes; its disk has {free:,} free")


@contextmanager
def _temporary_file(out: Path) -> Iterator[Path]:
    """Create a file beside `out`; removed at exit unless renamed, however the ranks ended."""
    file = out.with_name(f".{secrets.token_hex(8)}.tmp")
    with naming(file):
        file.touch(exist_ok=False)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def write_logits(
    ranks: Ranks | None, checkpoint: InferenceCheckpoint, tokens: np.ndarray, file: Path, out: Path
) -> None:
    """Compute logits on one rank; rank 0 writes `file`, and renames it to `out` when it is complete."""
    import torch

    from griffin.tools.inference.model import open_model

    with open_model(checkpoint, ranks) as model, torch.inference_mode():
        vocabulary, writes = model.config.vocabulary, model.grid.is_first_rank
        steps = max(1, SLICE_ELEMENTS // vocabulary)
        with naming(file), open(file if writes else os.devnull, "wb") as stream:
            described = {"descr": "<f4", "fortran_order": False, "shape": (*tokens.shape, vocabulary)}
            np.lib.format.write_array_header_1_0(stream, described)
            for ids in torch.from_numpy(tokens).to(model.grid.device):
                positions = torch.arange(len(ids), device=ids.device)
                x = model.stage.hidden({"tokens": ids[None], "positions": positions[None]})
                for some in x.split(steps):
                    logits = model.all_gather_logits(model.stage.head(some))
                    if writes:
                        stream.write(logits.cpu().numpy().tobytes())
            stream.flush()
        if writes:
            synchronise(file)
            _check_target(out, 0)
            file.rename(out)
