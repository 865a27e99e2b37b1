"""Text in three parts: reading, vocabulary, columns, windows, and what is said of bad files."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import pytest
import torch

from rdarts_fast.data import text
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError

TRAIN = " the cat sat \n on the <unk> mat\n"
VALID = "the dog\n"
TEST = "a cat\n"


def folder(path: Path, prefix: str = "") -> Path:
    for part, content in zip(text.PARTS, (TRAIN, VALID, TEST), strict=True):
        (path / f"{prefix}{part}.txt").write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("prefix", ["", "ptb."])
@pytest.mark.parametrize("scheme", ["", "folder:"])
def test_a_folder_as_published(tmp_path: Path, prefix: str, scheme: str) -> None:
    corpus = text.load_corpus(f"{scheme}{folder(tmp_path, prefix)}")
    expected = ("the", "cat", "sat", "<eos>", "on", "<unk>", "mat", "dog", "a")
    assert corpus.vocabulary == expected  # of all three parts, in the order in which words occur
    assert corpus.train.tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 3]
    assert corpus.valid.tolist() == [0, 7, 3] and corpus.test.tolist() == [8, 1, 3]
    assert corpus.train.dtype == torch.int64 and corpus.name == tmp_path.name


def test_the_checksum_is_of_the_words(tmp_path: Path) -> None:
    corpus = text.load_corpus(str(folder(tmp_path)))
    words = "the cat sat <eos> on the <unk> mat <eos>\nthe dog <eos>\na cat <eos>"
    assert corpus.sha256 == hashlib.sha256(words.encode()).hexdigest()
    (tmp_path / "test.txt").write_text("a  cat\n\n")  # the same words
    assert text.load_corpus(str(tmp_path)).sha256 == corpus.sha256
    (tmp_path / "test.txt").write_text("a dog\n")
    assert text.load_corpus(str(tmp_path)).sha256 != corpus.sha256


def test_pydoc_is_the_texts_of_this_python() -> None:
    from pydoc_data import topics

    corpus = text.load_corpus("pydoc")
    again = text.pydoc()
    assert corpus.sha256 == again.sha256 and len(corpus.sha256) == 64
    assert corpus.vocabulary[0] == text.UNKNOWN
    whole = [len(getattr(corpus, part)) for part in text.PARTS]
    plain = sum(len(found.split()) for found in topics.topics.values())
    assert plain < sum(whole) < 1.3 * plain  # with an <eos> a paragraph
    assert sum(whole) > 40_000
    assert abs(whole[0] / sum(whole) - 0.8) < 0.01 and abs(whole[1] / whole[2] - 1.0) < 0.05
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    assert counts[1:].min() >= 2 and counts[0] > 100  # words that occur once are unknown
    for part in (corpus.valid, corpus.test):
        assert 0 < float((part == 0).double().mean()) < 0.2
    assert len(set(corpus.vocabulary)) == len(corpus.vocabulary)


def test_pydocs_parts_are_parts_of_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data import topics

    one = " ".join(["a", "B"] * 40) + "\n\n" + " ".join(["c"] * 19)
    monkeypatch.setattr(topics, "topics", {"z": one, "a": " ".join(["x"] * 9)})
    corpus = text.pydoc()
    words = corpus.vocabulary
    # "a" first: x 9 and <eos>, cut at 8 and 9; then "z": 101 words, cut at 80 and 90.
    assert [words[i] for i in corpus.train[:8]] == ["x"] * 8
    assert [words[i] for i in corpus.train[8:12]] == ["a", "b", "a", "b"]
    assert [words[i] for i in corpus.valid[:2]] == ["x", text.UNKNOWN]
    assert len(corpus.train) == 8 + 80 and len(corpus.valid) == 1 + 10
    assert len(corpus.test) == 1 + 11


def test_the_unigram_perplexity_by_hand(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a a b\n")
    (tmp_path / "valid.txt").write_text("a c\n")
    (tmp_path / "test.txt").write_text("b\n")
    corpus = text.load_corpus(str(tmp_path))
    # counts + 1: a 3, b 2, <eos> 2, c 1, of 8
    logs = [math.log(3 / 8), math.log(1 / 8), math.log(2 / 8)]
    assert corpus.unigram_perplexity() == pytest.approx(math.exp(-sum(logs) / 3), rel=1e-12)
    logs = [math.log(2 / 8), math.log(2 / 8)]
    assert corpus.unigram_perplexity("test") == pytest.approx(math.exp(-sum(logs) / 2), rel=1e-12)


def test_columns_are_read_side_by_side() -> None:
    found = text.columns(torch.arange(11), 3, "data x, train")
    assert found.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # 9 and 10 are left away
    assert found.is_contiguous()
    with pytest.raises(UserError, match="data x, train: 7 words are too few for 4 columns"):
        text.columns(torch.arange(7), 4, "data x, train")


def test_windows_have_each_word_that_has_a_next() -> None:
    found = text.windows(12, 5)
    assert [rows.tolist() for rows in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]


def test_random_windows_have_each_word_once_and_the_published_lengths() -> None:
    size, length = 35, 400_000
    found = text.random_windows(length, size, Draws(5))
    assert torch.equal(torch.cat(found), torch.arange(length - 1))
    lengths = torch.tensor([len(rows) for rows in found[:-1]]).double()
    assert lengths.min() >= text.SHORTEST and lengths.max() <= size + text.LONGER
    short = lengths < 17.5 + 10
    assert abs(float(short.double().mean()) - (0.05 + 0.95 * 0.07)) < 0.02
    # A drawn length is cut to whole words: half a word less in the mean.
    assert abs(float(lengths.mean()) - (0.95 * 35 + 0.05 * 17.5 - 0.5)) < 0.3
    usual = lengths[lengths > 25]
    assert abs(float(usual.median()) - 34.5) < 1.0


def test_random_windows_are_functions_of_the_draws() -> None:
    first = text.random_windows(3000, 35, Draws(5, step=2))
    again = text.random_windows(3000, 35, Draws(5, step=2))
    other = text.random_windows(3000, 35, Draws(5, step=3))
    assert list(map(len, first)) == list(map(len, again)) != list(map(len, other))


@pytest.mark.parametrize("length", [2, 5, 6, 7, 41])
def test_short_columns_have_windows_too(length: int) -> None:
    found = text.random_windows(length, 35, Draws(0))
    assert torch.equal(torch.cat(found), torch.arange(length - 1))


def test_consecutive_windows() -> None:
    found = text.windows(100, 7)
    starts = set()
    for step in range(60):
        some = text.consecutive(found, 3, Draws(0, step=step))
        rows = torch.cat(some)
        assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[-1]) + 1)) and len(some) == 3
        starts.add(int(rows[0]))
    assert len(starts) == len(found) - 2
    assert text.consecutive(found, 99, Draws(0)) == found


def test_what_is_said_of_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; --task language reads pydoc, or a"):
        text.load_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no train.txt \(nor ptb.train.txt\) there"):
        text.load_corpus(str(tmp_path))
    folder(tmp_path)
    (tmp_path / "valid.txt").write_bytes(b"good words\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"valid.txt: not UTF-8 at byte 11"):
        text.load_corpus(str(tmp_path))
    (tmp_path / "valid.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"valid.txt: no words in it"):
        text.load_corpus(str(tmp_path))
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"no valid.txt \(nor ptb.valid.txt\) there"):
        text.load_corpus(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "test.txt").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        text.load_corpus(str(tmp_path))
