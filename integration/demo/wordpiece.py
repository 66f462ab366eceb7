"""WordPiece over BERT's uncased vocabulary: enough of it to feed plain sentences to MiniLM."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

_WORDS = re.compile(r"\w+|[^\w\s]")
_LONGEST_WORD = 100


class Tokenizer:
    """Sentences to token ids.

    Attributes:
        mask_id: The id of `[MASK]`.
        size: How many tokens the vocabulary has.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._ids = {token: index for index, token in enumerate(vocabulary)}
        self.mask_id = self._ids["[MASK]"]
        self.size = len(vocabulary)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a `vocab.txt`: one token a line, its id is its line."""
        return cls(path.read_text(encoding="utf-8").splitlines())

    def encode(self, sentence: str) -> list[int]:
        """Return the ids of a sentence between `[CLS]` and `[SEP]`."""
        pieces = [piece for word in _split_words(sentence) for piece in self._split_pieces(word)]
        return [self._ids[token] for token in ("[CLS]", *pieces, "[SEP]")]

    def encode_batch(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return one row of ids a sentence, padded on the right with `[PAD]` (id 0) to one length."""
        rows = [self.encode(sentence) for sentence in sentences]
        width = max(map(len, rows))
        return [row + [0] * (width - len(row)) for row in rows]

    def _split_pieces(self, word: str) -> list[str]:
        """Cut a word greedily into the longest pieces that the vocabulary has."""
        pieces: list[str] = []
        start = 0
        while start < len(word) <= _LONGEST_WORD:
            piece = next(self._candidates(word, start), None)
            if piece is None:
                return ["[UNK]"]
            pieces.append(piece)
            start += len(piece.removeprefix("##")) if start else len(piece)
        return pieces or ["[UNK]"]

    def _candidates(self, word: str, start: int) -> Iterator[str]:
        prefix = "##" if start else ""
        pieces = (prefix + word[start:end] for end in range(len(word), start, -1))
        return (piece for piece in pieces if piece in self._ids)


def _split_words(sentence: str) -> list[str]:
    decomposed = unicodedata.normalize("NFD", sentence.lower())
    plain = "".join(char for char in decomposed if unicodedata.category(char) != "Mn")
    return _WORDS.findall(plain)
