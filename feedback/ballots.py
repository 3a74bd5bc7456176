"""Votes as arrays, one place for all that counts them: N votes on P pairs by A voters.

Ids become indices into sorted lists, so the order in which votes came changes nothing but which of a voter's votes
on a pair is the last: that one stands, and where it is a skip the voter has said nothing about the pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from feedback.simulate import Vote

CHOICES = ("a", "b", "tie", "both_bad", "skip")
A, B, TIE, BOTH_BAD, SKIP = range(5)
_SIGNS = np.array([1.0, -1.0, 0.0, 0.0, 0.0])

Column = Sequence[Any] | NDArray[Any]  # or an Arrow array


@dataclass(frozen=True)
class Ballots:
    """Vote n is about pair `pair_ids[pairs_N[n]]`, by `voters[voters_N[n]]`.

    choices_N: index into CHOICES, never SKIP. left_N: 1 where a was shown left, -1 where b was, 0 unknown.
    active_s_N: seconds the voter spent on it, NaN unknown.
    """

    pair_ids: list[str]
    voters: list[str]
    pairs_N: NDArray[np.intp]
    voters_N: NDArray[np.intp]
    choices_N: NDArray[np.intp]
    left_N: NDArray[np.float64]
    active_s_N: NDArray[np.float64]

    @classmethod
    def of(cls, votes: Iterable[Vote] | Ballots) -> Ballots:
        """Records become columns; ballots stay as they are."""
        if isinstance(votes, Ballots):
            return votes
        votes = list(votes)
        return cls.from_columns(
            [vote.pair_id for vote in votes],
            [vote.voter for vote in votes],
            [vote.choice for vote in votes],
            left=[vote.left for vote in votes],
            active_s=[vote.active_s for vote in votes],
        )

    @classmethod
    def from_columns(
        cls,
        pair_ids: Column,
        voters: Column,
        choices: Column,
        *,
        left: Column | None = None,
        active_s: Column | None = None,
    ) -> Ballots:
        """Columns of equal length, oldest vote first: lists, numpy or Arrow arrays.

        Args:
            choices: one of CHOICES each.
            left: the response that was shown left, "a" or "b"; null where nobody knows.
            active_s: seconds; null or NaN where nobody knows.

        Raises:
            ValueError: columns of different lengths, nulls in the first three, an unknown choice or side, negative
                seconds.
        """
        pair_names, pairs_N = _encode("pair_ids", pair_ids)
        voter_names, voters_N = _encode("voters", voters)
        codes_N = _codes("choices", choices, CHOICES, unknown=None)
        sides_N = np.full(len(pairs_N), -1) if left is None else _codes("left", left, ("a", "b"), unknown=-1)
        seconds_N = np.full(len(pairs_N), np.nan) if active_s is None else _seconds(active_s)
        columns = {"voters": voters_N, "choices": codes_N, "left": sides_N, "active_s": seconds_N}
        for name, column in columns.items():
            if len(column) != len(pairs_N):
                raise ValueError(f"{name} has {len(column)} rows, pair_ids {len(pairs_N)}")
        stand = _last_of_each(pairs_N * max(len(voter_names), 1) + voters_N)
        stand = stand[codes_N[stand] != SKIP]
        pair_names, pairs_N = _used(pair_names, pairs_N[stand])
        voter_names, voters_N = _used(voter_names, voters_N[stand])
        sides = np.array([1.0, -1.0, 0.0])
        return cls(pair_names, voter_names, pairs_N, voters_N, codes_N[stand], sides[sides_N[stand]], seconds_N[stand])

    @property
    def signs_N(self) -> NDArray[np.float64]:
        """1 for a, -1 for b, 0 where neither was called better."""
        return _SIGNS[self.choices_N]

    def sum_P(self, values_N: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(self.pairs_N, weights=values_N, minlength=len(self.pair_ids)).astype(np.float64)

    def sum_A(self, values_N: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(self.voters_N, weights=values_N, minlength=len(self.voters)).astype(np.float64)

    def counts_P(self, choice: int) -> NDArray[np.intp]:
        return np.bincount(self.pairs_N[self.choices_N == choice], minlength=len(self.pair_ids))

    def select(self, which_N: NDArray[Any]) -> Ballots:
        """These votes alone (indices or a mask), with all pairs and voters kept in the lists."""
        columns = (self.pairs_N, self.voters_N, self.choices_N, self.left_N, self.active_s_N)
        return Ballots(self.pair_ids, self.voters, *(column[which_N] for column in columns))


def _encode(name: str, values: Column) -> tuple[list[str], NDArray[np.intp]]:
    """Sorted distinct strings, and which of them each row is."""
    encoded = _strings(name, values).dictionary_encode()
    names = encoded.dictionary
    order = pc.sort_indices(names).to_numpy()
    rank = np.empty(len(order), dtype=np.intp)
    rank[order] = np.arange(len(order))
    return names.take(pa.array(order)).to_pylist(), rank[encoded.indices.to_numpy(zero_copy_only=False)]


def _codes(name: str, values: Column, allowed: tuple[str, ...], unknown: int | None) -> NDArray[np.intp]:
    strings = _strings(name, values, nulls=unknown is not None)
    codes = pc.index_in(strings, value_set=pa.array(allowed))
    wrong = pc.and_(pc.is_null(codes), pc.is_valid(strings))
    if pc.any(wrong).as_py():
        first = pc.filter(strings, wrong)[0].as_py()
        raise ValueError(f"{name} has {first!r}, allowed is {', '.join(allowed)}")
    return pc.fill_null(codes, -1 if unknown is None else unknown).to_numpy(zero_copy_only=False).astype(np.intp)


def _strings(name: str, values: Column, *, nulls: bool = False) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    try:
        strings = pa.array(values, type=pa.string())
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{name}: strings are needed: {error}") from error
    if strings.null_count and not nulls:
        raise ValueError(f"{name}: {strings.null_count} rows have none")
    return strings


def _seconds(values: Column) -> NDArray[np.float64]:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
    seconds = np.asarray(values, dtype=np.float64)  # None becomes NaN
    if (seconds < 0).any():
        raise ValueError(f"active_s has {seconds[seconds < 0][0]}, allowed is 0 or more")
    return seconds


def _last_of_each(keys_N: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows that no later row has the key of, sorted by key."""
    order = np.argsort(keys_N, kind="stable")
    ends = np.append(np.diff(keys_N[order]) != 0, True) if len(order) else np.zeros(0, dtype=bool)
    return order[ends]


def _used(names: list[str], codes: NDArray[np.intp]) -> tuple[list[str], NDArray[np.intp]]:
    """Without the names that no row has."""
    used, renumbered = np.unique(codes, return_inverse=True)
    return [names[index] for index in used.tolist()], renumbered.astype(np.intp)
