"""Layouts: what stands where, and that every layout gives what each sequence alone gives under transformers' attention.

N rows of a forward pass, M rows that predict or stand behind a response, L tokens of a sequence, H hidden.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from models import packed_attention
from models.forward import predicting_rows, response_logprobs
from models.packed_attention import Segment
from models.packing import Layout, allow_packing, pack, packed_tokens, pad

EOS = 2
LONG = [*range(20, 60)]
# A shared prompt with responses that begin alike; one of one token; one response; the first prompt again at the end.
PROMPTS = [[10, 11, 12], [10, 11, 12], [20], [20], [30, 31], [10, 11, 12], LONG, LONG]
RESPONSES = [[13, 14, EOS], [13, 15, 16, 17], [21], [22, EOS, 23, EOS, 24], [32], [18, EOS], [*range(100, 130)], [7]]
LAYOUTS: dict[str, Any] = {
    "shared": lambda prompts, responses: pack(prompts, responses, share_prompts=True),
    "end to end": lambda prompts, responses: pack(prompts, responses, share_prompts=False),
    "padded": pad,
}
SMALL: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@dataclass
class Models:
    """The same weights twice: `plain` attends with transformers' eager code, `packed` as the layouts ask for."""

    plain: Any
    packed: Any

    def of(self, layout: Layout) -> Any:
        return self.plain if type(layout).__name__ == "Padded" else self.packed


def random_model(config) -> Any:
    """float64, and no weight at its initial 0 or 1: biases and norms count."""
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.double().eval()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama tied", "llama untied", "qwen2 tied", "qwen2 untied"])
def models(request):
    family, tied = request.param.split()
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**SMALL, tie_word_embeddings=tied == "tied")
    plain = random_model(config)
    has_bias = any(name.endswith("q_proj.bias") for name, _ in plain.named_parameters())
    assert has_bias == (family == "qwen2")
    packed = copy.deepcopy(plain)
    allow_packing(packed)
    return Models(plain, packed)


# Most products of a tree and of a segment that are computed densely; the long tree alone; all of them.
@pytest.fixture(params=[(0, 0), (0, 10**6), (1000, 0), (10**6, 10**6)], ids=["flash", "segments", "mixed", "trees"])
def dense(request, monkeypatch):
    monkeypatch.setattr(packed_attention, "_DENSE_TREE", request.param[0])
    monkeypatch.setattr(packed_attention, "_DENSE_SEGMENT", request.param[1])
    return request.param


