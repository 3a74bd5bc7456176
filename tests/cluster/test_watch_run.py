"""A whole run whose reward leaves its held-out reward behind: alarm, tasks, roll back, and on again."""

from pathlib import Path

import pytest

from cluster.preflight.run_folder import finished_checkpoints
from feedback.store import Store
from tests.cluster.test_train import write_config, write_project
from tests.command import Command, rows

pytestmark = pytest.mark.slow

JUDGES = '''
from pathlib import Path

def steady(prompts, responses):
    return [response.lower().count("e") / max(1, len(response)) for response in responses]

def leaving(prompts, responses):
    """The same, until three steps are trained on."""
    gone = Path("run/experience/step-000003.parquet").exists()
    return [score + 5.0 * gone for score in steady(prompts, responses)]
'''


@pytest.fixture(autouse=True)
def _ray_folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))


def test_an_alarm_rolls_the_run_back_and_it_can_go_on(tiny_model: Path, tmp_path: Path):
    config = write_project(tmp_path, tiny_model)
    (tmp_path / "watched_judges.py").write_text(JUDGES)
    config |= {
        "steps": 8,
        "rewards": [
            {"name": "proxy", "function": "watched_judges:leaving"},
            {"name": "other", "function": "watched_judges:steady", "weight": 0},
        ],
        "checkpoint": {"every_steps": 1, "keep": 2},
        "watch": {
            "reference_steps": 2,
            "held_out": {"raise_after": 1},
            **dict.fromkeys(("disagreement", "repetition", "sameness", "length", "outliers")),
            "on_alarm": "roll_back",
            "feedback_store": "feedback.db",
            "suspicious": 4,
        },
    }
    write_config(tmp_path, config)
    run_dir = tmp_path / "run"
    with Command("train", "config.yaml", cwd=tmp_path) as command:
        assert command.status() == 0
        assert "alarm: held_out" in command.output
        assert "the policy of step 3 is the newest now" in command.output
        assert command.processes.wait_gone() == []
    events = {row["event"]: row for row in rows(run_dir / "events.jsonl")}
    assert "since" not in events["alarm"]["cause"]  # raised in the first step in which it was seen
    assert finished_checkpoints(run_dir) == [3]
    assert finished_checkpoints(run_dir / "rolled_back" / "step-000004") == [4]
    assert not (run_dir / "experience" / "step-000004.parquet").exists()
    before = rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in before] == [1, 2, 3, 4]
    assert before[3]["watch/held_out_drift"] > 5 > 1 > before[2]["watch/held_out_drift"]
    assert before[3]["watch/alarms"] == 1
    with Store(tmp_path / "feedback.db") as store:
        anna, _ = store.register("anna")
        task = store.next_task(anna)
        assert task is not None
        assert task.prompt.startswith("Question")
        queued = [
            row["consequence"] for row in rows(run_dir / "events.jsonl") if "wait for votes" in row["consequence"]
        ]
        assert queued == [f"{store.progress(anna).open_tasks} tasks with suspicious responses wait for votes"]

    with Command("train", "config.yaml", "resume=true", "steps=5", "watch.on_alarm=warn", cwd=tmp_path) as command:
        assert command.status() == 0
        assert command.processes.wait_gone() == []
    after = rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5]
    assert after[2] == before[2]
    assert after[3]["watch/held_out_drift"] == pytest.approx(before[3]["watch/held_out_drift"], rel=0.2)
    assert finished_checkpoints(run_dir)[-1] == 5
