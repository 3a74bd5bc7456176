"""The experience log gives back the bits that were trained on, and says up to where it is whole."""

import struct
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cluster import experience_log
from contracts.records import experience_table
from learner.experience import to_experience
from tests.rollouts import scored_rollout

STATE = {"step": 0}


def float32s(pattern: int) -> float:
    return struct.unpack("<f", struct.pack("<I", pattern))[0]


# Doubles that float32 does not hold: between two neighbours and exactly half way (to even, both ways), denormal ones,
# too small for any, negative zero, the largest.
LOGPROBS = [
    -0.1,
    -1 / 3,
    -(1 + 2.0**-24),
    -(1 + 3 * 2.0**-24),
    -1e-40,
    -(2.0**-150),
    -1e-60,
    -0.0,
    -5.123456789012345,
    float32s(0xFF7FFFFF),
]


def test_a_batch_read_back_is_the_batch_that_was_trained_on(run_dir: Path) -> None:
    live = [
        scored_rollout(f"t{row}", response=range(3, 13), behavior=LOGPROBS[row:] + LOGPROBS[:row],
                       reference=LOGPROBS[::-1], reward=0.1 * row + 1e-17, group_id=f"g{1 - row // 2}")
        for row in range(4)
    ]  # fmt: skip
    experience_log.write(run_dir, 7, live, STATE)
    found = to_experience(experience_log.batch(run_dir, 7), token_budget=100)
    expected = to_experience(live, token_budget=100)
    assert any(
        float(value) != logprob for value, logprob in zip(expected.behavior_logprobs_BT[0], LOGPROBS, strict=True)
    )
    for name, tensor in vars(expected).items():
        other = getattr(found, name)
        if not isinstance(tensor, torch.Tensor):
            assert other == tensor, name
            continue
        bits = [each.view(torch.int32) if each.dtype == torch.float32 else each for each in (tensor, other)]
        assert torch.equal(*bits), name


def test_the_state_comes_back_and_the_file_stays_an_ordinary_table(run_dir: Path) -> None:
    batch = [scored_rollout("t0"), scored_rollout("t1")]
    experience_log.write(run_dir, 3, batch, {"open_prompts": ["ö", "p1"], "step": 3})
    assert experience_log.state(run_dir, 3) == {"open_prompts": ["ö", "p1"], "step": 3}
    assert pq.read_table(experience_log.path_of(run_dir, 3)).to_pylist() == experience_table(batch).to_pylist()


def write(run_dir: Path, *steps: int) -> None:
    for step in steps:
        experience_log.write(run_dir, step, [scored_rollout(f"t{step}", response=range(1, 200))], STATE)


def write_old(run_dir: Path, step: int) -> None:
    pq.write_table(experience_table([scored_rollout()]), experience_log.path_of(run_dir, step))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "experience").mkdir()
    return tmp_path


def test_it_is_whole_up_to_the_first_step_that_is_missing(run_dir: Path) -> None:
    assert experience_log.last_whole(run_dir, after=0) == (0, "")
    write(run_dir, 3, 4, 5)
    assert experience_log.last_whole(run_dir, after=2) == (5, "")
    assert experience_log.last_whole(run_dir, after=5) == (5, "")
    assert experience_log.last_whole(run_dir, after=8) == (8, "")
    experience_log.path_of(run_dir, 4).unlink()
    assert experience_log.last_whole(run_dir, after=2) == (3, f"{experience_log.path_of(run_dir, 4)}: is missing")


def test_a_file_damaged_anywhere_ends_it(run_dir: Path) -> None:
    write(run_dir, 1, 2)
    path = experience_log.path_of(run_dir, 2)
    whole = path.read_bytes()
    token = whole.index(b"t2")  # a page's content: the footer knows nothing of it
    changed = whole[:token] + b"X" + whole[token + 1 :]
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], changed):
        path.write_bytes(damaged)
        last, problem = experience_log.last_whole(run_dir, after=0)
        assert last == 1
        assert problem.startswith(f"{path}: is damaged: ")
    path.write_bytes(whole)
    assert experience_log.last_whole(run_dir, after=0) == (2, "")


def test_a_file_from_before_states_were_kept_ends_it(run_dir: Path) -> None:
    write(run_dir, 1)
    write_old(run_dir, 2)
    last, problem = experience_log.last_whole(run_dir, after=0)
    assert (last, problem) == (1, f"{experience_log.path_of(run_dir, 2)}: does not say where the run stood")
