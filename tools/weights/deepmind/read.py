"""Weights of DeepMind's RecurrentGemma code as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from griffin.tools.checkpoints.auxiliary_files import (
    CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    find_files,
    read_object,
)
from griffin.tools.checkpoints.write import refuse_target
from griffin.tools.common.workers import Workers
from griffin.tools.weights.deepmind.files import open_orbax_folder, open_torch_file
from griffin.tools.weights.deepmind.names import EMBEDDING, ModelOptions, deepmind_place, model_of_shapes
from griffin.tools.weights.imported import model_tensors, require_tensors, write_imported
from griffin.tools.weights.tokenizer import sentencepiece_ids


def convert_deepmind(
    source: Path,
    target: Path,
    workers: Workers,
    options: ModelOptions,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write the model of a file of torch.save, or of an orbax folder, to the new step folder `target`.

    Every weight keeps its bits, or is rounded to `dtype`. `workers` are to be this process alone for a folder. Raises
    ValueError, and CheckpointError naming what is missing or damaged; then nothing is left.
    """
    refuse_target(target)
    auxiliary = _tokenizer_files(tokenizer)
    opened = open_orbax_folder(source) if source.is_dir() else open_torch_file(source)
    model = model_of_shapes(str(source), opened.shapes, opened.flax, options)
    tensors = model_tensors(model)
    places = {tensor.name: deepmind_place(tensor.name, len(tensor.shape), opened.flax) for tensor in tensors}
    expected = {name: axes.foreign_shape(tensor.shape) for tensor in tensors for name, axes in (places[tensor.name],)}
    expected[EMBEDDING] = opened.shapes[EMBEDDING]  # of whose rows some may be padding
    require_tensors(source, opened.shapes, expected)
    arrays = {tensor.name: opened.array(*places[tensor.name], tensor) for tensor in tensors}
    write_imported(source, target, model, arrays, workers, dtype=dtype, auxiliary=auxiliary)


def _tokenizer_files(tokenizer: Path | None) -> Mapping[str, Path]:
    """Those of a folder, or a file by the name that it gets."""
    if tokenizer is None:
        return {}
    if tokenizer.is_file() and tokenizer.suffix in (".model", ".json"):
        if tokenizer.suffix == ".model":
            sentencepiece_ids(tokenizer)  # refuses what is none
        else:
            read_object(tokenizer)
        return {TOKENIZER_MODEL if tokenizer.suffix == ".model" else TOKENIZER_JSON: tokenizer}
    files = find_files(tokenizer)
    files.pop(CONFIG, None)  # of another checkpoint
    if not any(name in TOKENIZER_FILES for name in files):
        raise ValueError(
            f"--tokenizer {tokenizer}: must be a SentencePiece model (.model), a Hugging Face tokenizer file (.json), "
            f"or a folder with one of {', '.join(TOKENIZER_FILES)}"
        )
    return files
