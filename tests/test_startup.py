"""Where the time of a start goes, from small event files."""

import pytest

from benchmarks.cluster.startup import Stage, stages

PHASES = [(100.0, "The command"), (104.0, "Loading m"), (110.0, "Starting Ray"), (150.0, "The first training response")]


def events(phases: list[tuple[float, str]]) -> list[dict[str, object]]:
    others = {"event": "start", "time": 105.0, "consequence": ""}
    return [others, *({"event": "phase", "time": at, "consequence": name} for at, name in phases)]


def test_each_stage_ends_where_the_next_begins_and_the_update_is_the_learners_part() -> None:
    rows = [{"time": 180.0, "learn_s": 12.0, "publish_s": 3.0}, {"time": 300.0, "learn_s": 9.0, "publish_s": 3.0}]
    assert stages(events([*PHASES, (200.0, "Evaluating version 2")]), rows) == [
        Stage("The command", 100.0, 104.0),
        Stage("Loading m", 104.0, 110.0),
        Stage("Starting Ray", 110.0, 150.0),
        Stage("The first training response", 150.0, 165.0),
        Stage("The first update", 165.0, 177.0),
        Stage("Its weights are published", 177.0, 180.0),
    ]


def test_of_a_resumed_run_only_the_last_command_counts() -> None:
    second = [(at + 1000.0, name) for at, name in PHASES]
    rows = [{"time": at, "learn_s": 12.0, "publish_s": 3.0} for at in (180.0, 1190.0)]
    assert stages(events([*PHASES, *second]), rows)[0].begun == 1100.0
    assert stages(events([*PHASES, *second]), rows)[-1].ended == 1190.0


def test_files_that_do_not_say_it_are_refused() -> None:
    with pytest.raises(ValueError, match="does not say when the command began"):
        stages(events([]), [])
    with pytest.raises(ValueError, match="no step of the last command"):
        stages(events(PHASES), [{"time": 90.0, "learn_s": 1.0, "publish_s": 1.0}])
