"""Running moments against `statistics` over everything at once, and what is normalised by them."""

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.normalise import RunningMoments, denormalise, normalise

NOT_FINITE = [math.nan, math.inf, -math.inf]
values_lists = st.lists(st.floats(-100, 100, width=32), max_size=12)


def _moments(*batches, std_floor=1e-6):
    moments = RunningMoments(std_floor=std_floor)
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64))
    return moments


def _numbers(moments):
    return [moments.count, moments.mean, moments.variance]


def test_literal_numbers():
    moments = _moments([2.0, 4.0], [9.0])  # mean 5, deviations 9 + 1 + 16
    assert _numbers(moments) == [3, 5.0, pytest.approx(26 / 3)]
    assert _numbers(RunningMoments()) == [0, 0.0, 0.0]
    assert _numbers(_moments([7.5])) == [1, 7.5, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(values_lists, max_size=5),
    order=st.randoms(use_true_random=False),
    shift=st.sampled_from([0.0, 1e6]),
)
def test_batches_in_any_order_and_cut_have_the_moments_of_all_values_at_once(batches, order, shift):
    batches = [[x + shift for x in batch] for batch in batches]
    everything = [x for batch in batches for x in batch]
    shuffled = order.sample(batches, len(batches))
    merged = RunningMoments()
    for batch in shuffled:  # ranks that merge what each has seen
        merged.merge(_moments(batch))
    for moments in (_moments(*batches), _moments(*shuffled), _moments(everything), merged):
        assert moments.count == len(everything)
        if everything:
            assert moments.mean == pytest.approx(statistics.fmean(everything), rel=1e-12, abs=1e-11)
            exact = statistics.pvariance(everything)
            assert moments.variance == pytest.approx(exact, rel=1e-9, abs=1e-9 * max(1, shift / 1e4))


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("junk", [*NOT_FINITE, 1e30])
def test_padding_never_counts(mask_type, junk):
    x = torch.tensor([[1.0, 3.0, junk], [5.0, junk, junk]])
    moments = RunningMoments()
    moments.update(x, torch.tensor([[1, 1, 0], [1, 0, 0]]).to(mask_type))
    assert _numbers(moments) == [3, 3.0, pytest.approx(8 / 3)]
    moments.update(x, torch.zeros(2, 3))
    assert moments.count == 3


def test_low_precision_and_large_values_are_summed_in_float64():
    moments = RunningMoments()
    moments.update(torch.full((3000,), 0.1, dtype=torch.bfloat16))
    assert moments.mean == pytest.approx(torch.tensor(0.1, dtype=torch.bfloat16).item(), rel=1e-14)
    moments = RunningMoments()
    moments.update(torch.tensor([3e38, -3e38]))  # the square overflows float32
    assert moments.variance == pytest.approx(9e76, rel=1e-6)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_values_that_are_not_finite_are_refused_and_change_nothing(bad):
    moments = _moments([1.0, 2.0])
    before = moments.state()
    with pytest.raises(ValueError, match="x has 1 values that are not finite"):
        moments.update(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="too large"):
        moments.update(torch.tensor([1e200, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask has shape \(1,\), x \(2,\)"):
        moments.update(torch.ones(2), torch.ones(1))
    assert moments.state() == before


def test_the_state_survives_a_checkpoint_to_the_bit():
    moments = _moments([0.1, 0.7, -3.3])
    restored = RunningMoments()
    restored.restore(json.loads(json.dumps(moments.state())))
    for each in (moments, restored):
        each.update(torch.tensor([1.9, 0.3]))
    assert restored.state() == moments.state()
    assert all(isinstance(number, float) for number in moments.state().values())
    assert moments.count == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1.0}, r"count is -1\.0"),
        ({"count": 1.5}, r"count is 1\.5"),
        ({"count": math.nan}, "count is nan"),
        ({"mean": math.inf}, "mean is inf"),
        ({"squared_deviations": -1e-9}, "squared_deviations is -1e-09"),
        ({"squared_deviations": math.nan}, "squared_deviations is nan"),
        ({"m2": 0.0}, "moments have keys"),
    ],
)
def test_restore_refuses_a_state_that_no_values_left(change, message):
    moments = _moments([1.0, 2.0])
    before = moments.state()
    with pytest.raises(ValueError, match=message):
        moments.restore(before | change)
    with pytest.raises(ValueError, match="moments have keys"):
        moments.restore({"count": 1.0})
    assert moments.state() == before