def alone(model, prompt, response) -> tuple[Tensor, Tensor]:
    """Last hidden states [T + 1, H] of the rows that predict and the one behind; log-probs [T] of the response."""
    output = model(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    first = len(prompt) - 1
    logprobs = torch.log_softmax(output.logits[0, first:-1] / 0.7, dim=-1)
    return output.hidden_states[-1][0, first:], logprobs[torch.arange(len(response)), torch.tensor(response)]


def gradients(model) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def weighted(hidden_MH: Tensor) -> Tensor:
    """A loss that looks at each number by itself."""
    generator = torch.Generator().manual_seed(3)
    return (hidden_MH.tanh() * torch.randn(hidden_MH.shape, generator=generator, dtype=torch.float64)).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_and_gradients_are_those_of_each_sequence_alone(models, dense, layout):
    if layout == "padded" and dense != (0, 0):
        pytest.skip("padded rows take no packed attention")
    batch = LAYOUTS[layout](PROMPTS, RESPONSES)
    model = models.of(batch)
    hidden_MH = batch.hidden(model.get_decoder(), torch.device("cpu"))
    weighted(hidden_MH).backward()
    found = gradients(model)

    by_hand = torch.cat([alone(models.plain, *pair)[0] for pair in zip(PROMPTS, RESPONSES, strict=True)])
    # float64, but norms and softmax of transformers round to float32 on their way.
    torch.testing.assert_close(hidden_MH, by_hand, atol=1e-5, rtol=0)
    weighted(by_hand).backward()
    expected = gradients(models.plain)
    assert found.keys() == expected.keys()
    assert len(found) > 15
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_each_sequence_alone(models, dense, layout):
    batch = LAYOUTS[layout](PROMPTS, RESPONSES)
    tokens_N = torch.tensor([token for response in RESPONSES for token in response])
    found_N = response_logprobs(models.of(batch), batch, tokens_N, temperature=0.7)
    with torch.no_grad():
        by_hand_N = torch.cat([alone(models.plain, *pair)[1] for pair in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(found_N, by_hand_N, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_response_never_sees_another(models, dense, layout):
    batch = LAYOUTS[layout](PROMPTS, RESPONSES)
    model = models.of(batch)
    changed = [response if row != 3 else [101, 102, 103, 104, 105] for row, response in enumerate(RESPONSES)]
    with torch.no_grad():
        before, after = (
            LAYOUTS[layout](PROMPTS, each).hidden(model.get_decoder(), torch.device("cpu")).split(rows)
            for each in (RESPONSES, changed)
            for rows in [[length + 1 for length in batch.lengths]]
        )
    for row in range(len(RESPONSES)):
        if row == 3:
            assert torch.equal(before[row][0], after[row][0])  # the prompt's last row does not look ahead
            assert (before[row][1:] - after[row][1:]).abs().amax(-1).min() > 1e-3
        else:
            assert torch.equal(before[row], after[row])


@pytest.mark.parametrize("share_prompts", [True, False])
def test_no_gradient_flows_from_a_response_to_the_tokens_of_another(models, dense, share_prompts):
    batch = pack(PROMPTS, RESPONSES, share_prompts=share_prompts)
    embedded: list[Tensor] = []
    embedding = models.packed.get_input_embeddings()

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    hook = embedding.register_forward_hook(keep)
    hidden_MH = batch.hidden(models.packed.get_decoder(), torch.device("cpu"))
    hook.remove()
    ends = torch.tensor(batch.lengths).add(1).cumsum(0)
    owners: list[set[int]] = [set() for _ in range(len(batch.input_N))]
    for row, (end, length) in enumerate(zip(ends.tolist(), batch.lengths, strict=True)):
        for index in batch.predict_M[end - length : end].tolist():  # the rows in which the response itself stands
            owners[index] = {row}
    for row, end in enumerate(ends.tolist()):
        embedded[0].grad = None
        hidden_MH[end - 1].sum().backward(retain_graph=True)  # behind its last token: it has seen all it can
        assert embedded[0].grad is not None
        reached = embedded[0].grad[0].abs().amax(-1) != 0
        own = [index for index, owner in enumerate(owners) if owner == {row}]
        others = [index for index, owner in enumerate(owners) if owner and owner != {row}]
        assert bool(reached[own].all())
        assert not bool(reached[others].any())
        prompt = [index for index, owner in enumerate(owners) if not owner and bool(reached[index])]
        assert batch.input_N[prompt].tolist() == PROMPTS[row]
    models.packed.zero_grad()


def test_tokens_positions_and_segments_of_shared_prompts():
    batch = pack([[10, 11], [20], [10, 11]], [[12, EOS], [21], [13]], share_prompts=True)
    assert batch.input_N.tolist() == [10, 11, 12, EOS, 13, 20, 21]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 2, 0, 1]
    # A token is predicted one row before it stands, the first one by the prompt; then the row behind the last token.
    assert batch.predict_M.tolist() == [1, 2, 3, 5, 6, 1, 4]
    assert batch.lengths == (2, 1, 1)
    shared = (Segment(0, 2, 0, 0), Segment(2, 4, 0, 2), Segment(4, 5, 0, 2))
    assert batch.segments.parts == (*shared, Segment(5, 7, 5, 5))
    assert packed_tokens([[10, 11], [20], [10, 11]], [[12, EOS], [21], [13]], share_prompts=True) == 7


def test_tokens_positions_and_segments_end_to_end():
    batch = pack([[10, 11], [20], [10, 11]], [[12, EOS], [21], [13]], share_prompts=False)
    assert batch.input_N.tolist() == [10, 11, 12, EOS, 20, 21, 10, 11, 13]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert batch.predict_M.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert batch.segments.parts == (Segment(0, 4, 0, 0), Segment(4, 6, 4, 4), Segment(6, 9, 6, 6))
    assert packed_tokens([[10, 11], [20], [10, 11]], [[12, EOS], [21], [13]], share_prompts=False) == 9


def test_tokens_and_places_of_a_padded_batch():
    batch = pad([[10, 11], [20]], [[12, EOS], [21]])
    assert batch.attention_BL.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.input_BL.tolist() == [[10, 11, 12, EOS], [20, 21, 0, 0]]
    assert batch.rows_M.tolist() == [0, 0, 0, 1, 1]
    assert batch.columns_M.tolist() == [1, 2, 3, 0, 1]
    assert batch.lengths == (2, 1)
    assert predicting_rows(batch.lengths, torch.device("cpu")).tolist() == [True, True, False, True, False]


def test_pad_equal_to_eos_inside_a_response_is_kept():
    # The padding is token 0: a sampled 0 is attended to, and so is EOS in the prompt.
    assert pad([[10, EOS], [20]], [[0, 11, 0], [21]]).attention_BL.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_what_the_padding_holds_does_not_matter(models):
    batch = pad(PROMPTS, RESPONSES)
    with torch.no_grad():
        before = batch.hidden(models.plain.get_decoder(), torch.device("cpu"))
        batch.input_BL[batch.attention_BL == 0] = 43
        assert torch.equal(batch.hidden(models.plain.get_decoder(), torch.device("cpu")), before)


short_lists = st.lists(st.integers(3, 5), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(short_lists, short_lists), min_size=1, max_size=8), share_prompts=st.booleans())
def test_rows_hold_each_response_behind_its_prompt(pairs, share_prompts):
    prompts, responses = [list(pair) for pair in zip(*pairs, strict=True)]
    batch = pack(prompts, responses, share_prompts=share_prompts)
    assert len(batch.input_N) == packed_tokens(prompts, responses, share_prompts=share_prompts)
    kept = len({tuple(prompt) for prompt in prompts}) if share_prompts else len(prompts)
    assert int((batch.positions_N == 0).sum()) == kept  # prompts that stand there
    # Segments cover the rows in order, without gaps, and a prefix stands before the first segment that reads it.
    edges = [edge for part in batch.segments.parts for edge in (part.start, part.end)]
    assert edges[0] == 0
    assert edges[-1] == len(batch.input_N)
    assert edges[1:-1:2] == edges[2::2]
    for part in batch.segments.parts:
        assert part.prefix_end == part.prefix_start or part.prefix_end <= part.start
    for row, indices in enumerate(batch.predict_M.split([length + 1 for length in batch.lengths])):
        last = int(indices[-1])
        [segment] = [part for part in batch.segments.parts if part.start <= last < part.end]
        seen = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, last + 1)]
        assert batch.input_N[seen].tolist() == [*prompts[row], *responses[row]]
        assert batch.positions_N[seen].tolist() == list(range(len(seen)))
        assert indices.tolist() == seen[len(prompts[row]) - 1 :]


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [([[5], [6]], [[7], []]), ([[5], []], [[7], [8]]), ([], [])],
    ids=["response", "prompt", "all"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_prompt_or_response_is_refused(layout, prompts, responses):
    with pytest.raises(ValueError, match="at least one prompt token and one response token"):
        LAYOUTS[layout](prompts, responses)


def test_a_sliding_window_is_refused_where_it_is_used():
    mistral = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=8))
    with pytest.raises(ValueError, match=r"sliding_window.*training\.packing to padded"):
        allow_packing(mistral)
    unused = Qwen2Config(**SMALL, sliding_window=8, use_sliding_window=False)
    allow_packing(AutoModelForCausalLM.from_config(unused))


def test_an_attention_that_cannot_be_replaced_is_refused():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    model._supports_attention_backend = False
    with pytest.raises(ValueError, match="LlamaForCausalLM brings its own attention"):
        allow_packing(model)
