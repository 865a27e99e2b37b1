"""Text for language modelling: words as numbers, in three parts.

A folder has train.txt, valid.txt and test.txt (or Penn Treebank's ptb.train.txt, ...): words
between blanks, a sentence a line, `<eos>` after each. The vocabulary is that of all three, as
published. `pydoc` needs no folder: the help texts that come with Python, lower case, `<eos>` after
a paragraph, words that its training part has only once as `<unk>`. Each text is cut: eight tenths
for training, one for validation, one for the test.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rdarts_fast.draws import SITE_ORDER, Draws
from rdarts_fast.errors import UserError

EOS, UNKNOWN = "<eos>", "<unk>"
PARTS = ("train", "valid", "test")
HALF_CHANCE = 0.05  # of a window of half the length
SHORTEST, LONGER, DEVIATION = 5, 20, 5.0  # words: of a window; beyond the usual; published


@dataclass(frozen=True)
class Corpus:
    """A text in three parts; words are places in the vocabulary, int64."""

    name: str
    vocabulary: tuple[str, ...]
    train: Tensor
    valid: Tensor
    test: Tensor
    sha256: str  # of the words, in all

    def unigram_perplexity(self, part: str = "valid") -> float:
        """Return the perplexity of a part under the training part's word counts, one added to
        each.
        """
        size = len(self.vocabulary)
        counts = torch.bincount(self.train, minlength=size).double() + 1.0
        chances = counts / counts.sum()
        return math.exp(-float(chances[getattr(self, part)].log().mean()))


def load_corpus(name: str) -> Corpus:
    """Return the corpus of `--data`: "pydoc", or a folder. Raises UserError."""
    if name == "pydoc":
        return pydoc()
    folder = Path(name.removeprefix("folder:"))
    if not folder.is_dir():
        raise UserError(
            f"data {name}: no such folder; --task language reads pydoc, or a folder with "
            "train.txt, valid.txt and test.txt"
        )
    words = {part: _read(_file(folder, part)) for part in PARTS}
    known = dict.fromkeys(word for part in PARTS for word in words[part])
    return _corpus(folder.name, tuple(known), words)


def pydoc() -> Corpus:
    """Return the help texts of this Python; another version has others (`sha256` tells)."""
    from pydoc_data import topics

    words: dict[str, list[str]] = {part: [] for part in PARTS}
    for _, text in sorted(topics.topics.items()):
        found = _words(text.lower().split("\n\n"))
        cuts = [0, len(found) * 8 // 10, len(found) * 9 // 10, len(found)]
        for i, part in enumerate(PARTS):
            words[part] += found[cuts[i] : cuts[i + 1]]
    counts = Counter(words["train"])
    known = (UNKNOWN, *(word for word, count in counts.items() if count > 1))
    return _corpus("pydoc", known, words)


def _file(folder: Path, part: str) -> Path:
    for name in (f"{part}.txt", f"ptb.{part}.txt"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"data {folder}: no {part}.txt (nor ptb.{part}.txt) there")


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data {path}: not UTF-8 at byte {error.start}") from error
    words = _words(text.splitlines())
    if not words:
        raise UserError(f"data {path}: no words in it")
    return words


def _words(lines: Iterable[str]) -> list[str]:
    found: list[str] = []
    for line in lines:
        words = line.split()
        found += [*words, EOS] if words else []
    return found


def _corpus(name: str, vocabulary: tuple[str, ...], words: dict[str, list[str]]) -> Corpus:
    places = {word: i for i, word in enumerate(vocabulary)}
    unknown = places.get(UNKNOWN, 0)
    parts = [
        torch.tensor([places.get(word, unknown) for word in words[part]], dtype=torch.int64)
        for part in PARTS
    ]
    text = "\n".join(" ".join(words[part]) for part in PARTS)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, vocabulary, parts[0], parts[1], parts[2], digest)


def columns(text: Tensor, count: int, what: str) -> Tensor:
    """Return a text [words] as [T, count]: columns read side by side, the last few words left away.

    Raises UserError where that leaves no word to predict.
    """
    length = len(text) // count
    if length < 2:
        raise UserError(
            f"{what}: {len(text)} words are too few for {count} columns (--batch-size); at least "
            f"{2 * count} are needed"
        )
    return text[: length * count].view(count, length).t().contiguous()


def windows(length: int, size: int) -> list[Tensor]:
    """Return the rows of columns of `length` that have a next, in windows of `size` rows."""
    return list(torch.arange(length - 1).split(size))


def random_windows(
    length: int, size: int, draws: Draws, deviation: float = DEVIATION
) -> list[Tensor]:
    """Return the rows in windows of `size` words, or in one of twenty half as many, their lengths
    normal about that with a deviation; at least 5 and at most 20 more; keyed by draws.step.
    """
    most = length // SHORTEST + 1
    halved = draws.uniform(SITE_ORDER, (most,)) < HALF_CHANCE
    normal = draws.at(pass_index=1).normal(SITE_ORDER, (most,))
    found: list[Tensor] = []
    start = 0
    while start < length - 1:
        i = len(found)
        usual = size / 2 if halved[i] else size
        drawn = int(usual + deviation * float(normal[i]))
        end = min(start + min(max(SHORTEST, drawn), size + LONGER), length - 1)
        found.append(torch.arange(start, end))
        start = end
    return found


def consecutive(found: Sequence[Tensor], count: int, draws: Draws) -> list[Tensor]:
    """Return `count` windows one after another, from a random one on."""
    if count >= len(found):
        return list(found)
    first = int(draws.bits(SITE_ORDER, 1)[0]) % (len(found) - count + 1)
    return list(found[first : first + count])