# Normalisation


def test_normalised_literal_numbers():
    moments = _moments([1.0, 5.0])  # mean 3, std 2
    x = torch.tensor([[1.0, 3.0], [8.0, -17.0]])
    assert normalise(x, moments).tolist() == [[-1, 0], [2.5, -10]]
    assert normalise(x, moments, clip=2).tolist() == [[-1, 0], [2, -2]]
    assert normalise(x, moments, shift=False).tolist() == [[0.5, 1.5], [4, -8.5]]
    assert normalise(x, moments, shift=False, clip=3).tolist() == [[0.5, 1.5], [3, -3]]
    assert denormalise(torch.tensor([-1.0, 2.5]), moments).tolist() == [1, 8]


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12).filter(lambda v: max(v) - min(v) > 0.01),
    shift=st.sampled_from([0.0, 1e6]),
)
def test_values_normalised_by_their_own_moments_have_mean_0_and_variance_1_and_come_back(values, shift):
    x = torch.tensor(values, dtype=torch.float64) + shift
    moments = _moments(x.tolist())
    normalised = normalise(x, moments)
    assert statistics.fmean(normalised.tolist()) == pytest.approx(0, abs=1e-6)
    assert statistics.pvariance(normalised.tolist()) == pytest.approx(1, rel=1e-6)
    assert denormalise(normalised, moments).tolist() == pytest.approx(x.tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seen", [[], [3.0]])
@pytest.mark.parametrize("shift", [True, False])
def test_nothing_changes_before_two_values_were_seen(seen, shift):
    x = torch.tensor([-700.0, 0.1])
    assert torch.equal(normalise(x, _moments(seen), clip=1, shift=shift), x)
    assert torch.equal(denormalise(x, _moments(seen)), x)
    assert _moments(seen).standardisation() == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e12 / 3, -1e30])
def test_equal_values_have_no_spread_to_divide_by(value):
    moments = _moments([value] * 3, [value] * 4, [value])
    x = torch.tensor([value], dtype=torch.float64)
    assert moments.standardisation()[1] == 1.0
    assert normalise(x, moments).item() == pytest.approx(0, abs=1e-12 * abs(value))
    assert normalise(x, moments, shift=False).item() == value


def test_spread_up_to_the_floor_is_not_amplified():
    noisy = [0.3, 0.3 + 2e-7]
    assert _moments(noisy).standardisation()[1] == 1.0
    assert _moments(noisy, std_floor=1e-9).standardisation()[1] == pytest.approx(1e-7)
    assert _moments([0.0, 1.0], std_floor=0.6).standardisation() == (0.5, 1.0)


def test_normalised_types_and_gradients():
    moments = _moments([1.0, 5.0])
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ):
        assert normalise(torch.ones(2).to(dtype), moments).dtype == wide
        assert normalise(torch.ones(2).to(dtype), RunningMoments()).dtype == wide
        assert denormalise(torch.ones(2).to(dtype), moments).dtype == wide
    assert not normalise(torch.ones(2, requires_grad=True), moments).requires_grad
    assert normalise(torch.tensor([math.nan]), moments, clip=1).isnan()


def test_a_large_mean_does_not_cancel():
    moments = _moments([1e8 + 2, 1e8 + 4])  # mean 1e8 + 3, which float32 would round to 1e8; std 1
    assert normalise(torch.tensor([1e8 + 8]), moments).item() == pytest.approx(5)


def test_normalisation_refuses_bad_input():
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"clip is {clip}"):
            normalise(torch.ones(1), RunningMoments(), clip=clip)
    for std_floor in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"std_floor is {std_floor}"):
            RunningMoments(std_floor=std_floor)
