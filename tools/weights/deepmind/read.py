"""Convert weights of DeepMind's RecurrentGemma code to a checkpoint."""

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
    """Write the model in a torch.save file, or in an orbax folder, to the new step folder `target`.

    Every weight keeps its bits, unless rounded to `dtype`. For an orbax folder, `workers` must be this process alone.
    Raises ValueError, and CheckpointError naming what is missing or damaged; nothing is left then.
    """
    refuse_target(target)
    auxiliary = _tokenizer_files(tokenizer)
    file = open_orbax_folder(source) if source.is_dir() else open_torch_file(source)
    model = model_of_shapes(str(source), file.shapes, file.flax, options)
    tensors = model_tensors(model)
    places = {tensor.name: deepmind_place(tensor.name, len(tensor.shape), file.flax) for tensor in tensors}
    expected = {name: axes.foreign_shape(tensor.shape) for tensor in tensors for name, axes in (places[tensor.name],)}
    expected[EMBEDDING] = file.shapes[EMBEDDING]  # some rows may be padding
    require_tensors(source, file.shapes, expected)
    arrays = {tensor.name: file.array(*places[tensor.name], tensor) for tensor in tensors}
    write_imported(source, target, model, arrays, workers, dtype=dtype, auxiliary=auxiliary)


def _tokenizer_files(tokenizer: Path | None) -> Mapping[str, Path]:
    """Return the files to copy from a folder, or a single tokenizer file, by their new names."""
    if tokenizer is None:
        return {}
    if tokenizer.is_file() and tokenizer.suffix in (".model", ".json"):
        if tokenizer.suffix == ".model":
            sentencepiece_ids(tokenizer)  # raises unless it is a SentencePiece model
        else:
            read_object(tokenizer)
        return {TOKENIZER_MODEL if tokenizer.suffix == ".model" else TOKENIZER_JSON: tokenizer}
    files = find_files(tokenizer)
    files.pop(CONFIG, None)  # that of another model
    if not any(name in TOKENIZER_FILES for name in files):
        raise ValueError(
            f"--tokenizer {tokenizer}: must be a SentencePiece model (.model), a Hugging Face tokenizer file (.json), "
            f"or a folder with one of {', '.join(TOKENIZER_FILES)}"
        )
    return files
