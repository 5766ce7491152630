"""`griffin logits`: the logits of a checkpoint's model for given tokens, to compare models by."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from griffin.tools.generate import add_model_arguments

if TYPE_CHECKING:
    from griffin.parallel.ranks import Ranks
    from griffin.tools.inference import Checkpoint

SLICE_ELEMENTS = 2**24  # logits that are computed at a time


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "logits",
        help="write a model's logits for tokens of a file",
        description="Write the logits of CHECKPOINT's model for the rows of FILE, integers [B, T], each a document, as "
        "float32 [B, T, V]. Under torchrun, srun or mpiexec this process is one of the tensor ranks.",
    )
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE.npy", help="token ids, integers [B, T]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="file to make; must not exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from griffin.tools.inference import Checkpoint, run_on_ranks

    checkpoint = Checkpoint.find(args)
    tokens = _read(args.tokens, checkpoint.manifest.model.vocabulary)
    size = tokens.size * checkpoint.manifest.model.vocabulary * 4
    _check_target(args.out, size)
    return run_on_ranks(write_logits, checkpoint.tensor, (checkpoint, tokens, args.out))


def _read(path: Path, vocabulary: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"--tokens {path}: no such file")
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"--tokens {path}: not a .npy file of numbers ({error})") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise ValueError(f"--tokens {path}: holds {found}; must be integers [B, T], neither 0")
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
        raise ValueError(f"--out {path}: must be in a folder that is there; {folder} is not")
    if (free := shutil.disk_usage(folder).free) < size:
        raise ValueError(f"--out {path}: needs {size:,} bytes; {free:,} are free on its disk")


def write_logits(ranks: Ranks | None, checkpoint: Checkpoint, tokens: np.ndarray, out: Path) -> None:
    """What each rank does; rank 0 writes. On any failure, `out` is not there."""
    import torch

    from griffin.tools.inference import loaded

    with loaded(checkpoint, ranks) as model, torch.inference_mode():
        shape = (*tokens.shape, model.config.vocabulary)
        with _new_array(out, shape) if model.grid.is_first_rank else _nothing() as values:
            steps = max(1, SLICE_ELEMENTS // model.config.vocabulary)
            for row, ids in enumerate(torch.from_numpy(tokens).to(model.grid.device)):
                positions = torch.arange(len(ids), device=ids.device)
                x = model.stage.hidden({"tokens": ids[None], "positions": positions[None]})
                for first in range(0, len(ids), steps):
                    logits = model.gathered(model.stage.head(x[first : first + steps]))
                    if values is not None:
                        values[row, first : first + steps] = logits[:, 0].cpu().numpy()


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _new_array(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A float32 array in a new file, which gets its name in the end."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        values = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
        yield values
        values.flush()
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
