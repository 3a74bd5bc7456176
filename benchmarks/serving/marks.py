"""Weights that sign what they write: each version says some tokens by other names, so its answers name it.

Version v is the served model with the rows of two sets of tokens exchanged, in the embedding and in the output layer.
Greedy, it computes what version 0 computes and says `names[v][i]` wherever version 0 says `names[0][i]`, as long as no
prompt has a token of either set. So each such token of an answer tells which weights wrote it, whatever its label says,
up to where rounding makes an answer leave that path: from there on nothing is known of it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor


class Marks:
    """Names for versions 0 to `versions`.

    Args:
        said: how often version 0 says each token.
        reserved: tokens of prompts and special ones, which keep their meaning.
        vocabulary: rows of the embedding.
        most: tokens that a version renames; fewer where the vocabulary is small.

    Raises:
        ValueError: the vocabulary is too small for a single name for each version.
    """

    def __init__(
        self, said: Counter[int], reserved: set[int], *, vocabulary: int, versions: int, most: int = 200
    ) -> None:
        free = sorted(set(range(vocabulary)) - reserved - said.keys())
        often = [token for token, _ in said.most_common() if token not in reserved][: min(most, len(free) // versions)]
        if not often:
            raise ValueError(f"{len(free)} of {vocabulary} tokens are free: too few for {versions} versions")
        free = free[-versions * len(often) :]  # the last merges of a tokenizer are its rarest words
        random.Random(0).shuffle(free)
        self.names = [often] + [free[i * len(often) : (i + 1) * len(often)] for i in range(versions)]
        self._place = {token: place for place, token in enumerate(often)}
        self._version_of = {token: version for version, names in enumerate(self.names) for token in names}

    def weights(self, base: Mapping[str, Tensor], version: int) -> dict[str, Tensor]:
        """Those of `version`; what does not differ from `base` is shared with it."""
        ours, theirs = self.names[0], self.names[version]
        named = dict(base)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in base:
                rows = base[name].clone()
                rows[ours], rows[theirs] = base[name][theirs], base[name][ours]
                named[name] = rows
        return named

    def signed(self, tokens: Sequence[int], path: Sequence[int]) -> set[int]:
        """The versions that wrote these tokens, where version 0 writes `path`; empty where none of them has a name."""
        found = set()
        for token, plain in zip(tokens, path, strict=False):
            if plain not in self._place:
                if token != plain:
                    break
                continue
            version = self._version_of.get(token)
            if version is None or self.names[version][self._place[plain]] != token:
                break
            found.add(version)
        return found
