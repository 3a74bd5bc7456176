"""Weights of versions on disk: from any to any other, through restarts, full disks and damaged files."""

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from contracts.disk import DiskFull
from serving.archive import Archive, Damaged, NeedsKeyframe, Unreachable, weights_key
from tests.serving.published import KEY, Trainer, arrive
from tests.small_disk import small_disk

KEYFRAME_EVERY = 4


def archive_of(trainer: Trainer, folder: Path, *, keyframe_every: int = KEYFRAME_EVERY) -> Archive:
    return Archive(folder, keyframe_every=keyframe_every, start=trainer.start(), key=KEY)  # type: ignore[arg-type]


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def archive(trainer: Trainer, tmp_path: Path) -> Archive:
    return archive_of(trainer, tmp_path)


def publish(trainer: Trainer, archive: Archive, versions: int, *, keyframes: bool = True) -> None:
    for _ in range(versions):
        frames, update = trainer.delta()
        archive.add(update, frames)
        if keyframes and archive.wants_keyframe:
            frames, update = trainer.keyframe()
            archive.add(update, frames)


def test_a_way_leads_from_any_version_to_any_other(trainer: Trainer, archive: Archive, tmp_path: Path) -> None:
    publish(trainer, archive, 10)
    assert archive.versions == list(range(11))
    again = archive_of(trainer, tmp_path)
    for held, version in itertools.product([None, *range(11)], range(11)):
        arrive(archive, version, held=held, weights=trainer.weights)
        arrive(again, version, held=held, weights=trainer.weights)


def test_the_way_is_the_chain_where_it_is_short_and_the_nearest_keyframe_at_or_below_elsewhere(
    trainer: Trainer, archive: Archive
) -> None:
    publish(trainer, archive, 10)  # keyframes: 0, the start, then 4 and 8

    def names(version: int, held: int | None) -> list[tuple[int, bool]]:
        way = archive.way(version, held=held)
        return [(entry.update.version, entry.update.is_keyframe) for entry in way]

    assert names(7, 6) == [(7, False)]
    assert names(5, 3) == [(4, False), (5, False)]
    assert names(6, None) == [(4, True), (5, False), (6, False)]
    assert names(6, 9) == names(6, None)  # back
    assert names(8, None) == [(8, True)]
    assert names(3, 3) == []


def test_keyframes_are_asked_for_as_often_as_configured(trainer: Trainer, archive: Archive) -> None:
    wanted = []
    for _ in range(9):
        frames, update = trainer.delta()
        archive.add(update, frames)
        wanted.append(archive.wants_keyframe)
    assert wanted == [False] * 3 + [True] * 6  # and again until one comes
    frames, update = trainer.keyframe()
    assert archive.add(update, frames)
    assert not archive.wants_keyframe
    longest = max(len(archive.way(version)) for version in archive.versions)
    assert longest == 9  # the chain up to 8, from the start


def test_what_comes_twice_is_here_already(trainer: Trainer, archive: Archive) -> None:
    frames, update = trainer.delta()
    assert archive.add(update, frames)
    assert not archive.add(update, frames)


def test_a_delta_that_builds_on_nothing_needs_a_keyframe(trainer: Trainer, archive: Archive) -> None:
    publish(trainer, archive, 2)
    trainer.delta()
    frames, update = trainer.delta()
    with pytest.raises(NeedsKeyframe, match="version 4 builds on version 3, which is not here"):
        archive.add(update, frames)
    assert archive.versions == [0, 1, 2]
    frames, update = trainer.keyframe()
    archive.add(update, frames)
    assert archive.versions == [0, 1, 2, 4]
    arrive(archive, 4, held=2, weights=trainer.weights)


def test_a_delta_for_other_bits_under_the_same_number_needs_a_keyframe(trainer: Trainer, archive: Archive) -> None:
    """As where replicas started from another folder than training did."""
    other = Trainer(seed=1)
    frames, update = other.delta()
    with pytest.raises(NeedsKeyframe, match="builds on another version 0: model"):
        archive.add(update, frames)


def test_another_run_under_the_same_numbers_is_refused(trainer: Trainer, archive: Archive) -> None:
    publish(trainer, archive, 3)
    other = Trainer(seed=1)
    other.delta()
    frames, update = other.keyframe()
    with pytest.raises(ValueError, match=r"version 1 is in .* with other weights: another run published it"):
        archive.add(update, frames)
    wider = Trainer(size=48)
    for _ in range(4):
        wider.delta()
    frames, update = wider.keyframe()
    with pytest.raises(ValueError, match="version 4 is of another model than version 3"):
        archive.add(update, frames)
    arrive(archive, 1, held=None, weights=trainer.weights)


def test_who_has_another_key_publishes_nothing(archive: Archive) -> None:
    frames, update = Trainer(key=b"another").delta()
    with pytest.raises(ValueError, match="signature does not fit"):
        archive.add(update, frames)
    assert archive.versions == []


