"""Whether a run lost nothing, trained nothing twice and kept the staleness bound: from its files, not its counters.

What is proved, for a run whose prompts were all known: every step is there once; every trajectory was trained once, at
most as old as the bound allows; groups are whole; every group that was issued and not trained is accounted for by an
expiry or a resume, or was open at the end; and each prompt that the seeded order gave was trained on, or is open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.prompts import PromptStream
from cluster import experience_log
from contracts.records import Prompt
from learner.experience_queue import group_id

Row = Mapping[str, Any]


def audit(
    run_dir: Path,
    *,
    steps: int,
    samples_per_prompt: int,
    max_lag_steps: int,
    prompt_ids: Sequence[str],
    seed: int,
    rows: Sequence[Row],
    events: Sequence[Row],
    quarantined: Iterable[str],
) -> list[str]:
    """What is wrong; nothing if the proof holds.

    Args:
        rows: of metrics.jsonl, as they are in the file.
        prompt_ids: in the order of the prompt file, none held out.
    """
    wanted = list(range(1, steps + 1))
    wrong = []
    if [row["step"] for row in rows] != wanted:
        wrong.append(f"metrics.jsonl does not hold the steps 1 to {steps} once each, in order")
    if experience_log.steps(run_dir) != wanted:
        return [*wrong, f"experience/ does not hold the steps 1 to {steps}"]
    logged = {step: pq.read_table(experience_log.path_of(run_dir, step)).to_pylist() for step in wanted}
    bad = set(quarantined)
    wrong += _trajectories(logged, bad, samples_per_prompt, max_lag_steps)
    states = {step: experience_log.state(run_dir, step) for step in wanted}
    wrong += _accounts(logged, states, bad, samples_per_prompt, events)
    return wrong + _prompts(logged, states[steps], bad, samples_per_prompt, prompt_ids, seed)


def _trajectories(logged: Mapping[int, list[Row]], bad: set[str], size: int, max_lag_steps: int) -> list[str]:
    wrong: list[str] = []
    groups: dict[str, int] = {}
    ids = Counter(row["trajectory_id"] for batch in logged.values() for row in batch)
    wrong += [f"{name} was trained {count} times" for name, count in ids.items() if count > 1]
    wrong += [f"{name} was trained, and is in quarantine" for name in ids.keys() & bad]
    for step, batch in logged.items():
        for row in batch:
            lag = step - 1 - min(row["weights_versions"])
            if not 0 <= lag <= max_lag_steps:
                wrong.append(f"{row['trajectory_id']} has a lag of {lag} in step {step}")
            if groups.setdefault(row["group_id"], step) != step:
                wrong.append(f"{row['group_id']} is in steps {groups[row['group_id']]} and {step}")
    members = {f"{group}-{sample}" for group in groups for sample in range(size)}
    lost = sorted(members - ids.keys() - bad)
    return wrong + [f"{name} of a trained group is neither trained nor in quarantine" for name in lost]


def _accounts(
    logged: Mapping[int, list[Row]],
    states: Mapping[int, dict[str, Any]],
    bad: set[str],
    size: int,
    events: Sequence[Row],
) -> list[str]:
    """Each group number below the next one to be issued: trained, in quarantine, or given up for a reason."""
    wrong, last = [], max(logged)
    trained = {row["group_id"] for batch in logged.values() for row in batch}
    expired = {str(event["who"]).split()[0] for event in events if event["event"] == "expiry"}
    # What was queued or running when a batch was chosen is given up when the run resumes after that batch.
    resumed = [event["step"] for event in events if event["event"] == "resume" and event["step"] in states]
    given_up = max((int(states[step]["leases"]["next_group"]) for step in resumed), default=0)
    leases = states[last]["leases"]
    missing = []
    for number in range(int(leases["next_group"])):
        group = group_id(number)
        whole = all(f"{group}-{sample}" in bad for sample in range(size))
        if group not in trained and not whole and group not in expired and number >= given_up:
            missing.append(group)
    if len(missing) > len(states[last]["open_prompts"]):
        wrong.append(
            f"{len(missing)} groups have no fate, and {len(states[last]['open_prompts'])} were open: {missing}"
        )
    counts, rows = leases["counts"], sum(len(batch) for batch in logged.values())
    if (counts["trained"], counts["issued"]) != (rows, size * int(leases["next_group"])):
        wrong.append(f"the log holds {rows} trajectories of {leases['next_group']} groups, the books say {counts}")
    fates = sum(counts[fate] for fate in ("trained", "quarantined", "expired", "dropped"))
    if fates != counts["issued"]:
        wrong.append(f"issued is not trained + quarantined + expired + dropped: {counts}")
    return wrong


def _prompts(
    logged: Mapping[int, list[Row]], state: Row, bad: set[str], size: int, prompt_ids: Sequence[str], seed: int
) -> list[str]:
    """What the seeded order gave until the last batch was chosen, against what was trained or is still to be done."""
    stream = PromptStream([Prompt(name, [], "", []) for name in prompt_ids], seed=seed)
    given = state["prompts"]["epoch"] * len(prompt_ids) + state["prompts"]["position"]
    order = Counter(stream.next().prompt_id for _ in range(given))
    done = {row["group_id"]: row["prompt_id"] for batch in logged.values() for row in batch}
    left = Counter(done.values()) + Counter(state["open_prompts"])
    if bad and left != order:
        order = order & left  # a group of which nothing is left is in no file with its prompt
    lost, twice = order - left, left - order
    return [f"prompt {name} was lost {count} times" for name, count in lost.items()] + [
        f"prompt {name} was trained {count} times more than it was issued" for name, count in twice.items()
    ]
