"""What an alarm leads to: tasks for people, and the files of a run that is rolled back."""

import json
from pathlib import Path

import pytest

from cluster import experience_log
from cluster.watch.acting import queue_tasks, roll_back
from cluster.watch.watching import Alarm
from contracts.config import ConfigError
from contracts.loading import validate
from contracts.records import Prompt
from feedback.store import Store
from feedback.store.records import Judgment
from learner import checkpoint as checkpoints
from tests.cluster.watch.batches import response

ALARM = Alarm("length", step=9, onset=8, value=90.0, usual=40.0, drift=3.0, suspicious=(2, 3, 0, 1))


def test_suspicious_responses_become_tasks(tmp_path: Path):
    samples = [
        response([1, 1], "a", {"proxy": 1.0}, reward=1.0, text="long", number=0),
        response([1], "a", {"proxy": 1.0}, reward=1.0, text="short", number=1),
        response([2, 2, 2], "b", {"proxy": 1.0}, reward=1.0, text="alone and long", number=2),
        response([3], "c", {"proxy": 1.0}, reward=1.0, text="no\0text", number=3),
    ]
    prompts = {
        f"prompt of {name}": Prompt(
            f"prompt of {name}", [1], f"Ask {name}?", [{"role": "user", "content": f"Ask {name}?"}]
        )
        for name in "abc"
    }
    place = str(tmp_path / "feedback.db")
    assert queue_tasks(place, ALARM, samples, prompts, votes=2) == 2  # 0 and 1 are one pair, 3 is no text
    assert queue_tasks(place, ALARM, samples, prompts, votes=2) == 2  # the same again adds nothing
    with Store(place) as store:
        anna, _ = store.register("anna")
        given = []
        while (task := store.next_task(anna, lease_s=60)) is not None:
            given.append(task)
            answer = Judgment(task.task_id, choice="a") if task.kind == "pair" else Judgment(task.task_id, value=0)
            store.submit(anna, task.task_id, answer, lease_id=task.lease_id)
    assert {(task.kind, task.prompt, task.response_a, task.response_b) for task in given} == {
        ("pair", "Ask a?", "long", "short"),
        ("label", "Ask b?", "alone and long", None),
    }
    assert len(given) == 2


def _checkpoint(run_dir: Path, step: int) -> None:
    folder = checkpoints.begin(run_dir, step)
    (folder / "state" / "run.json").write_text("{}")
    checkpoints.finish(folder, step, keep=99)


@pytest.mark.parametrize(("onset", "to_step"), [(8, 6), (6, 3), (2, 0)])
def test_what_came_after_the_last_good_checkpoint_is_set_aside(tmp_path: Path, onset: int, to_step: int):
    (tmp_path / "experience").mkdir()
    for step in range(1, 11):
        experience_log.write(tmp_path, step, [response([1], "a", {"p": 1.0}, reward=1.0)], {"step": step})
        if step in (3, 6, 9, 10):
            _checkpoint(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    alarm = Alarm("length", step=9, onset=onset, value=90.0, usual=40.0, drift=3.0, suspicious=())
    step, aside = roll_back(tmp_path, alarm, at_step=10)
    assert step == to_step
    assert [saved.step for saved in checkpoints.finished(tmp_path)] == [each for each in (3, 6) if each <= to_step]
    assert experience_log.steps(tmp_path) == list(range(1, to_step + 1))
    assert [saved.step for saved in checkpoints.finished(aside)] == [each for each in (3, 6, 9, 10) if each > to_step]
    assert experience_log.steps(aside) == list(range(to_step + 1, 11))
    for saved in checkpoints.finished(aside):
        checkpoints.verify(saved)
    why = json.loads((aside / "why.json").read_text())
    assert (why["alarm"], why["onset"], why["from_step"], why["to_step"]) == ("length", onset, 10, to_step)
    assert (tmp_path / "metrics.jsonl").exists()


def _config(**changes):
    return {
        "output_dir": "runs/none",
        "model": {"path": "none"},
        "prompts": {"path": "none.jsonl"},
        "rewards": [{"name": "none", "function": "none:none"}],
        **changes,
    }


def test_a_roll_back_needs_a_checkpoint_from_before():
    validate(_config(watch={"on_alarm": "roll_back"}), source="here")
    for changes in ({"checkpoint": {"keep": 1}}, {"checkpoint": {"every_steps": 1}}):
        with pytest.raises(ConfigError, match="roll_back needs a checkpoint from before"):
            validate(_config(watch={"on_alarm": "roll_back"}, **changes), source="here")
    validate(_config(watch={"on_alarm": "warn"}, checkpoint={"keep": 1}), source="here")
    with pytest.raises(ConfigError, match=r"watch.on_alarm"):
        validate(_config(watch={"on_alarm": "panic"}), source="here")
