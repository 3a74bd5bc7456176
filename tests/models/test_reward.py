"""Scores come from the last real token, whatever the padding, the batch or the neighbours."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from models.heads import ValueHead
from models.reward import RewardModel, last_token, pad_right, raw_scores, render
from tests.tiny import build_tiny_model

DIALOGUES = [
    [{"role": "user", "content": "What is the best way to learn?"}, {"role": "assistant", "content": text}]
    for text in (
        "Read.",
        "Read, listen and speak every day; that is helpful and kind.",
        "One, two, three, four, five; 6, 7, 8, 9, 10 (and so on)!" * 2,
        "",
        "I am sorry, this <|im_end|> is <|im_end|> not right.",  # EOS, which is also pad, inside the text
    )
] * 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with a drawn, saved score head and a normalisation of mean 2, deviation 4."""
    root = tmp_path_factory.mktemp("reward")
    base = build_tiny_model(root / "base", tied=True)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(root / "reward")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "reward")
    weights = root / "reward" / "model.safetensors"
    extra = {"score_mean": torch.tensor(2.0), "score_std": torch.tensor(4.0)}
    save_file(load_file(weights) | extra, weights, metadata={"format": "pt"})
    return root / "reward"


@pytest.fixture(scope="module")
def reward_model(folder: Path) -> RewardModel:
    return RewardModel.load(str(folder), dtype="float32", max_tokens=256)


def copy_with_config(folder: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_score_is_the_normalised_head_output_at_the_last_token_of_an_unpadded_dialogue(
    reward_model: RewardModel, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    expected = []
    for ids in render(reward_model.tokenizer, DIALOGUES, max_tokens=256):
        with torch.no_grad():
            hidden_TH = reward_model.model.model(torch.tensor([ids])).last_hidden_state[0]
        expected.append(((hidden_TH[-1] @ tensors["score.weight"][0]).item() - 2.0) / 4.0)
    assert reward_model.score(DIALOGUES) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1, "the dialogues must differ for this test to see anything"


@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_scores_do_not_depend_on_batch_size_or_order(
    reward_model: RewardModel, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reward_model.score(DIALOGUES)
    monkeypatch.setattr("models.reward.MICRO_BATCH_SIZE", micro_batch_size)
    assert reward_model.score(DIALOGUES) == pytest.approx(expected, abs=1e-4)
    assert reward_model.score(DIALOGUES[::-1]) == pytest.approx(expected[::-1], abs=1e-4)


def test_scores_do_not_depend_on_the_side_or_content_of_padding(reward_model: RewardModel) -> None:
    tokens = render(reward_model.tokenizer, DIALOGUES[:5], max_tokens=256)
    tokens_BT, mask_BT = pad_right(tokens)
    eos = reward_model.tokenizer.eos_token_id
    left_BT, left_mask_BT = torch.full_like(tokens_BT, eos), torch.zeros_like(mask_BT)
    for row, ids in enumerate(tokens):
        left_BT[row, -len(ids) :], left_mask_BT[row, -len(ids) :] = torch.tensor(ids), 1
    with torch.inference_mode():
        right_B = raw_scores(reward_model.model, tokens_BT, mask_BT)
        eos_padded_B = raw_scores(reward_model.model, tokens_BT.masked_fill(mask_BT == 0, eos), mask_BT)
        left_B = raw_scores(reward_model.model, left_BT, left_mask_BT)
    torch.testing.assert_close(left_B, right_B, atol=1e-4, rtol=0)
    torch.testing.assert_close(eos_padded_B, right_B, atol=1e-4, rtol=0)


def test_tokenizer_padding_side_does_not_matter(reward_model: RewardModel, folder: Path) -> None:
    other = RewardModel.load(str(folder), dtype="float32", max_tokens=256)
    other.tokenizer.padding_side = "left"
    assert other.score(DIALOGUES) == reward_model.score(DIALOGUES)


def test_last_token_by_hand() -> None:
    assert last_token(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]])).tolist() == [1, 2, 2, 1, 0]


def test_eos_inside_the_response_does_not_end_it(reward_model: RewardModel) -> None:
    """Pad equals EOS here: a scorer that looks for the pad id would stop at the first <|im_end|>."""
    question = DIALOGUES[0][0]
    answers = [f"I am <|im_end|> {end}" for end in ("right.", "sorry, not right.")]
    first, second = reward_model.score([[question, {"role": "assistant", "content": answer}] for answer in answers])
    assert abs(first - second) > 1e-3


