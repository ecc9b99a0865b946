"""SentencePiece BPE: merges the characters of a text by the scores of its vocabulary.

The rule (Kudo and Richardson, 2018, arXiv:1808.06226, as in llama.cpp): of all neighbouring
pairs whose concatenation is a token, join the one with the best score, the leftmost of equals,
until none is left; a character that is no token becomes its UTF-8 bytes.

A table of pairwise merges, as the `tokenizers` package wants it, cannot say this: one token can
be joined from several pairs, which then compete by position and not by rank. Hence the queue
here. It runs on short pieces: a text is first cut wherever no token reaches across, which no
merge could undo, and the results of pieces are remembered.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pykvq.errors import TokenizerError
from pykvq.vocab import TokenKind, Vocab

_CACHE_ENTRIES = 1 << 16
_CACHE_PIECE_CHARS = 64


class SpmEncoder:
    """Turns text whose spaces are already written as U+2581 into token ids."""

    def __init__(self, vocab: Vocab, scores: npt.NDArray[np.floating[Any]]) -> None:
        """Prepares the lookup tables.

        Args:
            vocab: the vocabulary.
            scores: [n_vocab], finite; the higher the earlier a token is merged.

        Raises:
            TokenizerError: characters outside of the vocabulary could not be written, since
                byte tokens are missing and there is no unknown token either.
        """
        # These have spellings that must not arise from plain text.
        reserved = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.BYTE, TokenKind.UNUSED)
        self._ids = {t: i for t, i in vocab.ids.items() if vocab.kinds[i] not in reserved}
        # Ranks instead of scores: small integers compare fast, and equal scores stay equal.
        self._ranks: list[int] = np.unique(-scores, return_inverse=True)[1].tolist()
        self._max_chars = max(map(len, self._ids), default=0)
        # Every pair of neighbouring characters that lies inside of some token.
        self._inner = {a + b for text in self._ids for a, b in pairwise(text)}
        self._byte_ids = [vocab.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._unk = vocab.unk
        if self._unk is None and None in self._byte_ids:
            raise TokenizerError(
                f"The vocabulary has no token <0x{self._byte_ids.index(None):02X}> and no unknown "
                "token either, expected one of them for text outside of the vocabulary."
            )
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in O(n log n) of its length at worst."""
        inner = self._inner
        cuts = [i for i, (a, b) in enumerate(pairwise(text), 1) if a + b not in inner]
        ids: list[int] = []
        start = 0
        for end in (*cuts, len(text)):
            ids += self._piece(text[start:end])
            start = end
        return ids

    def _piece(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._merge(text)
            if len(text) <= _CACHE_PIECE_CHARS:
                if len(self._cache) >= _CACHE_ENTRIES:
                    self._cache.clear()
                self._cache[text] = ids
        return ids

    def _merge(self, text: str) -> list[int]:
        n = len(text)
        # A symbol is a run of characters, named by where it starts; n names the end of the text.
        # follower[s] is where the next symbol starts, or 0 where no symbol starts at s any more.
        follower = [*range(1, n + 1), n]
        leader = [*range(-1, n)]
        # A candidate is one integer: rank, then start, then length of the merged symbol. The
        # length shows whether one of its two symbols has changed since it was queued.
        base = n + 1
        queue: list[int] = []

        def candidate(start: int, end: int) -> int:
            """The queue entry of the symbols over text[start:end], or -1 if they make no token."""
            if end - start > self._max_chars:
                return -1
            token = self._ids.get(text[start:end])
            return -1 if token is None else (self._ranks[token] * base + start) * base + end - start

        for start in range(n - 1):
            entry = candidate(start, start + 2)
            if entry >= 0:
                queue.append(entry)
        heapq.heapify(queue)

        while queue:
            left, length = divmod(heapq.heappop(queue), base)
            left %= base
            right = follower[left]
            end = follower[right]
            if right in (0, n) or end - left != length:
                continue
            follower[left] = end
            follower[right] = 0
            leader[end] = left
            if left > 0:
                entry = candidate(leader[left], end)
                if entry >= 0:
                    heapq.heappush(queue, entry)
            if end < n:
                entry = candidate(left, follower[end])
                if entry >= 0:
                    heapq.heappush(queue, entry)

        ids: list[int] = []
        start = 0
        while start < n:
            end = follower[start]
            symbol = text[start:end]
            token = self._ids.get(symbol)
            ids += self._spelled(symbol) if token is None else [token]
            start = end
        return ids

    def _spelled(self, symbol: str) -> list[int]:
        """The ids of a character that is no token: its bytes, or else the unknown token."""
        ids = [i for i in map(self._byte_ids.__getitem__, symbol.encode()) if i is not None]
        if len(ids) == len(symbol.encode()):
            return ids
        return [] if self._unk is None else [self._unk]
