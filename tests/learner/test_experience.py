"""Records to tensors, padding and micro-batches. The tiny model is asked what a position predicts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from learner.experience import micro_batches, to_experience
from models.forward import pad_responses, response_hidden, response_logits
from tests.rollouts import scored_rollout
from tests.tiny import build_tiny_model

EOS = 2  # pad too, as in SmolLM2


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_tiny_model(tmp_path_factory.mktemp("tiny"), tied=False, hidden_size=64)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_batch_in_response_coordinates():
    experience = to_experience(
        [
            scored_rollout("a", prompt=[10], response=[11, 12, EOS], behavior=[-1, -2, -3], reference=[-4, -5, -6]),
            scored_rollout("b", prompt=[20, 21], response=[22], behavior=[-7], reference=[-8], finish_reason="length"),
        ]
    )
    assert experience.sequences == [[10, 11, 12, EOS], [20, 21, 22]]
    assert experience.prompt_lengths == [1, 2]
    assert experience.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert experience.behavior_logprobs_BT.tolist() == [[-1, -2, -3], [-7, 0, 0]]
    assert experience.reference_logprobs_BT.tolist() == [[-4, -5, -6], [-8, 0, 0]]
    assert experience.scores_B.tolist() == [1, 1]
    assert experience.truncated_B.tolist() == [False, True]
    assert len(experience) == 2


def test_truncation_is_what_the_engine_said_not_what_the_tokens_look_like():
    ends_with_eos = scored_rollout("a", response=[9, EOS], finish_reason="length")
    ends_without = scored_rollout("b", response=[9, 9, 9], finish_reason="stop")
    assert to_experience([ends_with_eos, ends_without]).truncated_B.tolist() == [True, False]


# 1e39 is a finite Python number, and infinite as float32.
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("name", ["reward", "behavior_logprobs", "reference_logprobs"])
def test_a_number_that_is_not_finite_is_refused_by_trajectory_and_name(name, bad):
    values = {"reward": {"reward": bad}, "behavior_logprobs": {"behavior": [-1, bad, -1]}}.get(
        name, {"reference": [-1, bad, -1]}
    )
    with pytest.raises(ValueError, match=rf"trajectory t-bad: {name} is not finite"):
        to_experience([scored_rollout("t-good"), scored_rollout("t-bad", **values)])


def test_an_empty_response_is_refused_by_trajectory():
    with pytest.raises(ValueError, match="trajectory t-empty: the response is empty"):
        to_experience([scored_rollout("t-good"), scored_rollout("t-empty", response=[])])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20),
    token_budget=st.integers(1, 200),
    data=st.data(),
)
def test_micro_batches_cover_each_row_once_within_the_budget(lengths, token_budget, data):
    experience = to_experience(
        [scored_rollout(prompt=range(3, 3 + prompt), response=[7] * response) for prompt, response in lengths]
    )
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    micros = micro_batches(experience, rows, token_budget=token_budget, pad_token=0)
    assert sorted(row for micro in micros for row in micro.rows.tolist()) == sorted(rows)
    for micro in micros:
        assert micro.responses.input_BL.numel() <= token_budget or len(micro.rows) == 1
        for at, row in enumerate(micro.rows.tolist()):
            valid = micro.responses.attention_BL[at].bool()
            assert micro.responses.input_BL[at][valid].tolist() == experience.sequences[row]
            assert micro.responses.lengths_B[at] == lengths[row][1]


def test_sequences_of_like_length_go_together():
    experience = to_experience([scored_rollout(prompt=[3], response=[7] * n) for n in (9, 1, 9, 1)])
    micros = micro_batches(experience, range(4), token_budget=20, pad_token=0)
    assert [sorted(micro.rows.tolist()) for micro in micros] == [[0, 2], [1, 3]]


def test_positions_and_tokens_of_a_padded_batch():
    batch = pad_responses([[10, 11, 12, 13], [20, 21, 22]], [2, 2], pad_token=EOS)
    assert batch.input_BL.tolist() == [[10, 11, 12, 13], [20, 21, 22, EOS]]
    assert batch.attention_BL.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.tokens_BT.tolist() == [[12, 13], [22, EOS]]
    # Token t of the response is predicted one position before it stands; then the state behind the last token.
    assert batch.positions_BU.tolist() == [[1, 2, 3], [1, 2, 2]]
    assert batch.lengths_B.tolist() == [2, 1]


def test_pad_equal_to_eos_inside_a_response_is_kept():
    batch = pad_responses([[10, EOS, 11, EOS], [20, 21]], [1, 1], pad_token=EOS)
    assert batch.attention_BL.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.tokens_BT[0].tolist() == [EOS, 11, EOS]
    assert batch.lengths_B.tolist() == [3, 1]


@pytest.mark.parametrize(("sequences", "prompts"), [([[5, 6]], [2]), ([[5, 6]], [0]), ([[5, 6], [7]], [1, 1])])
def test_an_empty_prompt_or_response_is_refused(sequences, prompts):
    with pytest.raises(ValueError, match="at least one prompt token and one response token"):
        pad_responses(sequences, prompts, pad_token=0)


SEQUENCES = [[30, 31, 32, 33, 34, EOS], [40, 41, 42, EOS, 43, 44, 45, 46, 47], [50, 51]]
PROMPTS = [3, 2, 1]


@torch.no_grad()
def test_logits_at_the_positions_are_those_of_each_sequence_alone(model):
    batch = pad_responses(SEQUENCES, PROMPTS, pad_token=EOS)
    hidden_BUH = response_hidden(model, batch)
    logits_BTV = response_logits(model, hidden_BUH)
    for row, (tokens, start) in enumerate(zip(SEQUENCES, PROMPTS, strict=True)):
        alone = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        length = len(tokens) - start
        # Logits at i predict token i + 1: those for the response stand from the last prompt token on.
        torch.testing.assert_close(logits_BTV[row, :length], alone.logits[0, start - 1 : -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden_BUH[row, length], alone.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden_BUH[row, -1], alone.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_the_padding_holds_does_not_matter(model):
    results = []
    for pad_token in (EOS, 0, 43):
        batch = pad_responses(SEQUENCES, PROMPTS, pad_token=pad_token)
        results.append(response_hidden(model, batch))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
