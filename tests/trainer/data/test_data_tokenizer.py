"""Tokenizers: round trips, end-of-document tokens, and refusals."""

import hashlib
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from griffin.trainer.data.tokenizer import load_tokenizer

TEXT = "def f(x):\n    return x + 1  # naïve café 日本語 \r\n\tend"
CORPUS = [TEXT, "hello world, hello tokens", "the cat sat on the mat", "import os, sys; print(os.name)"] * 20


def train_bpe(path, special="<|endoftext|>"):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    # Left in a published file, these would cut and fill documents.
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(path))
    return backend


def train_sentencepiece(prefix, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=300, byte_fallback=True,
        character_coverage=1.0, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
        **options,
    )  # fmt: skip


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    assert tokenizer.decode([*ids.tolist(), 256]) == TEXT
    assert (tokenizer.vocabulary, tokenizer.eod) == (257, 256)
    assert tokenizer.describe() == {"kind": "bytes", "vocabulary": 257, "eod": 256, "sha256": None}
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"


def test_hugging_face(tmp_path):
    path = tmp_path / "tokenizer.json"
    backend = train_bpe(path)
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert len(ids) > 16  # neither truncated nor padded
    assert tokenizer.decode([*ids.tolist(), tokenizer.eod]) == TEXT
    assert tokenizer.eod == backend.token_to_id("<|endoftext|>")
    assert tokenizer.vocabulary == backend.get_vocab_size()
    description = json.loads(json.dumps(tokenizer.describe()))
    assert description["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert description["kind"] == "huggingface"


def test_a_special_token_named_in_a_text_is_text(tmp_path):
    train_bpe(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "a<|endoftext|>b"
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text


def test_sentencepiece(tmp_path):
    train_sentencepiece(tmp_path / "sp")
    tokenizer = load_tokenizer(str(tmp_path / "sp.model"))
    text = "the cat sat </s> on the naïve 日本語 mat"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode([*ids.tolist(), tokenizer.eod]) == text
    assert tokenizer.eod not in ids
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocabulary == 300
    backend = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    assert tokenizer.eod == backend.eos_id() == backend.piece_to_id("</s>")
    assert tokenizer.describe()["sha256"] == hashlib.sha256((tmp_path / "sp.model").read_bytes()).hexdigest()


def test_eod_by_name(tmp_path):
    backend = train_bpe(tmp_path / "tokenizer.json", special="[STOP]")
    with pytest.raises(ValueError, match=r"none of <\|endoftext\|>, .*</s>.* is in its vocabulary.*--eod TOKEN"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"--eod \[END\]: tokenizer .*tokenizer.json has no such token"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), eod="[END]")
    assert load_tokenizer(str(tmp_path / "tokenizer.json"), eod="[STOP]").eod == backend.token_to_id("[STOP]")


def test_eod_by_name_in_sentencepiece(tmp_path):
    train_sentencepiece(tmp_path / "sp", eos_id=-1, control_symbols=["<stop>"])
    with pytest.raises(ValueError, match="--eod TOKEN"):
        load_tokenizer(str(tmp_path / "sp.model"))
    with pytest.raises(ValueError, match="--eod <none>"):
        load_tokenizer(str(tmp_path / "sp.model"), eod="<none>")
    backend = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    assert load_tokenizer(str(tmp_path / "sp.model"), eod="<stop>").eod == backend.piece_to_id("<stop>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no such file"),
        ("tokenizer.txt", b"x", 'expected "bytes", a Hugging Face tokenizer file'),
        ("tokenizer.json", b'{"model": 3}', "not a Hugging Face tokenizer file"),
        ("sp.model", b"garbage", "not a SentencePiece model"),
    ],
)
def test_refusals(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(tmp_path / name))
    assert name in str(caught.value)


def test_bytes_has_its_own_eod():
    with pytest.raises(ValueError, match="--eod </s>"):
        load_tokenizer("bytes", eod="</s>")
