"""Documents: sources and splits, tokens by hand and against the tokenizer, what is kept, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from postgrad.core import documents
from postgrad.core.config import DataConfig
from postgrad.core.documents import Corpus, list_documents, load_corpus, open_corpus, read_document, tokenizer_hash
from postgrad.core.runtime import Job
from postgrad.core.text import byte_tokenizer
from postgrad.errors import ArtefactError, DataError, TemplateError

END = 260


def job(folder: Path, seed: int = 0) -> Job:
    """A job that prints nothing."""
    return Job("pretrain", folder, seed, torch.device("cpu"), torch.float32, 0, 1, True)


def load(folder: Path, path: Path | str, seed: int = 0, column: str = "text", **more: object) -> Corpus:
    """Tokenise into bytes."""
    return load_corpus(replace(DataConfig(path=str(path)), **more), column, byte_tokenizer(), job(folder, seed))


def text_of(tokens: np.ndarray) -> list[str]:
    """Give the documents that a stream of bytes spells."""
    parts = bytes(int(token) if token < 256 else 0 for token in tokens).decode().split("\0")
    assert parts[-1] == "" and set(tokens[tokens >= 256]) <= {END}
    return parts[:-1]


def test_a_text_file_by_hand(tmp_path: Path) -> None:
    """Ten lines of two bytes and a tenth held out: the stream ends after line 9; both parts are closed."""
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(10)))
    corpus = load(tmp_path, tmp_path / "a.txt")
    assert corpus.train.tokens.tolist() == [*b"0\n1\n2\n3\n4\n5\n6\n7\n8\n", END]
    assert corpus.held.tokens.tolist() == [*b"9\n", END]
    assert (corpus.train.num_documents, corpus.train.num_bytes, corpus.held.num_bytes) == (1, 18, 2)
    assert corpus.train.tokens.dtype == np.uint16


def test_nothing_is_held_out_of_a_share_of_zero(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    corpus = load(tmp_path, tmp_path / "a.txt", held_out=0.0)
    assert text_of(corpus.train.tokens) == ["abc"] and len(corpus.held.tokens) == 0


def test_documents_are_held_out_by_their_text(tmp_path: Path) -> None:
    """A share of twenty files; the same ones wherever they stand, others with another seed."""
    found = []
    for place, seed in (("x", 0), ("y", 0), ("x", 1)):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        for i in range(20):
            name = f"{i:02}" if place == "x" else f"{19 - i:02}"
            (folder / f"{name}.md").write_text(f"text {i}")
        corpus = load(tmp_path / f"run-{place}-{seed}", folder, seed, held_out=0.2)
        train, held = text_of(corpus.train.tokens), text_of(corpus.held.tokens)
        assert len(train) == 16 and len(held) == 4 and not {*train} & {*held}
        found.append({*held})
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("files", "train", "held"),
    [
        ({"train/a.txt": "a", "validation/b.txt": "b"}, ["a"], ["b"]),
        ({"train.txt": "a", "valid.txt": "b", "test.txt": "c"}, ["a"], ["b"]),
        ({"one.txt": "a", "deep/two.md": "b", "dev.md": "c", "three.rst": "d"}, ["b", "a"], ["c"]),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, files: dict[str, str], train: list[str], held: list[str]) -> None:
    """Files and first folders may be called after splits."""
    for name, text in files.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    corpus = load(tmp_path, tmp_path / "texts")
    assert (text_of(corpus.train.tokens), text_of(corpus.held.tokens)) == (train, held)


def test_splits_of_tables(tmp_path: Path) -> None:
    """A column `split`, files called after splits, and neither."""
    rows = [{"split": name, "body": text} for name, text in (("train", "a"), ("validation", "b"), ("test", "c"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "body": "d"}]))
    corpus = load(tmp_path / "1", tmp_path / "rows.jsonl", column="body")
    assert (text_of(corpus.train.tokens), text_of(corpus.held.tokens)) == (["a", "d"], ["b"])
    assert text_of(load(tmp_path / "2", tmp_path / "rows.jsonl", column="body", limit=1).train.tokens) == ["a"]
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, text in (("train-0", "e"), ("validation-0", "f")):
        pq.write_table(pa.table({"text": [text, ""]}), folder / f"{name}.parquet")
    corpus = load(tmp_path / "3", folder)
    assert (text_of(corpus.train.tokens), text_of(corpus.held.tokens)) == (["e"], ["f"])
    (tmp_path / "plain.csv").write_text("text\none\ntwo\n")
    corpus = load(tmp_path / "4", tmp_path / "plain.csv")
    assert {*text_of(corpus.train.tokens), *text_of(corpus.held.tokens)} == {"one", "two"}


def test_a_saved_data_set_with_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    corpus = load(tmp_path, tmp_path / "saved")
    assert (text_of(corpus.train.tokens), text_of(corpus.held.tokens)) == (["train"], ["validation"])


def test_the_built_in_text_is_pythons_library() -> None:
    train, held = list_documents(DataConfig(), "text")
    texts = list(map(read_document, train))
    assert len(texts) > 50 and not held
    assert 10**6 < sum(map(len, texts)) < 10**7 and sum("import" in text for text in texts) > 40


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=5))
def test_no_text_is_lost(texts: list[str]) -> None:
    """Pieces and chunks of a few characters spell the documents again, each closed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 7)
        patch.setattr(documents, "CHUNK", 11)
        pieces = [piece for chunk in documents._chunks(texts) for piece in chunk]
    assert "".join(text + "\0" * ends for text, ends in pieces) == "".join(text + "\0" for text in texts)
    assert all(len(text) <= 7 for text, _ in pieces)