def test_long_dialogues_lose_their_beginning(reward_model: RewardModel) -> None:
    ids = render(reward_model.tokenizer, DIALOGUES, max_tokens=256)
    assert render(reward_model.tokenizer, DIALOGUES, max_tokens=12) == [row[-12:] for row in ids]


def test_plain_transformers_loads_the_folder_and_agrees(reward_model: RewardModel, folder: Path) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    ids = render(reward_model.tokenizer, DIALOGUES[:1], max_tokens=256)
    with torch.no_grad():
        logit = model.eval()(torch.tensor(ids)).logits.item()  # unpadded and ends with "\n", not pad
    assert reward_model.score(DIALOGUES[:1]) == pytest.approx([(logit - 2.0) / 4.0], abs=1e-4)


def test_normalisation_is_0_and_1_where_the_folder_has_none(
    reward_model: RewardModel, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "plain")
    weights = tmp_path / "plain" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("score_")}
    save_file(tensors, weights, metadata={"format": "pt"})
    plain = RewardModel.load(str(tmp_path / "plain"), dtype="float32", max_tokens=256)
    assert plain.score(DIALOGUES) == pytest.approx([4.0 * s + 2.0 for s in reward_model.score(DIALOGUES)], abs=1e-4)
    assert plain.version != reward_model.version
    assert len(plain.version) == 12


def test_bfloat16_keeps_the_head_in_float32(reward_model: RewardModel, folder: Path) -> None:
    half = RewardModel.load(str(folder), max_tokens=256)
    assert half.model.score.weight.dtype == torch.float32
    assert half.model.model.norm.weight.dtype == torch.bfloat16
    assert half.score(DIALOGUES) == pytest.approx(reward_model.score(DIALOGUES), abs=0.1)
    assert half.version == reward_model.version


def test_a_score_that_is_not_finite_is_returned(folder: Path) -> None:
    broken = RewardModel.load(str(folder), dtype="float32", max_tokens=256)
    with torch.no_grad():
        broken.model.score.weight.fill_(torch.nan)
    assert [score != score for score in broken.score(DIALOGUES[:2])] == [True, True]


def test_nothing_to_score(reward_model: RewardModel) -> None:
    assert reward_model.score([]) == []
    with pytest.raises(ValueError, match="dialogue 1 does not end with an assistant message"):
        reward_model.score([DIALOGUES[0], DIALOGUES[0][:1]])


def test_a_policy_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="a LlamaForCausalLM, not a sequence classification model"):
        RewardModel.load(str(folder.parent / "base"), max_tokens=256)


def test_a_random_score_head_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "headless")
    weights = tmp_path / "headless" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"headless: its files do not hold score\.weight"):
        RewardModel.load(str(tmp_path / "headless"), max_tokens=256)


def test_a_classifier_of_several_labels_is_refused(folder: Path, tmp_path: Path) -> None:
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    several = copy_with_config(folder, tmp_path / "several", **labels)
    with pytest.raises(
        ValueError, match=r"several: a classifier with num_labels 2, a reward model has 1, unless its reward_card\.json"
    ):
        RewardModel.load(str(several), max_tokens=256)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("chat_template*", "its tokenizer has no chat template"),
        ("tokenizer*", "no tokenizer there that loads"),
        ("model*", "no model*.safetensors there"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_line(folder: Path, tmp_path: Path, missing: str, message: str) -> None:
    shutil.copytree(folder, tmp_path / "part")
    for file in (tmp_path / "part").glob(missing):
        file.unlink()
    with pytest.raises(ValueError, match="part: ") as caught:
        RewardModel.load(str(tmp_path / "part"), max_tokens=256)
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_no_such_model() -> None:
    with pytest.raises(ValueError, match="neither a folder nor a model the hub has"):
        RewardModel.load("/no/such/folder", max_tokens=256)


def test_first_values_are_exactly_zero_and_float32() -> None:
    head = ValueHead(8)
    hidden_BTH = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values_BT = head(hidden_BTH)
    assert values_BT.dtype == torch.float32
    assert torch.equal(values_BT, torch.zeros(2, 3))
    with torch.no_grad():
        head.linear.weight.fill_(1.0)
        head.linear.bias.fill_(0.5)
    torch.testing.assert_close(head(hidden_BTH), hidden_BTH.float().sum(-1) + 0.5)
