"""A policy that is optimised on purpose against a weak reward model: when gold turns down, and who says so before."""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.reward_models.climbing import CONTROL, climbs
from benchmarks.reward_models.gold_turn import (
    LEVEL,
    Climb,
    Estimate,
    Turn,
    bin_edges,
    binned,
    gold_gain,
    reached,
    turn_of,
)
from contracts.watch import WatchConfig

NUM_BINS = 10
MATCHED = (0.25, 0.5, 0.75, 1.0)  # of the greatest KL that all rules have reached


def overoptimise(arguments: argparse.Namespace) -> None:
    """Train what is not there yet, then print the tables."""
    if Path(arguments.base).is_dir():
        arguments.base = str(Path(arguments.base).resolve())
    keep, resumed = arguments.keep, arguments.resume_from
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise SystemExit(f"--keep {keep}: is not empty; --resume-from goes on with what is there")
    if resumed is not None and not resumed.is_dir():
        raise SystemExit(f"--resume-from {resumed}: no such folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a run that goes on is told
    with tempfile.TemporaryDirectory(prefix="headrace-") as temporary:
        found = climbs(arguments, resumed or keep or Path(temporary))
    sys.stdout.writelines(f"{line}\n" for line in report(found))


def report(found: Sequence[Climb]) -> Iterator[str]:
    """Markdown. The first rule is what the others are compared with."""
    rng = np.random.default_rng(0)
    turns = {(climb.rule, climb.seed): turn_of(climb, rng) for climb in found}
    seeds = len({climb.seed for climb in found})
    steps = ", ".join(sorted({str(climb.num_steps) for climb in found}))
    yield f"{seeds} seed(s), {steps} steps a run. Intervals are 95 %, from a bootstrap of the responses within each"
    yield "step and of the seeds, where there are several; those of one seed say nothing of others. KL and scores are"
    yield "means of a response, the proxy in its own units for each rule. Alarms are those of a watch that is not shown"
    yield "gold, except where it is trained on."
    yield from ["", "### Over KL", "", *_over_kl(found, rng)]
    yield from ["", "### Where gold turns down", "", *_turns(turns)]
    yield from ["", "### Alarms", "", *_alarms(found, turns)]
    yield from ["", "### Rules at matched KL", "", *_matched(found, rng)]


def _over_kl(found: Sequence[Climb], rng: np.random.Generator) -> Iterator[str]:
    climbing = [climb for climb in found if climb.rule != CONTROL]
    edges = bin_edges(climbing, max(1, min(NUM_BINS, sum(climb.num_steps for climb in climbing) // 3)))
    yield "| trained on | KL | steps | proxy | gold | held-out |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for rule, of_rule in _by_rule(found).items():
        for each in binned(of_rule, edges, rng):
            if each is not None:
                gold = _words(each.gold, ".3f")
                yield f"| {rule} | {each.kl:.2f} | {each.num_steps} | {each.proxy:.2f} | {gold} | {each.held_out:.2f} |"


def _turns(turns: dict[tuple[str, int], Turn]) -> Iterator[str]:
    yield "| trained on | seed | highest at KL | at step | gold there | gold at the end | p of the fall | |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    for (rule, seed), turn in turns.items():
        kl = f"{turn.kl:.2f} ({turn.kls[0]:.2f} to {turn.kls[1]:.2f})"
        step = f"{turn.step} ({turn.steps[0]} to {turn.steps[1]})"
        gold = f"{turn.gold:.3f} | {turn.gold_at_end:.3f} | {turn.p:.3f}"
        yield f"| {rule} | {seed} | {kl} | {step} | {gold} | {_fate(turn)} |"
    yield ""
    yield f"Gold has turned where a gold that never falls would show such a fall in less than {LEVEL:.0%} of the cases."


def _fate(turn: Turn) -> str:
    return "turned" if turn.turned else "did not turn within the run"


def _alarms(found: Sequence[Climb], turns: dict[tuple[str, int], Turn]) -> Iterator[str]:
    """A lead is the turn's step less the alarm's; where gold has not turned, every alarm is a false one."""
    names = list(WatchConfig().alarms)
    turned = [climb for climb in found if climb.rule != CONTROL and turns[climb.rule, climb.seed].turned]
    steady = [climb for climb in found if climb.rule != CONTROL and not turns[climb.rule, climb.seed].turned]
    control = [climb for climb in found if climb.rule == CONTROL]
    of_turned = f"before the turn, of {len(turned)} runs that turned | lead in steps, median | later | never"
    false_of = f"false, of {len(steady)} runs that did not turn | false, of {len(control)} trained on gold"
    yield f"| alarm | {of_turned} | {false_of} |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name in names:
        leads = [turns[climb.rule, climb.seed].step - climb.alarms[name] for climb in turned if name in climb.alarms]
        early = [lead for lead in leads if lead > 0]
        lead = f"{statistics.median(leads):+g} ({min(leads):+d} to {max(leads):+d})" if leads else "-"
        false, of_control = (sum(name in climb.alarms for climb in some) for some in (steady, control))
        counts = f"{len(leads) - len(early)} | {len(turned) - len(leads)} | {false} | {of_control}"
        yield f"| {name} | {len(early)} | {lead} | {counts} |"
    yield ""
    if not any(climb.alarms for climb in found):
        yield "None was raised."
        return
    yield "| alarm | trained on | seed | first raised in step | at KL | lead in steps |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for name in names:
        for climb in found:
            if (step := climb.alarms.get(name)) is not None:
                told = _lead(climb, step, turns[climb.rule, climb.seed])
                yield f"| {name} | {climb.rule} | {climb.seed} | {step} | {climb.kl_S[step - 1]:.2f} | {told} |"


def _lead(climb: Climb, step: int, turn: Turn) -> str:
    if climb.rule == CONTROL:
        return "false: trained on gold"
    return f"{turn.step - step:+d}" if turn.turned else "false: gold did not turn"


def _matched(found: Sequence[Climb], rng: np.random.Generator) -> Iterator[str]:
    by_rule = {rule: of_rule for rule, of_rule in _by_rule(found).items() if rule != CONTROL}
    (first, base), *others = by_rule.items()
    if not others:
        yield "One rule: nothing to compare."
        return
    most = reached([climb for of_rule in by_rule.values() for climb in of_rule])
    yield f"| KL | {' | '.join(f'gold, {rule} less {first}' for rule, _ in others)} |"
    yield f"| ---: |{' ---: |' * len(others)}"
    for share in MATCHED:
        gains = [_words(gold_gain(base, each, kl=share * most, rng=rng), "+.3f") for _, each in others]
        yield f"| {share * most:.2f} | {' | '.join(gains)} |"


def _by_rule(found: Sequence[Climb]) -> dict[str, list[Climb]]:
    return {rule: [climb for climb in found if climb.rule == rule] for rule in dict.fromkeys(c.rule for c in found)}


def _words(found: Estimate, form: str) -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"
