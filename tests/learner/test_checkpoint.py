"""Checkpoints are whole or do not count."""

import hashlib
import json
import shutil

import pytest

from learner import checkpoint as checkpoints


def write(run_dir, step, *, keep=10, content=b"weights"):
    folder = checkpoints.begin(run_dir, step)
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(content)
    (folder / "state" / "learner.pt").write_bytes(b"optimizer")
    return checkpoints.finish(folder, step, keep=keep)


def steps(run_dir):
    return [each.step for each in checkpoints.finished(run_dir)]


def test_the_manifest_names_every_file_with_its_sha256(tmp_path):
    saved = write(tmp_path, 7)
    assert saved.path == tmp_path / "checkpoints" / "step-000007"
    assert json.loads((saved.path / "MANIFEST.json").read_text()) == {
        "schema_version": 1,
        "step": 7,
        "files": {
            "policy/model.safetensors": hashlib.sha256(b"weights").hexdigest(),
            "state/learner.pt": hashlib.sha256(b"optimizer").hexdigest(),
        },
    }
    assert saved.policy == saved.path / "policy"
    assert saved.state == saved.path / "state"
    checkpoints.verify(saved)


def test_a_checkpoint_counts_only_once_it_is_finished(tmp_path):
    folder = checkpoints.begin(tmp_path, 3)
    (folder / "state" / "learner.pt").write_bytes(b"half")
    assert steps(tmp_path) == []
    # Not even with a manifest: it is the renaming that counts.
    (folder / "MANIFEST.json").write_text('{"files": {}}')
    assert steps(tmp_path) == []
    assert checkpoints.newest_whole(tmp_path) == (None, [])


def test_a_folder_without_manifest_does_not_count(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2).path / "MANIFEST.json").unlink()
    assert steps(tmp_path) == [1]


def test_folders_of_other_names_do_not_count(tmp_path):
    path = write(tmp_path, 1).path
    shutil.copytree(path, path.with_name("step-000002.backup"))
    shutil.copytree(path, path.with_name("step-best"))
    assert steps(tmp_path) == [1]


def test_begin_leaves_nothing_of_an_earlier_attempt(tmp_path):
    first = checkpoints.begin(tmp_path, 1)
    (first / "left-over").write_text("x")
    assert sorted(path.name for path in checkpoints.begin(tmp_path, 1).iterdir()) == ["state"]


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 1, content=b"old")
    saved = write(tmp_path, 1, content=b"new")
    assert (saved.policy / "model.safetensors").read_bytes() == b"new"
    checkpoints.verify(saved)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_the_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):  # as text, "1000000" sorts before "999999"
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [1_000_000, 1_000_001]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [10, 15]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000010", "step-000015"]


def test_any_flipped_byte_is_found_and_the_file_named(tmp_path):
    saved = write(tmp_path, 1)
    for name in ("policy/model.safetensors", "state/learner.pt"):
        path = saved.path / name
        whole = path.read_bytes()
        for index in range(len(whole)):
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            with pytest.raises(ValueError, match=rf"{name}: differs from the manifest"):
                checkpoints.verify(saved)
        path.write_bytes(whole)
    checkpoints.verify(saved)


def test_a_truncated_file_is_found(tmp_path):
    saved = write(tmp_path, 1)
    (saved.policy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: differs"):
        checkpoints.verify(saved)


def test_a_missing_file_is_named(tmp_path):
    saved = write(tmp_path, 1)
    (saved.state / "learner.pt").unlink()
    with pytest.raises(ValueError, match=r"state/learner\.pt: named in the manifest, but missing"):
        checkpoints.verify(saved)


@pytest.mark.parametrize("manifest", [b"", b'{"files": {"a": ', b"[]", b'{"step": 1}', b'{"files": 3}', b"\xff\xfe"])
def test_a_broken_manifest_is_named(tmp_path, manifest):
    saved = write(tmp_path, 1)
    (saved.path / "MANIFEST.json").write_bytes(manifest)
    with pytest.raises(ValueError, match=r"step-000001/MANIFEST\.json: not a readable manifest"):
        checkpoints.verify(saved)


def test_resuming_falls_back_to_the_one_before_and_says_why(tmp_path):
    first, second, third = (write(tmp_path, step) for step in (1, 2, 3))
    assert checkpoints.newest_whole(tmp_path) == (third, [])
    (third.state / "learner.pt").write_bytes(b"0ptimizer")
    (second.path / "MANIFEST.json").write_text("{")
    found, problems = checkpoints.newest_whole(tmp_path)
    assert found == first
    assert len(problems) == 2
    assert "step-000003/state/learner.pt" in problems[0]
    assert "step-000002/MANIFEST.json" in problems[1]
    (first.policy / "model.safetensors").unlink()
    found, problems = checkpoints.newest_whole(tmp_path)
    assert found is None
    assert "step-000001/policy/model.safetensors" in problems[2]


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert checkpoints.finished(tmp_path) == []
    assert checkpoints.newest_whole(tmp_path) == (None, [])
