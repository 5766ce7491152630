"""What goes along with exported weights: the tokenizer, token ids, and other settings of where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from griffin.tools.carried_files import (
    CONFIG,
    SOURCE,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    files_of,
    read_object,
    tokenizer_text,
)
from griffin.tools.stored_arrays import Source
from griffin.trainer.data.prefix import DataInfo, parse_blend, read_description
from griffin.trainer.data.tokenizer import BYTES, MOST_FILE_BYTES
from griffin.trainer.files import read_regular

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Companions:
    """Files beside the weights, and what config.json has besides the model's own settings."""

    config: Mapping[str, Any]
    text: str  # what was found, for people
    files: Mapping[str, Path] = field(default_factory=dict)  # to copy, by the names that they get
    written: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # to write as JSON, by their names


def find_companions(source: Source, tokenizer: Path | None) -> Companions:
    """Of a checkpoint: those of `tokenizer`, a folder; or its own; or its training data's tokenizer.

    Raises ValueError where `tokenizer` holds none.
    """
    carried = source.path / SOURCE
    files = files_of(tokenizer or carried)
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
    return Companions(config, tokenizer_text(files), files)


def sentencepiece_ids(path: Path) -> dict[str, int | None]:
    """The token ids that a SentencePiece model has of its own. Raises ValueError where it is none."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=read_regular(path, MOST_FILE_BYTES))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from None
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": model.pad_id()}
    return {name: number if number >= 0 else None for name, number in ids.items()}


def _of_training(source: Source) -> Companions:
    """Of the data that the checkpoint was trained on, as far as they are still there."""
    ids: dict[str, Any] = dict.fromkeys(_IDS)
    entries = source.manifest.config["data"]["train"]
    if not entries:
        return Companions(ids, "no tokenizer: none is known of this checkpoint")
    try:
        info = read_description(parse_blend(entries)[0][1])
    except ValueError as error:
        return Companions(ids, f"no tokenizer: {error}")
    ids["eos_token_id"] = info.eod
    if info.tokenizer_spec == BYTES:
        return Companions(ids, "no tokenizer: the model was trained on bytes")
    try:
        return _of_file(info, ids)
    except ValueError as error:
        return Companions(ids, f"no tokenizer: {error}")


def _of_file(info: DataInfo, ids: dict[str, Any]) -> Companions:
    """The tokenizer's file of a data set. Raises ValueError if it is gone or is another one now."""
    info.load_tokenizer()
    path = Path(info.tokenizer_spec)
    if path.suffix == ".model":
        return Companions(ids, f"tokenizer files: {TOKENIZER_MODEL} ({path})", files={TOKENIZER_MODEL: path})
    from tokenizers import Tokenizer

    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": Tokenizer.from_file(str(path)).id_to_token(info.eod),
    }
    written = {"tokenizer_config.json": described}
    text = f"tokenizer files: {TOKENIZER_JSON} ({path}), {', '.join(written)}"
    return Companions(ids, text, files={TOKENIZER_JSON: path}, written=written)
