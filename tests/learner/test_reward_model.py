"""The reward model learns what the comparisons say, on prompts it is then not judged by."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from contracts.records import Comparison
from contracts.reward_model import RewardModelConfig
from learner.reward_model import (
    RewardModelReport,
    accuracy,
    batches,
    bradley_terry_loss,
    train_reward_model,
    training,
    wilson_interval,
)
from learner.reward_model.batches import (
    SHARED_PROMPT_MODELS,
    bucketed_batches,
    micro_batches,
    pack_pairs,
    pair_scores,
    shares_prompts,
)
from learner.reward_model.examples import Example, TokenPair, dialogue, token_pairs
from learner.reward_model.fitting import FitInputs, backward, rate_share
from learner.reward_model.measures import HeldOut
from learner.reward_model.network import initial_model
from models.reward import RewardModel, pad_right, raw_scores
from tests.tiny import build_tiny_model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SIDES = ("kind", "every day", "the wheel", "a mill", "in short", "and so on", "morning", "helpful", "sorry", "turn")


def great_is_better(count: int, *, seed: int = 0) -> list[Comparison]:
    """Two rows a prompt; the answer with "great" somewhere in it is the chosen one."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = [draw.choice(SIDES) for _ in range(3)]
        place = draw.randrange(4)
        chosen = " ".join([*words[:place], "great", *words[place:]])
        rejected = " ".join([*words[:place], draw.choice(SIDES), *words[place:]])
        rows.append(Comparison(f"Question {number // 2}?", chosen, rejected, prompt_id=str(number // 2)))
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("base") / "model", tied=True)


CONFIG = RewardModelConfig(
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    epochs=3,
    max_tokens=128,
    trainable_layers=1,
    calibration_fraction=0,
)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModelReport, Path, list[str]]:
    folder = tmp_path_factory.mktemp("trained") / "reward"
    lines: list[str] = []
    report = train_reward_model(
        great_is_better(320),
        CONFIG,
        base=str(base),
        output_dir=folder,
        seed=3,
        threads=1,
        on_progress=lines.append,
    )
    return report, folder, lines


def test_it_learns_a_lexical_preference(trained: tuple[RewardModelReport, Path, list[str]]) -> None:
    report, _, lines = trained
    assert report.held_out_accuracy > 0.9
    assert report.held_out_accuracy_low < report.held_out_accuracy <= report.held_out_accuracy_high <= 1
    assert report.held_out_loss < 0.5 < math.log(2)
    assert (report.train_pairs, report.held_out_pairs, report.held_out_prompts) == (256, 64, 32)
    assert lines[-1].startswith("reward model: step 48 of 48")


def test_the_saved_folder_prefers_it_too(trained: tuple[RewardModelReport, Path, list[str]]) -> None:
    report, folder, _ = trained
    saved = RewardModel.load(str(folder), max_tokens=128)
    assert saved.version == report.reward_version
    assert (saved.score_mean, saved.score_std) == (report.score_mean, report.score_std)
    assert saved.score_std > 0.1
    fresh = great_is_better(40, seed=9)
    chosen = saved.score([dialogue(c.prompt, c.chosen) for c in fresh])
    rejected = saved.score([dialogue(c.prompt, c.rejected) for c in fresh])
    assert accuracy([c - r for c, r in zip(chosen, rejected, strict=True)], [1.0] * 40) > 0.9
    assert abs(sum(chosen + rejected) / 80) < 0.5, "the frozen mean is that of such responses"
    assert 0.5 < torch.tensor(chosen + rejected).std() < 2


def test_plain_transformers_loads_all_of_it(trained: tuple[RewardModelReport, Path, list[str]]) -> None:
    _, folder, _ = trained
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.score.weight, saved["score.weight"])
    frozen = {"score_mean", "score_std", "temperature"}
    assert {saved[name].dtype for name in saved.keys() - frozen} == {torch.bfloat16}
    assert {saved[name].dtype for name in frozen} == {torch.float32}


