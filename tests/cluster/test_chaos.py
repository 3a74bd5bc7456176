"""What the chaos run proves from files: a proof that cannot fail proves nothing, so each lie here is found out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.prompts import PromptStream
from benchmarks.chaos.audit import audit
from benchmarks.chaos.recovery import Strike, has_shown, seconds_to_recover
from benchmarks.chaos.strikes import happened
from cluster import experience_log
from contracts.records import Prompt, Rollout, ScoredRollout

STEPS, SIZE, PROMPTS = 4, 2, ["a", "b", "c"]


def sample(group: int, number: int, prompt_id: str, version: int) -> ScoredRollout:
    rollout = Rollout(
        trajectory_id=f"g{group:08d}-{number}",
        prompt_id=prompt_id,
        group_id=f"g{group:08d}",
        prompt_tokens=[1],
        response_tokens=[2, 3],
        response_text="",
        behavior_logprobs=[-1.0, -1.0],
        weights_versions=[version, version],
        finish_reason="stop",
        actor_id="rollout-0",
    )
    return ScoredRollout(rollout, 1.0, {"x": 1.0}, "x", [-1.0, -1.0])


class Files:
    """A run of one group a step, whose third group expired and was issued again as the fourth."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "experience").mkdir()
        stream = PromptStream([Prompt(name, [], "", []) for name in PROMPTS], seed=7)
        order = [stream.next().prompt_id for _ in range(5)]
        groups = {1: (0, order[0]), 2: (1, order[1]), 3: (3, order[2]), 4: (4, order[3])}
        self.batches = {
            step: [sample(group, number, prompt, step - 1) for number in range(SIZE)]
            for step, (group, prompt) in groups.items()
        }
        issued = {1: 1, 2: 3, 3: 4, 4: 6}
        self.states = {
            step: {
                "prompts": {"epoch": (issued[step] - (step > 2)) // 3, "position": (issued[step] - (step > 2)) % 3},
                "leases": {"next_group": issued[step], "counts": self._counts(issued[step], step)},
                "open_prompts": order[4:5] if step == STEPS else [],
            }
            for step in groups
        }
        self.rows: list[dict[str, Any]] = [{"step": step} for step in groups]
        self.events = [{"event": "expiry", "who": "g00000002 of rollout-0", "step": 2}]

    @staticmethod
    def _counts(issued: int, trained: int) -> dict[str, int]:
        given_up = issued - trained
        return {"issued": 2 * issued, "trained": 2 * trained, "quarantined": 0, "expired": 2 * given_up, "dropped": 0}

    def problems(self) -> list[str]:
        for step, batch in self.batches.items():
            experience_log.write(self.folder, step, batch, self.states[step])
        return audit(
            self.folder,
            steps=STEPS,
            samples_per_prompt=SIZE,
            max_lag_steps=1,
            prompt_ids=PROMPTS,
            seed=7,
            rows=self.rows,
            events=self.events,
            quarantined=[],
        )


def test_an_honest_run_passes(tmp_path: Path) -> None:
    assert Files(tmp_path).problems() == []


def doubled(files: Files) -> None:
    files.batches[3][0] = files.batches[2][0]


def too_old(files: Files) -> None:
    files.batches[4] = [sample(4, number, "b", 1) for number in range(SIZE)]


def torn_group(files: Files) -> None:
    del files.batches[2][1]


def lost_group(files: Files) -> None:
    files.events.clear()
    files.states[STEPS]["open_prompts"] = []


def lost_step(files: Files) -> None:
    del files.rows[1]


def step_twice(files: Files) -> None:
    files.rows.insert(1, files.rows[1])


def other_prompt(files: Files) -> None:
    known = files.batches[1][0].rollout.prompt_id
    files.batches[1] = [sample(0, number, next(p for p in PROMPTS if p != known), 0) for number in range(SIZE)]


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        (doubled, "g00000001-0 was trained 2 times"),
        (too_old, "g00000004-0 has a lag of 2 in step 4"),
        (torn_group, "g00000001-1 of a trained group is neither trained nor in quarantine"),
        (lost_group, "2 groups have no fate, and 0 were open"),
        (lost_step, "metrics.jsonl does not hold"),
        (step_twice, "metrics.jsonl does not hold"),
        (other_prompt, "was lost 1 times"),
    ],
)
def test_a_lie_is_found_out(tmp_path: Path, lie: Callable[[Files], None], found: str) -> None:
    files = Files(tmp_path)
    lie(files)
    assert any(found in problem for problem in files.problems()), files.problems()


def event(time: float, kind: str, who: str, cause: str = "", consequence: str = "") -> dict[str, Any]:
    return {"time": time, "event": kind, "who": who, "cause": cause, "consequence": consequence, "step": 0}


UP = [
    event(0, "start", "the run"),
    event(1, "start", "rollout-0"),
    event(1, "start", "rollout-1"),
    event(1, "start", "the learner"),
]
KILLED = Strike("rollout_idle", "process 7", 10.0, happened("death", "rollout-"))
DEATH, RESTART = event(11, "death", "rollout-0"), event(20, "restart", "rollout-2", "rollout-0 was lost")


def recovered(events: list[dict[str, Any]], *finished: float, strike: Strike = KILLED, now: float = 60) -> float | None:
    rows = [{"time": time} for time in finished]
    return seconds_to_recover(strike, events, rows, num_workers=2, now=now)


def test_a_run_has_recovered_with_the_first_step_after_everything_is_back() -> None:
    assert recovered([*UP, DEATH, RESTART], 15, 19, 22, 30) == 12
    assert recovered([*UP, DEATH, RESTART], 15, 19) is None
    assert recovered([*UP, DEATH], 15, 30) is None
    assert recovered([*UP], 15, 30) is None
    assert not has_shown(KILLED, UP)
    assert recovered([*UP, DEATH, RESTART], 22, now=21) is None, "more may be missing"


def test_what_a_loss_takes_along_counts_too() -> None:
    other = [event(21, "death", "the reference model"), event(40, "restart", "the reference model")]
    assert recovered([*UP, DEATH, RESTART, *other], 22, 30, 41) == 31
    ranks = [event(12, "death", "learner rank 1 of 2"), event(25, "restart", "the learner")]
    assert recovered([*UP, DEATH, *ranks[:1], RESTART, *ranks[1:]], 22, 30) == 20


def test_a_lost_node_is_made_up_for_when_all_that_it_took_is_back() -> None:
    strike = Strike("node_lost", "node ab", 10.0, happened("death", "node ab"))
    node = event(12, "death", "node ab", "", "rollout-0 is replaced; learner rank 1 is replaced")
    back = [event(20, "restart", "rollout-2"), event(26, "restart", "the learner")]
    assert recovered([*UP, node], 15, strike=strike) is None
    assert recovered([*UP, node, *back], 15, 22, 27, strike=strike) == 17


def test_a_full_disk_counts_from_where_it_bit_until_the_checkpoint_is_whole() -> None:
    written = happened("checkpoint", "the learner")
    strike = Strike("disk_full", "", 10.0, happened("disk_full", ""), until=written, from_sign=True)
    full = event(15, "disk_full", "the learner")
    assert recovered([*UP, full], 16, 18, strike=strike) is None
    assert recovered([*UP, full, event(17, "checkpoint", "the learner")], 16, 18, strike=strike) == 3
