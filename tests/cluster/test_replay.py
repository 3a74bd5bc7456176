"""`headrace replay` refuses what it could not compute bit for bit, before it starts anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster import experience_log, resume
from cluster.progress import Progress
from cluster.reproducible import decisive_settings, differences
from cluster.run_log import RunLog
from contracts.config import Config, ConfigError
from contracts.loading import dump, validate
from learner.numerics import numerics, threads_of
from models.weights import digest, folder_digest
from tests.cluster.test_train import headrace
from tests.rollouts import scored_rollout


def settings(run_dir: Path, **changes: Any) -> Config:
    data = {
        "output_dir": str(run_dir),
        "model": {"path": "tiny"},
        "prompts": {"path": "prompts.jsonl"},
        "rewards": [{"name": "x", "function": "a:b"}],
        "learner": {"threads": 2},
    }
    return validate(data | changes, source="test")


def here(config: Config) -> dict[str, str]:
    return numerics(config.learner, threads=threads_of(config.learner))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1 to 4 of a run without a checkpoint, trained where this test runs."""
    (tmp_path / "experience").mkdir()
    config = settings(tmp_path)
    (tmp_path / "config.yaml").write_text(dump(config))
    for step in range(1, 5):
        log(tmp_path, step, here(config), decisive_settings(config))
    return tmp_path


def log(run_dir: Path, step: int, environment: dict[str, str], decisive: dict[str, Any], **state: Any) -> None:
    state = {"environment": environment, "settings": decisive, "leases": {"counts": {"quarantined": 1}}} | state
    experience_log.write(run_dir, step, [scored_rollout(f"t{step}")], state)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = headrace(capsys, "replay", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    return err.removeprefix("error: ").strip()


def test_what_is_not_there_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, run_dir / "none", "--step", 1)
    assert said.endswith("none/config.yaml: cannot be read: No such file or directory")
    assert refusal(capsys, run_dir, "--step", 9) == f"--step 9: {run_dir / 'experience'} holds steps 1 to 4"
    assert refusal(capsys, run_dir, "--step", 2, "--to", run_dir).startswith(f"--to {run_dir}: exists already")
    experience_log.path_of(run_dir, 2).unlink()
    assert refusal(capsys, run_dir, "--step", 3) == f"{experience_log.path_of(run_dir, 2)}: is missing"


def test_other_settings_ranks_and_threads_are_refused_with_what_differs(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for override, difference in [
        ("learner.threads=1", "learner_threads: 2 -> 1"),
        ("learner.num_ranks=2", "learner_ranks: 1 -> 2"),
        ("training.learning_rate=1e-3", "training.learning_rate: 1e-06 -> 0.001"),
        ("seed=4", "seed: 0 -> 4"),
        ("sampling.temperature=0.5", "sampling.temperature: 1.0 -> 0.5"),
        ("training.schedule=linear", "steps: None -> 100; training.schedule: constant -> linear"),
    ]:
        said = refusal(capsys, run_dir, "--step", 3, override)
        assert said == (
            f"step 1 of {run_dir} cannot be computed again bit for bit, these differ (run -> here): {difference}"
        )
    # What the learner's arithmetic does not depend on may differ: it goes on to what it cannot load.
    status, _, err = headrace(capsys, "replay", run_dir, "--step", 3, "steps=7", "streaming.max_lag_steps=3", "x=1")
    assert (status, "x: unknown key" in err) == (2, True)


@pytest.mark.parametrize("name", ["torch", "transformers", "headrace", "processor"])
def test_another_version_is_refused_also_where_only_one_step_had_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = settings(run_dir)
    log(run_dir, 3, here(config) | {name: "0.0.1"}, decisive_settings(config))
    now = here(config)[name]
    said = refusal(capsys, run_dir, "--step", 4)
    assert said.startswith(f"step 3 of {run_dir} cannot be computed again bit for bit")
    assert said.endswith(f"(run -> here): {name}: 0.0.1 -> {now}")


def test_only_settings_that_decide_are_compared(tmp_path: Path) -> None:
    base = settings(tmp_path)
    free = settings(tmp_path / "moved", steps=7, rollout={"num_workers": 3}, streaming={"max_lag_steps": 4})
    assert differences(decisive_settings(base), decisive_settings(free)) == []
    masked = settings(tmp_path, streaming={"max_lag_steps": 4, "stale_tokens": "mask"})
    assert differences(decisive_settings(base), decisive_settings(masked)) == [
        "streaming.max_lag_steps: None -> 4",
        "streaming.stale_tokens: expire -> mask",
    ]
    linear = settings(tmp_path, training={"schedule": "linear"})
    longer = settings(tmp_path, training={"schedule": "linear"}, steps=200)
    assert differences(decisive_settings(linear), decisive_settings(longer)) == ["steps: 100 -> 200"]


def test_a_folders_digest_is_that_of_its_tensors_in_however_many_files(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4).bfloat16(), "b.weight": torch.randn(5).bfloat16()}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"model-{name[0]}.safetensors")
    assert folder_digest(tmp_path) == digest(tensors)
    save_file({"b.weight": -tensors["b.weight"]}, tmp_path / "model-b.safetensors")
    assert folder_digest(tmp_path) != digest(tensors)
    with pytest.raises(ValueError, match="holds no"):
        folder_digest(tmp_path / "none")


def resumption(run_dir: Path) -> resume.Resumption:
    from cluster.preflight import Preflight

    with Progress(0) as progress:
        found = resume.resumption(settings(run_dir), Preflight([], [], "tiny", 0), progress)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("rows", "last_row"), [((1, 2, 3, 4), 4), ((1, 2, 3), 3), ((), 0), ((1, 3, 4), 1), ((1, 2, 3, 4, 5), 4)]
)
def test_a_resumed_run_goes_on_after_the_last_logged_batch(run_dir: Path, rows: tuple[int, ...], last_row: int) -> None:
    """Rows that are there stay; from the first that is missing on, they are written again."""
    lines = "".join(f'{{"step": {step}, "reward_mean": 0}}\n' for step in rows)
    (run_dir / "metrics.jsonl").write_text(lines + '{"step": 5, "rewa')
    (run_dir / "quarantine.jsonl").write_text('{"step": 5}\n{"step": 2}\n{"step"')
    found = resumption(run_dir)
    assert (found.checkpoint, found.last_logged, found.last_row, found.quarantined) == (None, 4, last_row, 1)
    RunLog(
        run_dir,
        resume_step=found.last_logged,
        last_row=found.last_row,
        quarantined=found.quarantined,
    ).close()
    kept = (run_dir / "metrics.jsonl").read_text().count("\n")
    assert kept == last_row
    assert (run_dir / "quarantine.jsonl").read_text() == '{"step": 5}\n'  # as many as the run had counted by then


def test_a_damaged_batch_and_what_follows_are_done_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experience_log.path_of(run_dir, 3).write_bytes(b"PAR1")
    assert resumption(run_dir).last_logged == 2
    said = capsys.readouterr().err
    assert "warning: steps after 2 are done again: " in said
    assert "step-000003.parquet: is damaged" in said


def test_a_run_without_any_batch_starts_over(run_dir: Path) -> None:
    for step in experience_log.steps(run_dir):
        experience_log.path_of(run_dir, step).unlink()
    found = resumption(run_dir)
    assert (found.step, found.last_logged, found.state, found.quarantined) == (0, 0, None, 0)


def test_no_whole_checkpoint_among_several_is_an_error_not_a_start_over(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-000002" / "MANIFEST.json").write_text("{}")
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        resumption(run_dir)