def test_frozen_layers_are_unchanged_and_the_others_are_not(
    trained: tuple[RewardModelReport, Path, list[str]], base: Path
) -> None:
    before, after = load_file(base / "model.safetensors"), load_file(trained[1] / "model.safetensors")
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed >= {
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    assert not {name for name in changed if name.startswith(("model.embed_tokens", "model.layers.0."))}


def test_the_card_says_what_was_done(trained: tuple[RewardModelReport, Path, list[str]], base: Path) -> None:
    report, folder, _ = trained
    card = json.loads((folder / "reward_card.json").read_text())
    assert card["schema_version"] == 2
    assert card["base"] == str(base)
    assert card["reward_version"] == report.reward_version
    assert card["metrics"]["held_out_accuracy"] == report.held_out_accuracy
    assert card["config"]["trainable_layers"] == 1
    assert (card["heads"], card["members"]) == (["reward"], 1)
    digests = [card[f"{what}_sha256"] for what in ("base", "dataset", "tokenizer", "template")]
    assert [len(digest) for digest in digests] == [64] * 4
    assert [path.name for path in folder.parent.iterdir()] == ["reward"], "no scratch folder stays"


def test_no_prompt_is_on_two_sides(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"train": [], "held out": [], "calibrate": []}
    fit, real, save = training.fit_on_ranks, training.held_out, training.save

    def fitted(inputs: FitInputs, **kwargs: Any) -> Any:
        seen["train"] = list(inputs.examples)
        return fit(inputs, **kwargs)

    def judged(model: RewardModel, rows: list[Comparison]) -> HeldOut:
        seen["held out"] = list(rows)
        return real(model, rows)

    def saved(*args: Any, calibrated_on: dict[str, list[Example]], **kwargs: Any) -> None:
        seen["calibrate"] = calibrated_on["reward"]
        save(*args, calibrated_on=calibrated_on, **kwargs)

    for name, replacement in (("fit_on_ranks", fitted), ("held_out", judged), ("save", saved)):
        monkeypatch.setattr(training, name, replacement)
    config = CONFIG.model_copy(update={"calibration_fraction": 0.25})
    report = train_reward_model(great_is_better(120), config, base=str(base), output_dir=tmp_path / "reward", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    question = tokenizer.encode("?")[0]
    seen["held out"] = list(token_pairs_of(seen["held out"], tokenizer))
    prompts = {
        what: {tuple(pair.chosen[: pair.chosen.index(question)]) for pair in pairs} for what, pairs in seen.items()
    }
    assert {what: len(each) for what, each in prompts.items()} == {"train": 36, "held out": 12, "calibrate": 12}
    assert len(set.union(*prompts.values())) == 60
    assert (report.train_pairs, report.held_out_pairs, report.calibration_rows) == (72, 24, 24)


def token_pairs_of(rows: list[Comparison], tokenizer: object) -> list[TokenPair]:
    return token_pairs(rows, tokenizer, 128, Counter())[1]


def test_empty_and_identical_pairs_are_dropped_and_counted(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    good = Comparison("p", "yes", "no")
    rows = [
        good,
        Comparison("p", " ", "no"),
        Comparison("p", "yes", ""),
        Comparison("p", "same", "same"),
        Comparison("p", "one " + "the wheel " * 30, "two " + "the wheel " * 30),  # the same last 32 tokens
        good,
    ]
    dropped: Counter[str] = Counter()
    usable, pairs = token_pairs(rows, tokenizer, 32, dropped)
    assert usable == [good, good], "a row that comes twice counts twice"
    assert len(pairs) == 2
    assert dropped == {"empty": 2, "identical": 2}


def test_too_few_pairs(base: Path, tmp_path: Path) -> None:
    rows = [Comparison("p", "yes", "no"), Comparison("p", "same", "same"), Comparison("q", "", "no")]
    with pytest.raises(ValueError, match=r"1 usable .* 0 held out \(dropped: 1 empty, 1 identical\)"):
        train_reward_model(rows, CONFIG, base=str(base), output_dir=tmp_path / "reward", seed=0)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_and_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"trainable_layers": 3})
    with pytest.raises(ValueError, match="trainable_layers is 3, the model has 2 layers"):
        train_reward_model(great_is_better(8), config, base=str(base), output_dir=tmp_path / "reward", seed=0)
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train_reward_model(great_is_better(8), CONFIG, base=str(base), output_dir=tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_same_seed_same_weights(base: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 1, "trainable_layers": None})
    versions = [
        train_reward_model(
            great_is_better(24), config, base=str(base), output_dir=tmp_path / name, seed=seed, threads=1
        ).reward_version
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert versions[0] == versions[1] != versions[2]


def test_a_reward_model_as_base_keeps_its_head(trained: tuple[RewardModelReport, Path, list[str]], base: Path) -> None:
    saved = load_file(trained[1] / "model.safetensors")["score.weight"].float()
    again = initial_model(str(trained[1]), name="trained", seed=0)
    assert torch.equal(again.score.weight, saved)
    first = initial_model(str(base), name="base", seed=0)
    assert 0 < first.score.weight.std() < 2 / math.sqrt(first.score.in_features)


def test_two_answers_in_one_row_score_as_if_alone(base: Path) -> None:
    model = initial_model(str(base), name="base", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [*great_is_better(6), Comparison("p", "yes", "yes " + "the wheel " * 9), Comparison("Why?", "x y z", "no")]
    pairs = token_pairs_of(rows, tokenizer)
    pairs.append(TokenPair([5, 6, 7], [8, 9], 1.0))  # nothing in common
    pairs.append(TokenPair([5, 6, 7, 8], [5, 6], 1.0))  # one is the beginning of the other
    pairs.append(TokenPair([5, 6], [5, 6, 7, 8], 1.0))
    assert shares_prompts(model)
    with torch.no_grad():
        chosen_B, rejected_B = pair_scores(model, pairs)
        alone_2B = raw_scores(model, *pad_right([p.chosen for p in pairs] + [p.rejected for p in pairs]))
    torch.testing.assert_close(torch.cat([chosen_B, rejected_B]), alone_2B, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_every_architecture_that_shares_prompts_scores_as_if_alone(config_class: Any) -> None:
    config = config_class(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_labels=1,
        initializer_range=0.2,
    )
    assert config.model_type in SHARED_PROMPT_MODELS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    assert shares_prompts(model)
    pairs = [TokenPair([1, 2, 3, 4, 5], [1, 2, 9, 8], 1.0), TokenPair([*range(10, 40)], [*range(10, 30), 7, 6], 1.0)]
    with torch.no_grad():
        packed_2B = torch.cat(pair_scores(model, pairs))
        alone_2B = raw_scores(model, *pad_right([p.chosen for p in pairs] + [p.rejected for p in pairs]))
    torch.testing.assert_close(packed_2B, alone_2B, atol=1e-4, rtol=1e-4)
    assert alone_2B.std() > 0.05


def test_packing_by_hand() -> None:
    tokens_BT, positions_BT, allowed_BTT, ends_B2 = pack_pairs([TokenPair([4, 5, 6], [4, 7, 8], 1.0)])
    assert tokens_BT.tolist() == [[4, 5, 6, 7, 8]]
    assert positions_BT.tolist() == [[0, 1, 2, 1, 2]]
    assert ends_B2.tolist() == [[2, 4]]
    assert allowed_BTT.int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    ]


def test_micro_batches_do_not_change_the_gradient(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denominator is the pairs of the step, not a mean of means over unequal micro-batches."""
    pairs = token_pairs_of(great_is_better(10), AutoTokenizer.from_pretrained(base))
    gradients = []
    for budget in (4096, 400):
        monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", budget)
        assert (len(list(micro_batches(pairs))) > 1) == (budget == 400)
        model = initial_model(str(base), name="base", seed=0)
        backward(model, pairs, torch.ones(len(pairs), 1), CONFIG)
        gradients.append(model.score.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-2, rtol=2e-2)


def test_bradley_terry_by_hand() -> None:
    # d = log 3: σ(d) = 3/4, σ(-d) = 1/4. d = 0: both 1/2.
    margins_B = torch.tensor([math.log(3), math.log(3), 0.0])
    expected = [-math.log(0.75), -(0.8 * math.log(0.75) + 0.2 * math.log(0.25)), math.log(2)]
    loss = bradley_terry_loss(margins_B, torch.tensor([1.0, 0.8, 0.3]), num_pairs=3)
    assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_bradley_terry_has_its_minimum_where_the_model_agrees_with_the_voters() -> None:
    margin_B = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)
    bradley_terry_loss(margin_B, torch.tensor([0.8]), num_pairs=1).backward()
    assert margin_B.grad is not None
    assert margin_B.grad.item() == pytest.approx(0, abs=1e-7)


def test_bradley_terry_stays_finite_far_out() -> None:
    loss = bradley_terry_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1.0, 1.0]), num_pairs=2)
    assert loss.item() == pytest.approx(5e3)


def test_accuracy_by_hand() -> None:
    assert accuracy([1.0, -1.0, 0.0, 3.0, 9.0], [0.9, 0.2, 1.0, 0.0, 0.5]) == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_wilson_interval_from_the_literature() -> None:
    # Newcombe 1998, table I, method 3: 81/263 gives 0.2553 to 0.3662, 0/20 gives 0 to 0.1611.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


def test_bucketed_batches_hold_every_row_once_and_like_lengths_together() -> None:
    lengths = [random.Random(0).randrange(10, 500) for _ in range(130)]
    found = bucketed_batches(lengths, 8, seed=1)
    assert sorted(row for batch in found for row in batch) == list(range(130))
    assert sorted(map(len, found)) == [2, *[8] * 16]
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in found)
    assert padded < 1.25 * sum(lengths)
    assert found != bucketed_batches(lengths, 8, seed=2)
    assert found == bucketed_batches(lengths, 8, seed=1)


def test_rate_rises_for_a_tenth_and_falls_to_nothing() -> None:
    rates = [rate_share(step, 20) for step in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert [rate_share(0, 1), rate_share(0, 2)] == [1.0, 1.0]
