"""Records survive Parquet, refuse lists that disagree, and need no tensor library."""

import dataclasses
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from contracts.records import (
    COMPARISON_SCHEMA,
    EXPERIENCE_SCHEMA,
    Comparison,
    Rollout,
    ScoredRollout,
    comparison_table,
    experience_records,
    experience_table,
)

ROLLOUT = Rollout(
    trajectory_id="t1",
    prompt_id="p1",
    group_id="g1",
    prompt_tokens=[1, 2, 3],
    response_tokens=[4, 5],
    response_text="naïve ☕",
    behavior_logprobs=[-0.5, -1.25],
    weights_versions=[3, 4],
    finish_reason="stop",
    actor_id="a0",
)
SCORED = ScoredRollout(
    rollout=ROLLOUT,
    reward=0.1 + 0.2,
    reward_components={"helpful": 1.5, "length": -0.25},
    reward_version="r7",
    reference_logprobs=[-0.75, -1.0],
)


def through_parquet(records, path):
    pq.write_table(experience_table(records), path)
    return experience_records(pq.read_table(path))


def test_scored_rollouts_come_back_from_parquet_in_order(tmp_path):
    other = dataclasses.replace(
        SCORED,
        rollout=dataclasses.replace(ROLLOUT, trajectory_id="t0", finish_reason="length"),
        reward_components={},
    )
    assert through_parquet([SCORED, other], tmp_path / "step.parquet") == [SCORED, other]


def test_logprobs_come_back_as_float32_and_rewards_as_float64(tmp_path):
    third = dataclasses.replace(ROLLOUT, behavior_logprobs=[-1 / 3, -1e-9])
    [back] = through_parquet([dataclasses.replace(SCORED, rollout=third, reward=1 / 3)], tmp_path / "step.parquet")
    assert back.rollout.behavior_logprobs == [float(np.float32(-1 / 3)), float(np.float32(-1e-9))]
    assert back.reward == 1 / 3


def test_experience_files_have_the_columns_and_version_that_others_read(tmp_path):
    pq.write_table(experience_table([]), tmp_path / "step.parquet")
    table = pq.read_table(tmp_path / "step.parquet")
    assert experience_records(table) == []
    assert table.schema.metadata[b"headrace_schema_version"] == b"1"
    promised = {
        "trajectory_id", "prompt_id", "group_id", "prompt_tokens", "response_tokens", "behavior_logprobs",
        "weights_versions", "reference_logprobs", "reward", "reward_components", "reward_version", "finish_reason",
        "actor_id",
    }  # fmt: skip
    assert promised <= set(table.column_names)
    assert table.schema.equals(EXPERIENCE_SCHEMA)


def test_lists_of_different_lengths_are_refused_by_name():
    with pytest.raises(ValueError, match="trajectory t1 from a0: 1 behavior_logprobs for 2 response tokens"):
        dataclasses.replace(ROLLOUT, behavior_logprobs=[-1.0])
    with pytest.raises(ValueError, match="3 weights_versions for 2"):
        dataclasses.replace(ROLLOUT, weights_versions=[1, 1, 1])
    with pytest.raises(ValueError, match="trajectory t1: 1 reference_logprobs for 2"):
        dataclasses.replace(SCORED, reference_logprobs=[0.0])


def test_the_oldest_version_counts():
    assert dataclasses.replace(ROLLOUT, weights_versions=[5, 3]).oldest_version == 3


def test_comparisons_are_plain_prompt_chosen_rejected(tmp_path):
    pq.write_table(comparison_table([Comparison("q", "good", "bad", probability=0.75)]), tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    assert table.schema.equals(COMPARISON_SCHEMA)
    [row] = table.to_pylist()
    assert (row["prompt"], row["chosen"], row["rejected"], row["probability"]) == ("q", "good", "bad", 0.75)


def test_contracts_import_neither_torch_nor_ray_nor_vllm():
    code = (
        "import sys, contracts.config, contracts.records; "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == "[]"
