"""Who has room: literal cases, and random changes against looking at every worker."""

import random
from dataclasses import dataclass

from actors.roster import Roster


@dataclass(eq=False)
class Engine:
    name: str
    version: int = 0


def roster(*engines, max_load=4):
    ready: Roster[Engine] = Roster(max_load)
    for engine in engines:
        ready.add(engine)
    return ready


def test_groups_issued_at_once_are_spread_over_the_workers():
    first, second = Engine("a"), Engine("b")
    ready = roster(first, second)
    assert [ready.reserve(2) for _ in range(5)] == [first, second, first, second, None]
    assert (ready.load(first), ready.load(second)) == (4, 4)


def test_the_last_group_may_exceed_the_places_and_then_nobody_has_room_until_enough_have_ended():
    engine = Engine("a")
    ready = roster(engine)
    assert [ready.reserve(3) for _ in range(3)] == [engine, engine, None]
    for _ in range(2):
        ready.release(engine)
        assert ready.reserve(3) is None
    ready.release(engine)
    assert ready.reserve(3) is engine


def test_a_worker_that_lags_behind_is_passed_over_for_what_needs_newer_weights():
    behind, ahead = Engine("behind", 3), Engine("ahead", 4)
    ready = roster(behind, ahead)
    ready.reserve(1, oldest_version=4)
    assert ready.load(ahead) == 1
    assert ready.reserve(1) is behind  # the least loaded of all
    assert ready.reserve(1, oldest_version=5) is None
    behind.version = 5
    ready.updated(behind)
    assert ready.reserve(1, oldest_version=5) is behind


def test_one_that_left_gets_nothing_and_what_it_held_may_still_end():
    engine = Engine("a")
    ready = roster(engine)
    ready.reserve(1)
    ready.remove(engine)
    ready.release(engine)
    ready.updated(engine)
    assert ready.reserve(1) is None
    assert (len(ready), ready.load(engine), engine in ready, ready.workers) == (0, 0, False, ())


def test_random_changes_against_looking_at_every_worker():
    draw = random.Random(0)
    ready: Roster[Engine] = Roster(6)
    loads: dict[Engine, int] = {}
    for turn in range(5000):
        act = draw.choice(["add", "remove", "reserve", "reserve", "reserve", "release", "release", "release", "update"])
        if act == "add" and len(loads) < 20:
            engine = Engine(f"e{turn}", turn // 500)
            ready.add(engine)
            loads[engine] = 0
        elif act == "reserve":
            oldest, number = draw.randrange(12), draw.randrange(1, 4)
            able = [engine for engine in loads if engine.version >= oldest and loads[engine] < 6]
            got = ready.reserve(number, oldest_version=oldest)
            if got is None:
                assert not able
            else:
                least = min(loads[engine] for engine in able)
                newest = max(engine.version for engine in able if loads[engine] == least)
                assert got in able
                assert (loads[got], got.version) == (least, newest)
                loads[got] += number
        elif loads:
            engine = draw.choice(list(loads))
            if act == "remove" and draw.random() < 0.2:
                ready.remove(engine)
                del loads[engine]
            elif act == "release" and loads[engine]:
                ready.release(engine)
                loads[engine] -= 1
            elif act == "update":
                engine.version += 1
                ready.updated(engine)
        assert set(ready.workers) == set(loads)
        assert all(ready.load(engine) == load for engine, load in loads.items())
