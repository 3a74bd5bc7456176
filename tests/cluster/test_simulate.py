"""The simulator against arithmetic: schedules simple enough to work out by hand, and bounds that nothing exceeds."""

import argparse
import sys
from dataclasses import replace

import pytest

from benchmarks import scheduling
from cluster import simulate as module
from cluster.simulate import ideal, simulate
from cluster.simulated import Cluster, Workload

# 2 actors of 8 slots, 10 s a response exactly, and nothing else takes time but 5 s of learning.
PLAIN = Cluster(
    actors=2,
    slots=8,
    response_s=10.0,
    response_spread=0.0,
    learn_s=5.0,
    publish_s=0.0,
    weights_bytes=0.0,
    latency_s=0.0,
    apply_s=0.0,
    score_s=0.0,
)
WORK = Workload(steps=12, batch_size=16, group_size=4, max_lag_steps=0)


def test_on_policy_steps_take_turns():
    result = simulate(PLAIN, WORK)
    assert result.seconds == pytest.approx(12 * (10 + 5))
    assert result.samples_per_s == pytest.approx(16 / 15)
    assert result.rollout_idle_fraction == pytest.approx(5 / 15)
    assert result.learner_busy_fraction == pytest.approx(5 / 15)
    assert result.occupied_slots_fraction == pytest.approx(10 / 15)
    assert result.lags == {0: 12 * 16}
    assert result.counts["issued"] == result.counts["trained"] == 12 * 16


def test_running_ahead_hides_the_learner_behind_the_engines():
    result = simulate(PLAIN, replace(WORK, max_lag_steps=2))
    # 16 slots are full all the time: a batch every 10 s, and the last one is learnt after the engines are done.
    assert result.seconds == pytest.approx(12 * 10 + 5)
    assert result.samples_per_s == pytest.approx(1.6)


def test_a_slow_learner_hides_the_engines():
    result = simulate(replace(PLAIN, learn_s=40.0), replace(WORK, max_lag_steps=1))
    assert result.seconds == pytest.approx(10 + 12 * 40)
    assert result.learner_busy_fraction == pytest.approx(1.0)


def test_scoring_queues_for_its_replicas():
    # 16 responses end at once; 4 replicas of 2 s score them in 4 turns.
    result = simulate(replace(PLAIN, score_s=2.0, score_replicas=4), WORK)
    assert result.seconds == pytest.approx(12 * (10 + 8 + 5))


def test_new_weights_travel_hold_what_runs_and_change_its_versions():
    # The engines are never idle and get a new version in every response. It is 10 MB at 10 MB/s away, then held 2 s.
    cluster = replace(PLAIN, weights_bytes=1e7, bandwidth=1e7, apply_s=2.0)
    result = simulate(cluster, replace(WORK, max_lag_steps=3, steps=30))
    assert result.samples_per_s == pytest.approx(16 / 12, rel=0.02)
    assert result.paused_s == pytest.approx(2.0)
    # On-policy, an engine has nothing to hold: its weights are 1 + 2 s late.
    result = simulate(cluster, WORK)
    assert result.seconds == pytest.approx(12 * 15 + 11 * 3)


def test_deaths_cost_what_was_running_and_the_time_to_restart():
    # One actor for 16 samples: 10 s a batch. It dies about every 500 s and is back after 100.
    cluster = replace(PLAIN, actors=1, slots=16, learn_s=0.001, death_every_s=500.0, restart_s=100.0)
    result = simulate(cluster, replace(WORK, max_lag_steps=1, steps=1000, lease_s=1e6))
    deaths = result.events["death"]
    assert 10 < deaths < 35  # 10,000 s of work
    # Each death costs the restart and between nothing and a whole batch of work.
    assert 1000 * 10 + deaths * 100 <= result.seconds + 1 <= 1000 * 10 + deaths * 110 + 1
    assert result.counts["trained"] == 16_000
    assert result.counts["expired"] == 0  # sent again under the same ids


def test_notice_of_a_preemption_saves_the_work():
    shared = replace(PLAIN, actors=8, slots=16, learn_s=0.001, restart_s=5.0, preemption_every_s=400.0)
    work = replace(WORK, batch_size=64, max_lag_steps=2, steps=150)
    late = simulate(replace(shared, notice_s=0.1), work)
    in_time = simulate(replace(shared, notice_s=11.0), work)
    assert min(late.events["preemption"], in_time.events["preemption"]) > 5
    assert in_time.samples_per_s > late.samples_per_s


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    cluster = replace(PLAIN, response_spread=0.5, straggler_fraction=0.05, death_every_s=300.0)
    work = replace(WORK, max_lag_steps=1)
    assert simulate(cluster, work) == simulate(cluster, work)
    assert simulate(cluster, work).seconds != simulate(cluster, replace(work, seed=1)).seconds


