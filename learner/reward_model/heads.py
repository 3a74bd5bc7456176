"""Named heads and ensemble members as rows of one score layer, and which rows of the data each of them learns from.

N examples, K members, L = heads times K. The members of head h are the columns h K to h K + K - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contracts.seeds import derive_seed


@dataclass(frozen=True)
class Heads:
    """`domains` of each name are those that it learns from; none: all."""

    domains: Mapping[str, tuple[str, ...]]
    members: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.domains)

    @property
    def num_labels(self) -> int:
        return len(self.domains) * self.members

    @property
    def labels(self) -> list[str]:
        """Of the columns, as id2label has them: the head, and with an ensemble the member."""
        return [
            name if self.members == 1 else f"{name}.{member}" for name in self.names for member in range(self.members)
        ]

    def columns(self, name: str) -> slice:
        at = self.names.index(name)
        return slice(at * self.members, (at + 1) * self.members)

    def of_domain(self, domain: str) -> tuple[str, ...]:
        """The heads that learn from a row of this domain."""
        return tuple(name for name, domains in self.domains.items() if not domains or domain in domains)

    def weights(self, domains: Sequence[str], groups: Sequence[str], *, bootstrap: bool, seed: int) -> Tensor:
        """How often each example counts in each column, [N, L] in float32; `groups` name the prompts."""
        weights_NL = torch.zeros(len(domains), self.num_labels)
        for name in self.names:
            learns_N = torch.tensor([name in self.of_domain(domain) for domain in domains])
            weights_NL[learns_N, self.columns(name)] = 1.0
        if self.members > 1 and bootstrap:
            for column in range(self.num_labels):
                weights_NL[:, column] *= prompts_drawn(groups, seed=derive_seed(seed, "bootstrap", column))
        return weights_NL


def prompts_drawn(groups: Sequence[str], *, seed: int) -> Tensor:
    """How often the prompt of each row [N] comes in a sample, with replacement, of as many prompts as there are.

    Whole prompts, as rows of one are alike (Efron 1979, "Bootstrap Methods"; Osband et al. 2016, "Deep Exploration via
    Bootstrapped DQN", for heads on a shared trunk).
    """
    names = list(dict.fromkeys(groups))
    drawn = torch.randint(len(names), (len(names),), generator=torch.Generator().manual_seed(seed))
    counts = dict(zip(names, torch.bincount(drawn, minlength=len(names)).tolist(), strict=True))
    return torch.tensor([float(counts[group]) for group in groups])
