"""Runs that kill -9 ends, and what resume=true makes of them: no trajectory lost, none trained twice, no seam."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster import experience_log
from cluster.preflight.run_folder import finished_checkpoints
from tests.cluster.same_run import differences
from tests.cluster.test_train import check_experience, end, steps, write_config, write_project
from tests.command import Command, rows

pytestmark = pytest.mark.slow
STEPS = 9
# What a step's row says of the time that it took, and of deliveries: not the same when it is done again.
TIMES = "time step_s wait_s learn_s publish_s generate_s score_s queue_blocked_s samples_per_s learner_busy_fraction \
rollout_idle_fraction generation_paused_s broadcast_keyframe_bytes trajectories_issued trajectories_expired \
trajectories_quarantined"


@pytest.fixture(autouse=True)
def _ray_folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))


@pytest.mark.parametrize("every_steps", [3, 100], ids=["after-a-checkpoint", "before-the-first-checkpoint"])
def test_a_killed_run_goes_on_where_its_log_ends(tiny_model: Path, tmp_path: Path, every_steps: int) -> None:
    config = write_project(tmp_path, tiny_model) | {"steps": STEPS, "streaming": {"max_lag_steps": 1}}
    config["checkpoint"] = {"every_steps": every_steps}
    config["algorithm"] = {"kl_coef": 0.1, "kl_target": 5.0, "normalise_values": True, "normalise_rewards": True}
    write_config(tmp_path, config)
    run_dir = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        command.until(lambda: steps(run_dir) >= 5, "step 5")
        command.kill()
    before, batches = rows(run_dir / "metrics.jsonl"), files(run_dir)
    start = max(finished_checkpoints(run_dir), default=0)
    logged = max(experience_log.steps(run_dir))
    assert logged > start
    torn(run_dir / "metrics.jsonl", last_step=logged - 1)  # as if it had been killed before the row of its last step
    with Command("train", "config.yaml", "resume=true", cwd=tmp_path) as command:
        ended = end(command, run_dir)
    assert (ended.status, ended.left) == (0, []), ended.output
    assert f"resuming after step {logged}, {logged - start} from the experience log" in ended.output
    assert "warning: step" not in ended.output
    after = rows(run_dir / "metrics.jsonl")
    assert after[: logged - 1] == before[: logged - 1]
    if len(before) == logged:  # the row that was lost says what it said
        assert without_times(after[logged - 1]) == without_times(before[logged - 1])
    assert {path: content for path, content in files(run_dir).items() if path in batches} == batches
    assert [row["step"] for row in after] == list(range(1, STEPS + 1))
    check_experience(run_dir, max_lag_steps=1)
    for row in after:
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
        fates = [row[f"trajectories_{fate}"] for fate in ("trained", "quarantined", "expired", "dropped")]
        assert row["trajectories_issued"] >= sum(fates)
    assert after[-1]["trajectories_quarantined"] == len(rows(run_dir / "quarantine.jsonl"))
    replay(run_dir, tmp_path)


def replay(run_dir: Path, folder: Path) -> None:
    """Across the seam, from the initial model: every step is what the run published, the last its checkpoint."""
    saved = run_dir / "checkpoints" / f"step-{STEPS:06d}"
    kept = folder / "kept"
    (run_dir / "checkpoints").rename(kept)
    with Command("replay", "run", "--step", str(STEPS), cwd=folder) as command:
        assert command.status() == 0, command.output
    assert f"{STEPS} of {STEPS} steps checked" in command.output
    found = load_file(run_dir / "replay" / saved.name / "model.safetensors")
    expected = load_file(kept / saved.name / "policy" / "model.safetensors")
    assert all(torch.equal(found[name].view(torch.int16), each.view(torch.int16)) for name, each in expected.items())


def test_a_log_that_was_changed_is_found_out_at_the_step_that_it_changes(tiny_model: Path, tmp_path: Path) -> None:
    """On two ranks."""
    config = write_project(tmp_path, tiny_model) | {"steps": 3, "learner": {"num_ranks": 2, "threads": 1}}
    config["checkpoint"] = {"every_steps": 100}
    write_config(tmp_path, config)
    run_dir = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
    with Command("replay", "run", "--step", "3", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
    assert "3 of 3 steps checked" in command.output
    assert "equal to run/checkpoints/step-000003" in command.output
    state = experience_log.state(run_dir, 2)
    assert (state["environment"]["learner_ranks"], state["environment"]["learner_threads"]) == ("2", "1")
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    assert environment.items() >= state["environment"].items()
    batch = experience_log.batch(run_dir, 2)
    object.__setattr__(batch[0], "reward", batch[0].reward + 1)
    experience_log.write(run_dir, 2, batch, state)
    with Command("replay", "run", "--step", "3", "--to", "changed", cwd=tmp_path) as command:
        assert command.status() == 1, command.output
    assert "step 2, computed again, gives other weights than the run published" in command.output
    assert not (tmp_path / "changed").exists()


def in_generation(run_dir: Path) -> bool:
    return steps(run_dir) >= 1 and steps(run_dir) == max(experience_log.steps(run_dir))


def in_the_learners_step(run_dir: Path) -> bool:
    """The batch is logged, its row is not written."""
    return max(experience_log.steps(run_dir), default=0) > steps(run_dir) >= 2


def in_a_checkpoint(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial"))


def training_and(command: Command, moment: Callable[[Path], bool], run_dir: Path) -> Callable[[], bool]:
    """Not while it starts: a run that was killed at such a moment looks the same until it trains."""
    return lambda: "Training with" in command.output and moment(run_dir)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 2)])
def test_a_deterministic_run_ends_the_same_however_often_it_was_interrupted(
    tiny_model: Path, tmp_path: Path, ranks: int, workers: int
) -> None:
    config = write_project(tmp_path, tiny_model) | {"steps": 14, "deterministic": True}
    config["rollout"] |= {"num_workers": workers, "threads": 1}
    config["learner"] = {"num_ranks": ranks, "threads": 1}
    config["checkpoint"] = {"every_steps": 2}
    config["algorithm"] = {"kl_coef": 0.1, "kl_target": 5.0, "normalise_values": True, "normalise_rewards": True}
    write_config(tmp_path, config)
    quiet, run_dir = tmp_path / "quiet", tmp_path / "run"
    with Command("train", "config.yaml", "output_dir=quiet", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
    again: list[str] = []
    for moment in (in_generation, in_the_learners_step, in_a_checkpoint):
        with Command("train", "config.yaml", *again, cwd=tmp_path) as command:
            command.until(training_and(command, moment, run_dir), moment.__name__)
            command.kill()
        again = ["resume=true"]
    logged = max(experience_log.steps(run_dir))
    torn(run_dir / "metrics.jsonl", last_step=logged - 1)  # after the log, before the row
    with Command("train", "config.yaml", "resume=true", cwd=tmp_path) as command:
        command.until(lambda: steps(run_dir) > logged, "another step")
        command.terminate()
        assert end(command, run_dir).status == 143, command.output
    with Command("train", "config.yaml", "resume=true", cwd=tmp_path) as command:
        assert command.status() == 0, command.output
    assert steps(run_dir) == 14
    assert differences(quiet, run_dir, scratch=tmp_path / "scratch") == []


def files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "experience").glob("*.parquet")}


def torn(path: Path, *, last_step: int) -> None:
    """Rows up to `last_step`, and the begin of the next."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:last_step]) + '{"step": ', encoding="utf-8")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMES.split()}
