"""Which version is served: following, gates, pins and rollbacks, and the same again after a restart."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.records import VersionRow
from serving.version_table import VersionTable, spoken


class Kept:
    """A table and the history that it is made of."""

    def __init__(self, follow: str = "latest", start: int = 0, *, gated: bool = False) -> None:
        self.options = (follow, start, "model")
        self.gated = gated
        self.rows: list[VersionRow] = []
        self.table = VersionTable(*self.options, gated=gated)
        assert self.keep(self.table.started({start}, 0.0)) == [(start, "promoted")]

    def keep(self, rows: list[VersionRow]) -> list[tuple[int, str]]:
        for row in rows:
            self.table.apply(row)
        self.rows += rows
        return [(row.version, row.status) for row in rows]

    def publish(self, *versions: int) -> list[int]:
        """What is served after each of them."""
        served = []
        for version in versions:
            self.keep(self.table.published(version, 0.0))
            served.append(self.table.current)
        return served

    def judge(self, version: int, *, promote: bool) -> list[tuple[int, str]]:
        return self.keep(self.table.judged(version, 0.0, promote=promote, reason="so", metrics={"kl": 1.0}))

    def again(self, start: int | None = None) -> VersionTable:
        follow, began, source = self.options
        return VersionTable(follow, began if start is None else start, source, self.rows, gated=self.gated)


def test_latest_serves_each_version_as_it_comes() -> None:
    assert Kept().publish(1, 2, 5) == [1, 2, 5]


def test_every_third_published_version_is_served_whatever_its_number() -> None:
    assert Kept("every:3", start=10).publish(11, 12, 13, 15, 16, 19, 20) == [10, 10, 13, 13, 13, 19, 19]


def test_a_configured_pin_waits_for_its_version_and_stays() -> None:
    kept = Kept("pinned:2")
    assert kept.publish(1, 2, 3) == [0, 2, 2]
    assert kept.keep(kept.table.pin("latest", {}, 0.0)) == [(2, "released"), (3, "promoted")]
    assert kept.publish(4) == [4]
    assert kept.again().current == 4


def test_what_is_published_twice_is_news_once() -> None:
    kept = Kept("every:2")
    assert kept.publish(1, 1, 2) == [0, 0, 2]
    assert [row.status for row in kept.rows[1:]] == ["published", "published", "promoted"]


def test_a_pin_and_a_rollback_hold_until_they_are_released() -> None:
    kept = Kept()
    kept.publish(1, 2, 3)
    kept.keep(kept.table.rollback(1, {0, 1, 2, 3}, 0.0))
    assert kept.publish(4, 5) == [1, 1]
    kept.keep(kept.table.pin("2", {1, 2}, 0.0))
    assert kept.publish(6) == [2]
    assert kept.keep(kept.table.pin("latest", {}, 0.0)) == [(2, "released"), (6, "promoted")]
    assert kept.publish(7) == [7]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("9", r"the weights of version 9 are not here; there are 1 to 2, 5"),
        ("newest", "'newest' is no version: give a number, or latest"),
        ("-1", "'-1' is no version"),
        ("", "'' is no version"),
        ("9" * 5000, "is no version"),
        ("²", "is no version"),
    ],
)
def test_a_pin_to_what_is_not_there_says_what_is(target: str, told: str) -> None:
    kept = Kept()
    kept.publish(1, 2)
    with pytest.raises(ValueError, match=told):
        kept.table.pin(target, {1, 2, 5}, 0.0)


def test_a_rollback_goes_back_and_nowhere_else() -> None:
    kept = Kept()
    kept.publish(1, 2)
    for version in (2, 3):
        with pytest.raises(ValueError, match=f"version {version} is not older than version 2, which is served"):
            kept.table.rollback(version, {0, 1, 2, 3}, 0.0)
    with pytest.raises(ValueError, match="the weights of version 1 are not here; there is none"):
        kept.table.rollback(1, (), 0.0)


def test_a_gate_lets_nothing_pass_by_itself_and_is_shown_the_newest_alone() -> None:
    kept = Kept(gated=True)
    assert kept.table.candidate is None
    assert kept.publish(1, 2, 3) == [0, 0, 0]
    assert kept.table.candidate == 3
    assert kept.judge(3, promote=False) == [(3, "refused")]
    assert (kept.table.current, kept.table.candidate) == (0, None)  # not the older ones
    kept.publish(4)
    assert kept.judge(4, promote=True) == [(4, "promoted")]
    assert (kept.table.current, kept.table.candidate) == (4, None)
    assert kept.rows[-1].metrics == {"kl": 1.0}
    assert kept.again().current == 4


def test_a_verdict_that_comes_after_a_pin_changes_nothing() -> None:
    kept = Kept(gated=True)
    kept.publish(1, 2)
    kept.keep(kept.table.pin("1", {1}, 0.0))
    assert kept.table.candidate is None
    assert kept.judge(2, promote=True) == []
    kept.keep(kept.table.pin("latest", {}, 0.0))
    assert (kept.table.current, kept.table.candidate) == (0, 2)  # 1 was pinned, never promoted


def test_a_gate_is_shown_only_what_is_followed() -> None:
    kept = Kept("every:2", gated=True)
    kept.publish(1)
    assert kept.table.candidate is None
    kept.publish(2, 3)
    assert kept.table.candidate == 2


def test_a_newer_start_is_served_and_an_older_one_is_not() -> None:
    """`headrace serve` begins with the newest checkpoint, and goes on with what was published after it."""
    kept = Kept()
    kept.publish(1, 2, 3)
    kept.table = kept.again(start=2)
    assert kept.keep(kept.table.started({0, 1, 2, 3}, 0.0)) == []
    kept.table = kept.again(start=9)
    assert kept.keep(kept.table.started({0, 1, 2, 3, 9}, 0.0)) == [(9, "promoted")]
    assert "started from model" in kept.rows[-1].reason


def test_a_start_that_the_gate_refused_is_not_served_by_a_restart() -> None:
    kept = Kept(gated=True)
    kept.publish(1, 2)
    kept.judge(2, promote=False)
    kept.table = kept.again(start=2)
    assert kept.keep(kept.table.started({0, 1, 2}, 0.0)) == []
    assert kept.table.current == 0


@pytest.mark.parametrize("held", [False, True])
def test_a_start_without_the_weights_of_the_served_version_serves_what_there_is(held: bool) -> None:
    kept = Kept()
    kept.publish(1, 2, 3)
    if held:
        kept.keep(kept.table.pin("3", {3}, 0.0))
    assert kept.keep(kept.again().started({0, 1}, 0.0)) == [(1, "promoted")]
    assert kept.rows[-1].reason == "the weights of version 3 are gone; there are 0 to 1"
    assert kept.table.held == held


def test_versions_in_words() -> None:
    assert spoken({4, 3, 9, 5}) == "there are 3 to 5, 9"
    assert spoken([]) == "there is none"


class AnyOrder(RuleBasedStateMachine):
    """Whatever is published, judged, pinned and released: a restart decides the same, and nobody's word is broken."""

    def __init__(self) -> None:
        super().__init__()
        self.newest, self.held, self.refused = 0, False, set[int]()
        self.kept = Kept()

    @precondition(lambda self: not self.newest)
    @rule(follow=st.sampled_from(["latest", "every:2", "pinned:3"]), gated=st.booleans())
    def configured(self, follow: str, gated: bool) -> None:
        self.kept = Kept(follow, gated=gated)

    @rule(skipped=st.integers(0, 2))
    def published(self, skipped: int) -> None:
        self.newest += 1 + skipped
        before = self.kept.table.current
        (now,) = self.kept.publish(self.newest)
        assert now == before or (now == self.newest and not self.held)

    @precondition(lambda self: self.kept.table.candidate is not None)
    @rule(promote=st.booleans())
    def judged(self, promote: bool) -> None:
        version = self.kept.table.candidate
        assert version is not None
        self.kept.judge(version, promote=promote)
        assert (self.kept.table.current == version) == promote
        if not promote:
            self.refused.add(version)

    @rule(version=st.integers(0, 20))
    def pinned(self, version: int) -> None:
        self.kept.keep(self.kept.table.pin(str(version), range(21), 0.0))
        self.held = True
        assert self.kept.table.current == version

    @precondition(lambda self: self.kept.table.current > 0)
    @rule()
    def rolled_back(self) -> None:
        version = self.kept.table.current - 1
        self.kept.keep(self.kept.table.rollback(version, range(21 + version), 0.0))
        self.held = True

    @rule()
    def released(self) -> None:
        self.kept.keep(self.kept.table.pin("latest", (), 0.0))
        self.held = False
        assert not self.kept.table.follow.startswith("pinned")

    @invariant()
    def a_refused_version_is_served_only_where_somebody_asked_for_it(self) -> None:
        assert self.held or self.kept.table.current not in self.refused

    @invariant()
    def a_restart_decides_the_same(self) -> None:
        again = self.kept.again()
        table = self.kept.table
        assert (again.current, again.held, again.follow) == (table.current, table.held, table.follow)
        assert (again.candidate, again.newest) == (table.candidate, table.newest)
        assert again.started(range(99), 0.0) == []


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
TestAnyOrder = AnyOrder.TestCase