def test_masking_old_tokens_does_not_wait_for_stragglers():
    cluster = replace(PLAIN, actors=8, slots=16, response_spread=0.5, straggler_fraction=0.05, learn_s=10.0)
    work = replace(WORK, batch_size=64, max_lag_steps=2, steps=60)
    expire, mask = simulate(cluster, work), simulate(cluster, replace(work, stale_tokens="mask"))
    assert max(expire.lags) <= 2 < max(mask.lags)
    assert expire.stale_token_fraction == 0
    assert 0 < mask.stale_token_fraction < 0.05 * 20 / (0.95 + 0.05 * 20)  # not all that stragglers sampled
    assert mask.samples_per_s > 1.5 * expire.samples_per_s


@pytest.mark.parametrize("max_lag_steps", [0, 1, 2])
@pytest.mark.parametrize("actors", [1, 3, 8, 24, 64])
@pytest.mark.parametrize("stale_tokens", ["expire", "mask"])
def test_nothing_exceeds_the_ideal(actors, max_lag_steps, stale_tokens):
    cluster = Cluster(actors=actors, slots=16, learn_s=15.0)
    work = Workload(
        steps=20, batch_size=128, group_size=4, max_lag_steps=max_lag_steps, stale_tokens=stale_tokens, seed=actors
    )
    result = simulate(cluster, work)
    assert result.counts["trained"] / result.seconds <= 1.01 * ideal(cluster, work).samples_per_s


@pytest.mark.parametrize(
    ("cluster", "max_lag_steps", "limit"),
    [
        (Cluster(actors=2), 2, "generation"),  # 12.8 of 25 samples a second
        (Cluster(actors=16), 2, "learning"),
        (Cluster(actors=64, response_s=60.0), 0, "staleness"),
    ],
)
def test_away_from_the_crossover_the_ideal_is_reached(cluster, max_lag_steps, limit):
    work = Workload(steps=20, batch_size=512, max_lag_steps=max_lag_steps)
    best = ideal(cluster, work)
    assert best.limit == limit
    assert simulate(cluster, work).samples_per_s >= 0.95 * best.samples_per_s


def test_autoscaling_finds_the_number_that_keeps_the_learner_busy():
    # The learner takes 128 samples in 20.5 s, an actor makes 1.6 a second: four are enough.
    cluster = Cluster(actors=1, slots=16, autoscale=True, max_actors=64, restart_s=30.0)
    work = Workload(steps=60, batch_size=128, max_lag_steps=2)
    grown = simulate(cluster, work)
    assert 4 <= grown.workers <= 5.5
    assert 4 <= simulate(replace(cluster, actors=40), work).workers <= 8
    assert grown.samples_per_s > 0.9 * 128 / 20.5


def following(**changed):
    """The benchmark of work that rises and falls, short: one worker is enough, then four, then one."""
    arguments = argparse.Namespace(steps=16, slow_s=44.0, fast_s=11.0)
    cluster = Cluster(actors=1, slots=16, learn_s=0.0, restart_s=30.0, autoscale=True, max_actors=4)
    return scheduling.follow(arguments, replace(cluster, **changed))


def test_workers_follow_the_work_up_and_down():
    found, four = following(), following(actors=4, autoscale=False)
    numbers = [number for _, number in found.workers]
    top = numbers.index(4)
    assert numbers[0] == numbers[-1] == 1
    assert numbers == sorted(numbers[:top]) + sorted(numbers[top:], reverse=True)
    assert found.busy[0] > 0.9
    assert found.busy[2] > 0.95
    assert found.seconds < 1.12 * four.seconds
    assert found.worker_s < 0.6 * four.worker_s


def test_what_is_spent_on_workers_stays_below_the_ceiling():
    free, cheap = following(), following(max_actor_hours=0.5)
    since, left = cheap.workers[-1]
    assert left == 1
    assert 1200 < cheap.worker_s - (cheap.seconds - since) <= 1800  # until one was left, which always runs
    assert cheap.worker_s < free.worker_s


def test_the_command_prints_a_table(monkeypatch, capsys):
    arguments = ["--actors", "2", "--slots", "8", "--steps", "3", "--batch-size", "16", "--group-size", "4"]
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments, "--max-lag-steps", "0", "--stale-tokens", "mask"])
    module.main()
    table = capsys.readouterr().out
    assert "| trajectories | 48 issued, 48 trained, 0 quarantined, 0 expired, 0 dropped, 0 open |" in table


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--actors", "0"], "actors is 0, allowed is at least 1"),
        (["--learn-s", "-1"], "learn_s is -1.0, allowed is at least 0"),
        (["--group-size", "0"], "training.samples_per_prompt: "),
        (["--batch-size", "12", "--group-size", "8"], "batch_size 12 is not divisible by samples_per_prompt 8"),
        (["--actors", "many"], "invalid int value: 'many'"),
    ],
)
def test_impossible_parameters_are_one_line_and_status_2(arguments, reason, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simulate", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
