"""benchmarks/reward_models overoptimise: turns of gold on curves whose truth is known, leads of alarms, old runs."""

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.reward_models import climbing
from benchmarks.reward_models.climbing import CONTROL, RULES, check_same, read_climb, rewards, run_config
from benchmarks.reward_models.gold_turn import (
    Climb,
    bin_edges,
    binned,
    estimate,
    gold_at,
    gold_gain,
    resampled,
    smoothing,
    turn_of,
)
from benchmarks.reward_models.overoptimise import overoptimise, report
from cluster import experience_log
from contracts.config import Config
from contracts.loading import dump
from tests.cluster.watch.batches import batch

STEPS = 40


def climb(
    gold_S: Any,
    *,
    rule: str = "mean",
    seed: int = 0,
    noise: float = 0.5,
    kl_S: Any = None,
    responses: int = 32,
    alarms: dict[str, int] | None = None,
) -> Climb:
    """VADER's spread and the quickstart's batch, unless said otherwise. KL is half a nat a step."""
    rng = np.random.default_rng(seed)
    kl_S = 0.5 * np.arange(len(gold_S)) if kl_S is None else kl_S

    def drawn(means_S: Any, spread: float) -> list[np.ndarray]:
        return [mean + spread * rng.normal(size=responses) for mean in means_S]

    return Climb(
        rule, seed, drawn(kl_S, noise), drawn(0.1 * np.arange(len(gold_S)), 1.0), drawn(gold_S, noise),
        drawn(np.zeros(len(gold_S)), 1.0), alarms or {},
    )  # fmt: skip


def tent(peak: int, *, height: float = 0.6, end: float = 0.0, steps: int = STEPS) -> np.ndarray:
    return np.interp(np.arange(1, steps + 1), [1, peak, steps], [0.0, height, end])


def test_a_known_turn_is_found() -> None:
    covered = 0
    for seed in range(30):
        turn = turn_of(climb(tent(18), seed=seed), np.random.default_rng(seed), replicates=300)
        assert turn.turned
        assert turn.step == pytest.approx(18, abs=5)
        assert turn.kl == pytest.approx(0.5 * 17, abs=2.5)
        assert turn.gold > 0.4 > 0.2 > turn.gold_at_end
        assert turn.kls[0] <= turn.kl <= turn.kls[1]
        covered += turn.kls[0] <= 0.5 * 17 <= turn.kls[1]
    assert covered >= 25


@pytest.mark.parametrize(
    ("gold_S", "most"),
    [
        (np.zeros(STEPS), 6),  # the test's level is 5 %: 2 of 40 are expected, 7 or more have a chance of 0.3 %
        (np.linspace(0, 0.6, STEPS), 0),
        (np.minimum(np.linspace(0, 1.2, STEPS), 0.6), 6),
    ],
)
def test_gold_that_never_falls_has_not_turned(gold_S: np.ndarray, most: int) -> None:
    found = [
        turn_of(climb(gold_S, seed=seed), np.random.default_rng(seed), replicates=300).turned for seed in range(40)
    ]
    assert sum(found) <= most


def test_a_rise_to_the_end_peaks_there() -> None:
    turn = turn_of(climb(np.linspace(0, 3, STEPS), noise=0.05), np.random.default_rng(0), replicates=100)
    assert (turn.step, turn.steps, turn.p) == (STEPS, (STEPS, STEPS), 1.0)


def test_smoothing_by_hand() -> None:
    weights = smoothing(5, bandwidth_steps=1.0)
    assert weights.sum(axis=1) == pytest.approx(np.ones(5))
    sides = np.exp(-0.5), np.exp(-2.0)
    assert weights[2, 1] / weights[2, 2] == pytest.approx(sides[0])
    assert weights[0] == pytest.approx(
        np.array([1, *sides, np.exp(-4.5), np.exp(-8)]) / (1 + sum(sides) + np.exp(-4.5) + np.exp(-8))
    )


def test_gold_at_a_kl_is_where_that_is_first_reached() -> None:
    still = climb(np.arange(9.0), noise=0.0, kl_S=np.arange(9.0))  # straight lines stay straight inside
    assert gold_at(still, 4.5) == pytest.approx(4.5)
    assert gold_at(still, -1.0) == pytest.approx(still.kl_S[0])
    assert gold_at(still, 99.0) == pytest.approx(still.kl_S[-1])
    there_and_back = climb(np.arange(21.0), noise=0.0, kl_S=np.array([*range(10), 5.0, *range(10, 0, -1)]))
    assert gold_at(there_and_back, 4.0) == pytest.approx(4.0, abs=0.1)