def test_what_is_dropped_is_what_no_kept_version_needs(trainer: Trainer, archive: Archive, tmp_path: Path) -> None:
    publish(trainer, archive, 14)
    gone = archive.drop_all_but(3, [2, 6])
    assert archive.versions == [0, 1, 2, 4, 5, 6, 12, 13, 14]  # the ways to 2, 6, 12, 13, 14
    assert sorted([*gone, *archive.versions]) == list(range(15))
    for version in archive.versions:
        arrive(archive, version, held=None, weights=trainer.weights)
    assert archive_of(trainer, tmp_path).versions == archive.versions
    publish(trainer, archive, 1)
    assert archive.versions[-1] == 15
    with pytest.raises(Unreachable, match=r"weights of version 7 are not in .*, those of 0, 1, 2, 4, .* are"):
        archive.way(7)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-100],
    "emptied": lambda data: b"",
    "longer": lambda data: data + b"x",
    "a bit turned": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "header": lambda data: data[:9] + b"[" + data[10:],
    "length": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_file_closes_the_ways_through_it_and_a_keyframe_opens_them(
    trainer: Trainer, archive: Archive, tmp_path: Path, damage: str, restarted: bool
) -> None:
    publish(trainer, archive, 3)
    path = archive.way(2, held=1)[0].path
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if restarted:
        archive = archive_of(trainer, tmp_path)
    if 2 in archive.versions:
        with pytest.raises(Damaged, match=r"version-000002-delta.frames is damaged, and set aside as .*\.damaged: "):
            [archive.read(entry) for entry in archive.way(3)]
    assert len(archive.set_aside) == 1
    assert archive.versions == [0, 1]
    frames, update = trainer.delta()
    with pytest.raises(NeedsKeyframe):
        archive.add(update, frames)
    frames, update = trainer.keyframe()
    archive.add(update, frames)
    arrive(archive, 4, held=1, weights=trainer.weights)


def test_a_file_that_is_gone_is_told(trainer: Trainer, archive: Archive) -> None:
    publish(trainer, archive, 1)
    (entry,) = archive.way(1, held=0)
    entry.path.unlink()
    with pytest.raises(Damaged, match="No such file"):
        archive.read(entry)
    assert archive.versions == [0]


def test_what_a_killed_process_left_is_removed(trainer: Trainer, archive: Archive, tmp_path: Path) -> None:
    publish(trainer, archive, 1)
    partial = tmp_path / "version-000002-delta.frames.partial"
    partial.write_bytes(b"half")
    assert archive_of(trainer, tmp_path).versions == [0, 1]
    assert not partial.exists()


def test_a_full_disk_leaves_nothing_half_written_and_the_archive_goes_on(trainer: Trainer, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        archive = archive_of(trainer, disk.folder / "weights")
        publish(trainer, archive, 2)
        before = sorted(os.listdir(disk.folder / "weights"))
        disk.fill()
        frames, update = trainer.delta()
        with pytest.raises(DiskFull, match=r"no room for the weights of version 3: 0.0 MiB are free"):
            archive.add(update, frames)
        assert sorted(os.listdir(disk.folder / "weights")) == before
        disk.empty()
        archive.add(update, frames)
        arrive(archive, 3, held=2, weights=trainer.weights)


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "serving"
    key = weights_key(folder)
    assert len(key) == 32
    assert weights_key(folder) == key
    assert [path.name for path in folder.iterdir()] == ["weights.key"]
    assert (folder / "weights.key").stat().st_mode & 0o777 == 0o600
    assert weights_key(tmp_path / "other") != key
    (folder / "weights.key").write_text("too short")
    with pytest.raises(ValueError, match=r"weights\.key does not hold a key"):
        weights_key(folder)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, in whichever order: what the archive says it has, a replica can get, bit for bit."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="archive-")
        self.trainer = Trainer()
        self.archive = archive_of(self.trainer, Path(self._folder.name))

    def teardown(self) -> None:
        self._folder.cleanup()

    @rule()
    def publishes(self) -> None:
        frames, update = self.trainer.delta()
        try:
            self.archive.add(update, frames)
        except NeedsKeyframe:
            self.keyframe()

    @precondition(lambda self: self.trainer.version)
    @rule()
    def keyframe(self) -> None:
        frames, update = self.trainer.keyframe()
        self.archive.add(update, frames)
        assert self.trainer.version in self.archive.versions

    @rule()
    def a_version_is_lost_on_the_way(self) -> None:
        self.trainer.delta()

    @rule()
    def restarts(self) -> None:
        before = self.archive.versions
        self.archive = archive_of(self.trainer, Path(self._folder.name))
        assert self.archive.versions == before

    @rule(newest=st.integers(1, 4), data=st.data())
    def drops(self, newest: int, data: st.DataObject) -> None:
        before = self.archive.versions
        others = data.draw(st.lists(st.sampled_from(before))) if before else []
        gone = self.archive.drop_all_but(newest, others)
        assert not {*gone} & {*before[-newest:], *others}
        assert sorted([*gone, *self.archive.versions]) == before

    @precondition(lambda self: self.archive.versions)
    @rule(data=st.data())
    def is_damaged(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.archive.way(data.draw(st.sampled_from(self.archive.versions)))))
        content = bytearray(entry.path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1
        entry.path.write_bytes(content)
        with pytest.raises(Damaged):
            self.archive.read(entry)

    @precondition(lambda self: self.archive.versions)
    @rule(data=st.data())
    def a_replica_goes(self, data: st.DataObject) -> None:
        versions: Any = st.sampled_from(self.archive.versions)
        held = data.draw(st.none() | st.integers(0, self.trainer.version))
        arrive(self.archive, data.draw(versions), held=held, weights=self.trainer.weights)

    @invariant()
    def every_file_is_known(self) -> None:
        names = {name for name in os.listdir(self._folder.name) if not name.endswith(".damaged")}
        assert names == {entry.path.name for entry in self.archive._entries()}


AnyOrder.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
TestAnyOrder = AnyOrder.TestCase
