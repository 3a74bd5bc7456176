"""The critic's head: PopArt keeps every output when the statistics of its targets change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.heads import ValueHead

means = st.floats(-100, 100)
stds = st.floats(1e-3, 1e3)


def _head(seed=0):
    head = ValueHead(8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.linear.weight.copy_(torch.randn(1, 8, generator=generator))
        head.linear.bias.copy_(torch.randn(1, generator=generator))
    return head, torch.randn(2, 5, 8, generator=generator)


def test_rescale_literal_numbers():
    head = ValueHead(2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, -3.0]]))
        head.linear.bias.fill_(0.5)
    # 4 · (h0 - 3 h1 + 0.5) + 10 = 8 · (h0 / 2 - 1.5 h1 + 1.75) - 2
    head.rescale_(old_mean=10, old_std=4, new_mean=-2, new_std=8)
    assert head.linear.weight.tolist() == [[0.5, -1.5]]
    assert head.linear.bias.tolist() == [1.75]


@settings(max_examples=60, deadline=None)
@given(statistics=st.lists(st.tuples(means, stds), min_size=2, max_size=4), seed=st.integers(0, 100))
def test_denormalised_outputs_stay_through_any_change_of_statistics(statistics, seed):
    head, hidden = _head(seed)
    (mean, std), *changes = statistics
    with torch.no_grad():
        before = std * head(hidden).double() + mean
        # float32 parameters: what the largest part of any of the sums loses
        size = max(std * head(hidden).abs().max().item() + abs(mean), *(abs(m) for m, _ in changes), 1e-3)
        for new_mean, new_std in changes:
            head.rescale_(old_mean=mean, old_std=std, new_mean=new_mean, new_std=new_std)
            mean, std = new_mean, new_std
        after = std * head(hidden).double() + mean
    assert (after - before).abs().max().item() < 1e-5 * size


def test_outputs_alone_do_change_and_the_parameters_stay_the_optimizers():
    head, hidden = _head()
    parameters, before = list(head.parameters()), head(hidden)
    head.rescale_(old_mean=0, old_std=1, new_mean=3, new_std=2)
    torch.testing.assert_close(head(hidden), (before - 3) / 2)
    assert all(after is old for after, old in zip(head.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)


def test_the_same_statistics_change_nothing():
    head, hidden = _head()
    before = head(hidden)
    head.rescale_(old_mean=2.5, old_std=0.3, new_mean=2.5, new_std=0.3)
    assert torch.equal(head(hidden), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("old_mean", math.nan),
        ("new_mean", math.inf),
        ("old_std", 0.0),
        ("new_std", 0.0),
        ("new_std", -1.0),
        ("new_std", math.nan),
        ("old_std", math.inf),
    ],
)
def test_bad_statistics_are_refused_and_change_nothing(name, value):
    head, hidden = _head()
    before = head(hidden)
    numbers = {"old_mean": 0.0, "old_std": 1.0, "new_mean": 0.0, "new_std": 1.0} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        head.rescale_(**numbers)
    assert torch.equal(head(hidden), before)
