"""The copy of the data's tokenizer in a run folder, with which its checkpoints can be used without the data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from griffin.trainer.data.prefix import DataInfo, parse_blend, read_description
from griffin.trainer.data.tokenizer import MOST_FILE_BYTES, Tokenizer, load_tokenizer
from griffin.trainer.files import parse_json, read_regular
from griffin.trainer.run.folder import RunFolder

FORMAT = "griffin-tokenizer-1"
DESCRIPTION = "description.json"
_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}  # kind -> name of the file


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The content of description.json, which describes the file beside it."""

    tokenizer: dict[str, Any]  # as `Tokenizer.describe`
    eod_token: str | None  # --eod of the data's build
    copied_from: str
    data: list[str]  # prefixes built with it, as data.train names them


def copy_tokenizer(run: RunFolder, entries: Sequence[str]) -> str | None:
    """Copy the tokenizer of a run's data to its folder, unless it has no file or there is a copy already.

    Returns a warning if the folder does not hold this tokenizer afterwards, or None. Files that cannot be read or
    written raise nothing, since training needs no tokenizer.
    """
    try:
        prefixes = [prefix for _, prefix in parse_blend(entries)]
        info = read_description(prefixes[0])
        if info.tokenizer.get("kind") not in _NAMES:
            return None  # bytes need no file
        if not run.tokenizer.exists():
            _copy(info, prefixes, run.tokenizer)
        elif _read(run.tokenizer).tokenizer != info.tokenizer:
            return f"Tokenizer: {run.tokenizer} holds another one than that of the data; it is left as it is"
    except (OSError, ValueError) as error:
        return f"Tokenizer: not copied to the run folder ({error})"
    return None


def find_tokenizer(step: Path, entries: Sequence[str]) -> Tokenizer:
    """The tokenizer of the data that a checkpoint was trained on, or the copy in its run folder if its file is gone.

    Args:
        step: the checkpoint's folder, checkpoints/step-N of a run.
        entries: data.train of its config.

    Raises ValueError or OSError if the data's tokenizer cannot be loaded and there is no copy, and ValueError if the
    copy is damaged or is another tokenizer.
    """
    prefix, info = parse_blend(entries)[0][1], None
    try:
        info = read_description(prefix)
        return info.load_tokenizer()
    except (OSError, ValueError) as error:
        root = step.absolute().parent
        run = RunFolder(root.parent)
        if run.checkpoints != root or not run.tokenizer.exists():
            raise
        copy = _read(run.tokenizer)
        if info.tokenizer != copy.tokenizer if info is not None else prefix not in copy.data:
            raise ValueError(f"{error}; and {run.tokenizer} is not known to be the one of data {prefix!r}") from None
    path = run.tokenizer / _NAMES[copy.tokenizer["kind"]]
    found = load_tokenizer(str(path), copy.eod_token)
    if found.describe() != copy.tokenizer:
        raise ValueError(f"{path} is not the tokenizer that {DESCRIPTION} beside it describes")
    return found


def _copy(info: DataInfo, prefixes: list[str], folder: Path) -> None:
    """Create `folder` atomically. ValueError or OSError if the tokenizer's file is gone or has changed."""
    content = read_regular(info.tokenizer_spec, MOST_FILE_BYTES)
    if hashlib.sha256(content).hexdigest() != info.tokenizer["sha256"]:
        raise ValueError(f"{info.tokenizer_spec} is not the tokenizer that {info.prefix} was built with")
    description = _Description(
        tokenizer=info.tokenizer, eod_token=info.eod_token, copied_from=info.tokenizer_spec, data=prefixes
    )
    text = json.dumps({"format": FORMAT, **asdict(description)}, indent=2) + "\n"
    unfinished = folder.with_name(f".{folder.name}.unfinished.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        (unfinished / _NAMES[info.tokenizer["kind"]]).write_bytes(content)
        (unfinished / DESCRIPTION).write_text(text, encoding="utf-8")
        os.rename(unfinished, folder)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished)


def _read(folder: Path) -> _Description:
    """Read the description of a copy. ValueError if it is missing or damaged."""
    path = folder / DESCRIPTION
    try:
        record = parse_json(read_regular(path))
        if record.pop("format") != FORMAT:
            raise ValueError(f'"format" is not {FORMAT!r}')
        found = _Description(**record)
        if found.tokenizer["kind"] not in _NAMES or not isinstance(found.data, list):
            raise ValueError(f"kind must be one of {', '.join(_NAMES)}, and data a list")
        if not isinstance(found.eod_token, str | None):
            raise ValueError("eod_token must be a string or null")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    return found
