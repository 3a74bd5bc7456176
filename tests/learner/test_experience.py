"""Records to tensors, and the plan that cuts a batch into micro-batches for each rank."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.experience import Experience, MicroBatch, plan_micro_batches, to_experience
from tests.rollouts import scored_rollout

EOS = 2  # pad too, as in SmolLM2
PACKINGS = ["shared_prompts", "sequences", "padded"]
BUDGET = 64


def test_a_batch_in_response_coordinates():
    experience = to_experience(
        [
            scored_rollout(
                "a", prompt=[10], response=[11, 12, EOS], behavior=[-1, -2, -3], reference=[-4, -5, -6], group_id="y"
            ),
            scored_rollout(
                "b", prompt=[20, 21], response=[22], behavior=[-7], reference=[-8], finish_reason="length", group_id="x"
            ),
            scored_rollout("c", prompt=[10], response=[11, EOS], reward=0.25, group_id="y"),
        ],
        token_budget=BUDGET,
    )
    assert experience.prompts == [[10], [20, 21], [10]]
    assert experience.responses == [[11, 12, EOS], [22], [11, EOS]]
    assert experience.mask_BT.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert experience.behavior_logprobs_BT.tolist() == [[-1, -2, -3], [-7, 0, 0], [-1, -1, 0]]
    assert experience.reference_logprobs_BT is not None
    assert experience.reference_logprobs_BT.tolist() == [[-4, -5, -6], [-8, 0, 0], [-1, -1, 0]]
    assert experience.scores_B.tolist() == [1, 1, 0.25]
    assert experience.truncated_B.tolist() == [False, True, False]
    assert experience.groups_B.tolist() == [0, 1, 0]
    assert len(experience) == 3


def test_flat_tokens_leave_out_the_padding_in_any_order_of_rows():
    experience = to_experience(
        [
            scored_rollout("a", response=[11, 12, EOS], behavior=[-1, -2, -3]),
            scored_rollout("b", response=[22], behavior=[-7]),
            scored_rollout("c", response=[EOS, 33], behavior=[-8, -9]),
        ],
        token_budget=BUDGET,
    )
    assert experience.tokens([2, 0]).tolist() == [EOS, 33, 11, 12, EOS]
    assert experience.flat(experience.behavior_logprobs_BT, [2, 0]).tolist() == [-8, -9, -1, -2, -3]
    values_BU = torch.arange(12.0).view(3, 4)  # a column more: the state behind the last token
    assert experience.flat(values_BU, [1, 2]).tolist() == [4, 5, 8, 9, 10]


def test_truncation_is_what_the_engine_said_not_what_the_tokens_look_like():
    ends_with_eos = scored_rollout("a", response=[9, EOS], finish_reason="length")
    ends_without = scored_rollout("b", response=[9, 9, 9], finish_reason="stop")
    assert to_experience([ends_with_eos, ends_without], token_budget=BUDGET).truncated_B.tolist() == [True, False]


# 1e39 is a finite Python number, and infinite as float32.
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("name", ["reward", "behavior_logprobs", "reference_logprobs"])
def test_a_number_that_is_not_finite_is_refused_by_trajectory_and_name(name, bad):
    values = {"reward": {"reward": bad}, "behavior_logprobs": {"behavior": [-1, bad, -1]}}.get(
        name, {"reference": [-1, bad, -1]}
    )
    with pytest.raises(ValueError, match=rf"trajectory t-bad: {name} is not finite"):
        to_experience([scored_rollout("t-good"), scored_rollout("t-bad", **values)], token_budget=BUDGET)


@pytest.mark.parametrize("name", ["prompt", "response"])
def test_an_empty_prompt_or_response_is_refused_by_trajectory(name):
    bad = scored_rollout("t-empty", response=[]) if name == "response" else scored_rollout("t-empty", prompt=[])
    with pytest.raises(ValueError, match=f"trajectory t-empty: the {name} is empty"):
        to_experience([scored_rollout("t-good"), bad], token_budget=BUDGET)


def test_a_sequence_longer_than_the_budget_is_refused_by_trajectory():
    fits = scored_rollout("t-fits", prompt=[5] * 4, response=[7] * 6)
    assert len(to_experience([fits], token_budget=10)) == 1
    long = scored_rollout("t-long", prompt=[5] * 4, response=[7] * 7)
    with pytest.raises(ValueError, match=r"trajectory t-long: 11 tokens .* training\.micro_batch_tokens 10"):
        to_experience([fits, long], token_budget=10)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="the batch is empty"):
        to_experience([], token_budget=BUDGET)


# --- micro-batches ---------------------------------------------------------------------------------------------------


def experience_of(pairs: Sequence[tuple[int, int, int]], token_budget: int) -> Experience:
    """(prompt, prompt length, response length): equal prompts and lengths are the same prompt."""
    return to_experience(
        [
            scored_rollout(f"t{row}", prompt=[100 + number] * prompt, response=[7] * response)
            for row, (number, prompt, response) in enumerate(pairs)
        ],
        token_budget=token_budget,
    )


def tokens_of(experience: Experience, rows: Sequence[int], packing: str) -> int:
    """What the forward pass of a micro-batch holds."""
    totals = [len(experience.prompts[row]) + len(experience.responses[row]) for row in rows]
    if packing == "padded":
        return len(rows) * max(totals)
    if packing == "sequences":
        return sum(totals)
    prompts = {tuple(experience.prompts[row]) for row in rows}
    return sum(map(len, prompts)) + sum(len(experience.responses[row]) for row in rows)


def counting(plan: Sequence[Sequence[MicroBatch]]) -> list[MicroBatch]:
    return [micro for share in plan for micro in share if micro.counts]


def loads(experience: Experience, micros: Sequence[MicroBatch], packing: str) -> list[int]:
    return [tokens_of(experience, micro.rows, packing) if micro.counts else 0 for micro in micros]


@st.composite
def batches(draw):
    """Experience, some of its rows, and a budget that holds the longest sequence."""
    pairs = draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=20)
    )
    if draw(st.booleans()):  # groups: equal prompts are likely
        pairs = [(number, 1 + prompt % 2 * 8, response) for number, prompt, response in pairs]
    budget = draw(st.integers(max(prompt + response for _, prompt, response in pairs), 200))
    rows = draw(st.lists(st.sampled_from(range(len(pairs))), unique=True, min_size=1))
    return experience_of(pairs, budget), rows, budget


@settings(max_examples=300, deadline=None)
@given(batch=batches(), packing=st.sampled_from(PACKINGS), num_ranks=st.integers(1, 4))
def test_a_plan_covers_each_row_once_within_the_budget_and_as_often_on_every_rank(batch, packing, num_ranks):
    experience, rows, budget = batch
    plan = plan_micro_batches(experience, rows, token_budget=budget, num_ranks=num_ranks, packing=packing)
    assert len(plan) == num_ranks
    assert len({len(share) for share in plan}) == 1
    micros = counting(plan)
    assert sorted(row for micro in micros for row in micro.rows) == sorted(rows)
    for micro in micros:
        assert tokens_of(experience, micro.rows, packing) <= budget
    for stand_in in (micro for share in plan for micro in share if not micro.counts):
        assert len(stand_in.rows) == 1  # a forward pass needs a row; as little work as there is
        assert stand_in.rows[0] in rows
        shortest = min(tokens_of(experience, [row], packing) for row in rows)
        assert tokens_of(experience, stand_in.rows, packing) == shortest
    # Every rank has something to do where there are rows enough.
    if len(rows) >= num_ranks and packing != "padded":
        assert all(share[0].counts for share in plan)
    assert plan == plan_micro_batches(experience, rows, token_budget=budget, num_ranks=num_ranks, packing=packing)


@settings(max_examples=300, deadline=None)
@given(batch=batches(), num_ranks=st.integers(1, 4))
def test_groups_stay_together_where_they_fit(batch, num_ranks):
    experience, rows, budget = batch
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(experience.prompts[row]), []).append(row)
    plan = plan_micro_batches(experience, rows, token_budget=budget, num_ranks=num_ranks, packing="shared_prompts")
    if len(groups) < num_ranks:  # then a rank would be idle: rows are dealt one by one
        return
    for members in groups.values():
        where = [micro for micro in counting(plan) if set(members) & set(micro.rows)]
        needed = -(
            -sum(len(experience.responses[row]) for row in members) // (budget - len(experience.prompts[members[0]]))
        )
        if tokens_of(experience, members, "shared_prompts") <= budget:
            assert len(where) == 1
        else:
            assert needed <= len(where) <= 2 * needed  # two pieces in a row are more than one budget


@settings(max_examples=300, deadline=None)
@given(batch=batches(), num_ranks=st.integers(1, 4))
def test_work_is_balanced_up_to_one_sequence(batch, num_ranks):
    """Longest first to the emptiest: where the fullest micro-batch got its last sequence, it was the emptiest."""
    experience, rows, budget = batch
    plan = plan_micro_batches(experience, rows, token_budget=budget, num_ranks=num_ranks, packing="sequences")
    each = [loads(experience, share, "sequences") for share in plan]
    longest = max(tokens_of(experience, [row], "sequences") for row in rows)
    everything = [load for share in each for load in share]
    assert max(everything) - min(everything) <= longest
    totals = [sum(share) for share in each]
    assert max(totals) - min(totals) <= longest
    for at_once in zip(*each, strict=True):  # what ranks do at the same time is of like size
        assert max(at_once) - min(at_once) <= max(everything) - min(everything)


@pytest.mark.parametrize("packing", PACKINGS)
def test_as_few_micro_batches_as_the_budget_allows(packing):
    experience = experience_of([(number, 4, 6) for number in range(8)], 40)
    [share] = plan_micro_batches(experience, range(8), token_budget=40, num_ranks=1, packing=packing)
    assert [len(micro.rows) for micro in share] == [4, 4]


@pytest.mark.parametrize("packing", ["shared_prompts", "sequences"])
def test_ranks_share_what_would_fit_into_one_micro_batch(packing):
    experience = experience_of([(number, 4, 6) for number in range(8)], 80)
    plan = plan_micro_batches(experience, range(8), token_budget=80, num_ranks=2, packing=packing)
    assert [[len(micro.rows) for micro in share] for share in plan] == [[4], [4]]


def test_a_shared_prompt_counts_once():
    pairs = [(group, 20, 2) for group in range(2) for _ in range(5)]
    experience = experience_of(pairs, 30)
    [share] = plan_micro_batches(experience, range(10), token_budget=30, num_ranks=1, packing="shared_prompts")
    assert sorted(sorted(micro.rows) for micro in share) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    [share] = plan_micro_batches(experience, range(10), token_budget=30, num_ranks=1, packing="sequences")
    assert len(share) == 10


def test_one_group_is_shared_out_where_a_rank_would_have_nothing():
    experience = experience_of([(0, 8, 4)] * 4, 100)
    plan = plan_micro_batches(experience, range(4), token_budget=100, num_ranks=2, packing="shared_prompts")
    assert [[len(micro.rows) for micro in share] for share in plan] == [[2], [2]]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_rank_without_rows_stands_in_with_the_shortest(packing):
    experience = experience_of([(0, 3, 9), (1, 2, 3)], 100)
    plan = plan_micro_batches(experience, [0, 1], token_budget=100, num_ranks=4, packing=packing)
    stand_ins = [micro for share in plan for micro in share if not micro.counts]
    assert [micro.rows for micro in stand_ins] == [[1]] * (3 if packing == "padded" else 2)


def test_padded_sequences_of_like_length_go_together():
    experience = experience_of([(number, 1, length) for number, length in enumerate((9, 1, 9, 1))], 20)
    [share] = plan_micro_batches(experience, range(4), token_budget=20, num_ranks=1, packing="padded")
    assert [sorted(micro.rows) for micro in share] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_layout_holds_the_tokens_that_were_planned(packing):
    experience = experience_of([(0, 3, 2), (0, 3, 4), (1, 5, 1)], 100)
    layout: Any = experience.layout([1, 0, 2], packing)
    assert layout.lengths == (4, 2, 1)
    held = layout.input_BL if packing == "padded" else layout.input_N
    assert held.numel() == tokens_of(experience, [1, 0, 2], packing) == {"padded": 21, "sequences": 18}.get(packing, 15)