def test_a_gain_at_matched_kl_is_that_of_the_truth() -> None:
    slow = np.linspace(0, 10, STEPS)  # half the KL, the same gold by KL and 0.3 more
    fast = np.linspace(0, 20, STEPS)
    seeds = range(3)
    base = [climb(0.05 * fast, seed=seed, kl_S=fast) for seed in seeds]
    other = [climb(0.05 * slow + 0.3, seed=seed, kl_S=slow, rule="minimum") for seed in seeds]
    found = gold_gain(base, other, kl=6.0, rng=np.random.default_rng(0))
    assert 0.1 < found.low < 0.3 < found.high < 0.5
    same = gold_gain(base, [replace(each, rule="x") for each in base], kl=6.0, rng=np.random.default_rng(0))
    assert same.value == 0.0
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="the same seeds"):
        gold_gain(base, other[:2], kl=6.0, rng=np.random.default_rng(0))


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    replicates = rng.normal(size=(4, 1000)) * 0.01
    apart = np.array([[-1.0], [-0.3], [0.3], [1.0]])
    near, far = estimate(np.zeros(4), replicates, rng), estimate(apart[:, 0], replicates + apart, rng)
    assert near.high - near.low < 0.03 < 0.8 < far.high - far.low
    assert far.value == pytest.approx(0.0)


def test_bins_hold_every_step_once() -> None:
    climbs = [climb(tent(20), seed=seed, noise=0.01) for seed in range(2)]
    edges = bin_edges(climbs, 10)
    found = [each for each in binned(climbs, edges, np.random.default_rng(0), replicates=50) if each is not None]
    assert [each.num_steps for each in found] == [8] * 10
    assert found[0].kl == pytest.approx(np.mean([kl.mean() for one in climbs for kl in one.kl_SB[:4]]))
    assert found[4].gold.value == pytest.approx(np.mean([gold.mean() for one in climbs for gold in one.gold_SB[16:20]]))
    assert all(each.gold.low <= each.gold.value <= each.gold.high for each in found)
    slow = replace(climbs[0], kl_SB=[kl / 10 for kl in climbs[0].kl_SB])
    assert [each is None for each in binned([slow], edges, np.random.default_rng(0))][2:] == [True] * 8


def test_columns_are_drawn_together() -> None:
    rows: list[Any] = [np.arange(5.0), np.arange(7.0)]
    first, second = resampled([rows, [10 * each for each in rows]], np.random.default_rng(0), 200)
    np.testing.assert_allclose(second, 10 * first)
    assert first.std(axis=0) == pytest.approx([np.sqrt(2 / 5), np.sqrt(4 / 7)], rel=0.2)


def test_leads_and_false_alarms() -> None:
    found = [
        climb(tent(20), seed=0, noise=0.1, alarms={"latent": 12, "length": 30}),
        climb(np.linspace(0, 1, STEPS), seed=1, noise=0.1, alarms={"latent": 9}),
        climb(tent(25), seed=0, noise=0.1, rule="minimum", alarms={"latent": 15}),
        climb(tent(24), seed=1, noise=0.1, rule="minimum", alarms={}),
        *(climb(np.linspace(0, 1, STEPS), seed=seed, rule=CONTROL, alarms={"length": 7}) for seed in range(2)),
    ]
    lines = list(report(found))
    turns = [turn_of(found[at], np.random.default_rng(1)).step for at in (0, 2)]
    leads = sorted([turns[0] - 12, turns[1] - 15])
    table = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.count(" | ") == 6}
    latent = f"| latent | 2 | {sum(leads) / 2:+g} ({leads[0]:+d} to {leads[1]:+d}) | 0 | 1 | 1 | 0 |"
    assert table["latent"] == latent
    assert (
        table["length"]
        == f"| length | 0 | {turns[0] - 30:+d} ({turns[0] - 30:+d} to {turns[0] - 30:+d}) | 1 | 2 | 0 | 2 |"
    )
    assert table["sameness"] == "| sameness | 0 | - | 0 | 3 | 0 | 0 |"
    assert sum("did not turn within the run" in line for line in lines) == 3
    assert any(line.startswith("| latent | mean | 1 | 9 | ") and "false: gold did not turn" in line for line in lines)
    assert any(line.startswith("| KL | gold, minimum less mean |") for line in lines)
    rows = [line for line in lines if line.startswith("|")]
    widths = [line.count("|") for line in rows if not set(line) - set("|-: ")]
    assert len(widths) == 5, "every table has one header, of as many cells as its rows"
    for line, after in pairwise(lines):
        if line.startswith("|") and after.startswith("|"):
            assert line.count("|") == after.count("|")


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        what="overoptimise", seeds=1, steps=12, rules=["mean"], pairs=8, held_out_pairs=8, members=2, base="somewhere",
        learning_rate=1e-5, kl_coef=0.0, trainable_layers=1, keep=None, resume_from=tmp_path,
    )  # fmt: skip


MODELS = {name: Path("/there") / name / "reward_model" for name in ("ensemble", "single", "held_out")}