def test_many_pieces_become_the_tokens_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes know no neighbours: cutting a text changes no token."""
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(300)))
    whole = load(tmp_path / "1", tmp_path / "a.txt").train.tokens.tolist()
    monkeypatch.setattr(documents, "PIECE", 50)
    monkeypatch.setattr(documents, "CHUNK", 120)
    assert load(tmp_path / "2", tmp_path / "a.txt").train.tokens.tolist() == whole


def test_a_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|end|>")
    tokenizer = byte_tokenizer()
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.txt"), held_out=0.0), "text", tokenizer, job(tmp_path))
    assert corpus.train.tokens.tolist() == [*b"<|end|>", END]
    assert tokenizer.encode("<|end|>") == [END]


def test_word_pieces_are_the_tokenizers_own(tmp_path: Path) -> None:
    """A trained BPE with 70,000 ids needs four bytes a token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(["low lower lowest newer wider"] * 5, trainer)
    backend.add_tokens([f"<filler {i}>" for i in range(70000)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    (tmp_path / "a.txt").write_text("lower and lowest <eos>")
    corpus = load_corpus(DataConfig(path=str(tmp_path / "a.txt"), held_out=0.0), "text", tokenizer, job(tmp_path))
    ids = corpus.train.tokens.tolist()
    assert corpus.train.tokens.dtype == np.uint32 and ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == 1
    backend.encode_special_tokens = True
    assert ids[:-1] == backend.encode("lower and lowest <eos>").ids


def test_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text is found again; another is tokenised anew, or refused once steps were taken with it."""
    path = tmp_path / "a.txt"
    path.write_text("one text")
    load(tmp_path, path)
    before = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    load(tmp_path, path)
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == before
    path.write_text("another text")
    assert "".join(text_of(load(tmp_path, path, held_out=0.0).train.tokens)) == "another text"
    (tmp_path / "below" / "checkpoints" / "step-00000001").mkdir(parents=True)
    load(tmp_path, path, held_out=0.0)
    path.write_text("a third text")
    with pytest.raises(ArtefactError, match=r"found another: .*a\.txt has changed\. Bring it back"):
        load(tmp_path, path, held_out=0.0)


def test_damaged_tokens_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    whole = load(tmp_path, tmp_path / "a.txt").train.tokens.tolist()
    file = tmp_path / "tokens" / "train.bin"
    file.write_bytes(b"\1\0" * len(whole))
    assert load(tmp_path, tmp_path / "a.txt").train.tokens.tolist() == whole
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ArtefactError, match=r"train\.bin: expected \d+ tokens, \d+ bytes, found \d+ bytes\. Delete"):
        open_corpus(tmp_path / "tokens", byte_tokenizer())
    (tmp_path / "tokens" / "tokens.json").write_text("[]")
    with pytest.raises(ArtefactError, match="expected the manifest of tokens"):
        open_corpus(tmp_path / "tokens", byte_tokenizer())


def test_tokens_of_another_run_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    made = load(tmp_path / "first", tmp_path / "a.txt")
    for path in (tmp_path / "first", tmp_path / "first" / "tokens"):
        found = load(tmp_path / "second", path, seed=5)
        assert found.train.tokens.tolist() == made.train.tokens.tolist()
    assert not (tmp_path / "second").exists()
    other = byte_tokenizer()
    other.eos_token = other.pad_token
    assert tokenizer_hash(other) != tokenizer_hash(byte_tokenizer())
    with pytest.raises(ArtefactError, match="expected tokens of the model's tokenizer, found another's"):
        open_corpus(tmp_path / "first" / "tokens", other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt: expected UTF-8 text, found byte 3 that is not\. Convert it"),
        ("a.jsonl", b'{"body": "x"}\n', r"expected text in column 'text', found no such column among body"),
        ("a.jsonl", b'{"text": 5}\n', r"expected text in column 'text', found int"),
        ("a.jsonl", b'{"text": ""}\n', r"expected texts to train on, found none of split 'train'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"half a surrogate pair"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path, tmp_path / name)
    with pytest.raises(DataError, match=r"no .*nowhere"):
        load(tmp_path, tmp_path / "nowhere.txt")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="end-of-sequence token"):
        load_corpus(DataConfig(path=str(tmp_path / "a.txt")), "text", tokenizer, job(tmp_path))
