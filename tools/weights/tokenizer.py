"""What goes along with exported weights: the tokenizer, token ids, and other settings of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from griffin.tools.checkpoints.auxiliary_files import (
    CONFIG,
    SOURCE_FOLDER,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    find_files,
    read_object,
    tokenizer_text,
)
from griffin.tools.checkpoints.sources import SourceCheckpoint
from griffin.trainer.data.prefix import parse_blend, read_description
from griffin.trainer.data.tokenizer import BYTES, MOST_FILE_BYTES, Tokenizer
from griffin.trainer.files import read_regular
from griffin.trainer.run.tokenizer_copy import find_tokenizer

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class AuxiliaryFiles:
    """Files beside the weights, and what config.json has besides the model's own settings."""

    config: Mapping[str, Any]
    text: str  # what was found, for people
    files: Mapping[str, Path] = field(default_factory=dict)  # to copy, by the names that they get
    written: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # to write as JSON, by their names


def find_auxiliary_files(source: SourceCheckpoint, tokenizer: Path | None) -> AuxiliaryFiles:
    """Of a checkpoint: those of `tokenizer`, a folder; or its own; or its training data's tokenizer.

    Raises ValueError where `tokenizer` holds none.
    """
    carried = source.path / SOURCE_FOLDER
    files = find_files(tokenizer or carried)
    if tokenizer is not None and not any(name in TOKENIZER_FILES for name in files):
        raise ValueError(f"--tokenizer {tokenizer}: must be a folder with one of {', '.join(TOKENIZER_FILES)}")
    if tokenizer is None and not carried.is_dir():
        return _of_training(source)
    config: dict[str, Any] = read_object(carried / CONFIG) if (carried / CONFIG).is_file() else {}
    config |= dict.fromkeys(_IDS)  # those of the tokenizer, whose folder it may be that says them
    if CONFIG in files:
        theirs = read_object(files[CONFIG])
        config |= {key: theirs[key] for key in _IDS if key in theirs}
    elif TOKENIZER_MODEL in files:
        config |= sentencepiece_ids(files[TOKENIZER_MODEL])
    files.pop(CONFIG, None)
    return AuxiliaryFiles(config, tokenizer_text(files), files)


def sentencepiece_ids(path: Path) -> dict[str, int | None]:
    """The token ids that a SentencePiece model has of its own. Raises ValueError where it is none."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=read_regular(path, MOST_FILE_BYTES))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": model.pad_id()}
    return {name: number if number >= 0 else None for name, number in ids.items()}


def _of_training(source: SourceCheckpoint) -> AuxiliaryFiles:
    """Of the data that the checkpoint was trained on, or of the copy in its run's folder, as far as they are there."""
    ids: dict[str, Any] = dict.fromkeys(_IDS)
    entries = source.manifest.config["data"]["train"]
    if not entries:
        return AuxiliaryFiles(ids, "no tokenizer: none is known of this checkpoint")
    try:
        tokenizer = find_tokenizer(source.path, entries)
    except ValueError as error:
        with suppress(ValueError):  # the data may know the id without the file
            ids["eos_token_id"] = read_description(parse_blend(entries)[0][1]).eod
        return AuxiliaryFiles(ids, f"no tokenizer: {error}")
    ids["eos_token_id"] = tokenizer.eod
    if tokenizer.spec == BYTES:
        return AuxiliaryFiles(ids, "no tokenizer: the model was trained on bytes")
    return _of_file(tokenizer, ids)


def _of_file(tokenizer: Tokenizer, ids: dict[str, Any]) -> AuxiliaryFiles:
    """The file of a data set's tokenizer."""
    path = Path(tokenizer.spec)
    if path.suffix == ".model":
        return AuxiliaryFiles(ids, f"tokenizer files: {TOKENIZER_MODEL} ({path})", files={TOKENIZER_MODEL: path})
    from tokenizers import Tokenizer as Backend

    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": Backend.from_file(str(path)).id_to_token(tokenizer.eod),
    }
    written = {"tokenizer_config.json": described}
    text = f"tokenizer files: {TOKENIZER_JSON} ({path}), {', '.join(written)}"
    return AuxiliaryFiles(ids, text, files={TOKENIZER_JSON: path}, written=written)