@pytest.mark.parametrize("rule", [*RULES, CONTROL])
def test_what_each_rule_trains_on(asked: argparse.Namespace, tmp_path: Path, rule: str) -> None:
    config = Config.model_validate(run_config(asked, tmp_path / "run", 3) | {"rewards": rewards(rule, MODELS)})
    weights = {component.name: component.weight for component in config.rewards}
    trained = "gold" if rule == CONTROL else "proxy"
    assert weights == {name: float(name == trained) for name in ("proxy", "gold", "held_out")}
    proxy = config.rewards[0]
    assert proxy.model == str(MODELS["single" if rule == "single" else "ensemble"])
    assert proxy.ensemble == (rule if rule in ("minimum", "mean_minus_std") else "mean")
    assert (config.seed, config.steps, config.algorithm.kl_coef, config.evaluation.judges) == (3, 12, 0.0, ())
    assert config.watch is not None
    assert config.watch.on_alarm == "warn"


def write_run(run_dir: Path, asked: argparse.Namespace, *, rule: str = "mean") -> None:
    """Gold falls behind after the reference window, the held-out reward does not, and texts grow longer."""
    (run_dir / "experience").mkdir(parents=True)
    config = run_config(asked, run_dir, 0) | {"rewards": rewards(rule, MODELS)}
    (run_dir / "config.yaml").write_text(dump(Config.model_validate(config)))
    rng = np.random.default_rng(0)
    for step in range(1, asked.steps + 1):
        late = max(0, step - 6)
        samples = batch(rng, held_out=-10.0 * late, length=40.0 + 3 * late)
        for sample in samples:
            sample.reward_components["held_out"] = sample.reward_components["proxy"]
        experience_log.write(run_dir, step, samples, {})
    rows = [json.dumps({"step": step}) for step in range(1, asked.steps + 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_a_run_is_read_without_showing_gold_to_the_watch(asked: argparse.Namespace, tmp_path: Path) -> None:
    write_run(tmp_path / "run", asked)
    found = read_climb(tmp_path / "run", "mean", 0, steps=10)
    assert found.num_steps == 10
    assert found.alarms == {"length": pytest.approx(10, abs=1)}
    lengths = [len(sample.rollout.response_tokens) for sample in experience_log.batch(tmp_path / "run", 2)]
    assert found.kl_SB[1] == pytest.approx([0.5 * length for length in lengths])
    assert found.gold_SB[9].mean() < -20 < found.gold_SB[2].mean()
    write_run(tmp_path / "control", asked, rule=CONTROL)
    assert "held_out" not in read_climb(tmp_path / "control", CONTROL, 0, steps=10).alarms


def test_what_is_done_is_not_done_again(
    asked: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    def called(command: str, config: Any, path: Path, *, resume: bool) -> None:
        calls.append((path.name, resume))

    monkeypatch.setattr(climbing, "headrace", called)
    run_dir = tmp_path / "run"
    write_run(run_dir, asked)
    config = run_config(asked, run_dir, 0) | {"rewards": rewards("mean", MODELS)}
    climbing.train(config, run_dir)
    assert calls == []
    climbing.train(config | {"steps": 13}, run_dir)
    assert calls == [("run.yaml", True)]
    climbing.train(config | {"output_dir": str(tmp_path / "new")}, tmp_path / "new")
    assert calls[1:] == [("new.yaml", False)]
    faster = config | {"training": config["training"] | {"learning_rate": 1e-3}}
    with pytest.raises(SystemExit, match=r"run: was made with other settings \(training.learning_rate: 1e-05 -> 0.001"):
        climbing.train(faster, run_dir)


def test_a_folder_may_be_moved_and_pairs_may_not_change(asked: argparse.Namespace, tmp_path: Path) -> None:
    def config(root: str, pairs: int) -> Config:
        there = {name: Path(root) / name / "reward_model" for name in MODELS}
        data = run_config(asked, tmp_path / root, 0) | {"rewards": rewards("mean", there)}
        return Config.model_validate(data | {"preferences": {"path": f"{root}/weak-{pairs}.parquet"}})

    check_same(config("a", 8), config("b", 8), tmp_path)
    with pytest.raises(SystemExit, match=r"preferences.path: weak-8.parquet -> weak-9.parquet"):
        check_same(config("a", 8), config("a", 9), tmp_path)


def test_a_folder_with_something_in_it_is_not_taken_for_new(asked: argparse.Namespace, tmp_path: Path) -> None:
    (tmp_path / "left").touch()
    asked.keep, asked.resume_from = tmp_path, None
    with pytest.raises(SystemExit, match="is not empty; --resume-from goes on"):
        overoptimise(asked)
    asked.keep, asked.resume_from = None, tmp_path / "none"
    with pytest.raises(SystemExit, match="no such folder"):
        overoptimise(asked)
