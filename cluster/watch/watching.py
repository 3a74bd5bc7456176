"""The watch of a run, step by step: reference window, drifts, alarms, and the row they add to metrics.jsonl."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.watch.reference import Reference, reference_of
from cluster.watch.signals import Array, Observed, observe
from cluster.watch.triggers import Trigger
from contracts.config import Config
from contracts.records import ScoredRollout
from contracts.watch import WatchConfig


@dataclass(frozen=True)
class Alarm:
    """`value` is the mean of the batch, `usual` that of the reference window, `drift` their distance in its standard
    deviations; `suspicious` are places in the batch, the most suspicious first."""

    name: str
    step: int
    onset: int
    value: float
    usual: float
    drift: float
    suspicious: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What a step has shown. `latent_unknown`: this closes a reference window, and no learned reward could say how far
    its responses lie from what it was trained on, so that the alarm `latent` sees nothing."""

    row: dict[str, float]
    raised: tuple[Alarm, ...] = ()
    cleared: tuple[str, ...] = ()
    latent_unknown: bool = False


NOTHING = Seen({})


@dataclass
class Watch:
    """Consumes the batch of every step, in order. `learned` are the reward components that are reward models; `ended`
    is the alarm that ends the run."""

    config: WatchConfig
    weights: Mapping[str, float]
    learned: Collection[str] = ()
    ended: Alarm | None = None
    _window: list[Observed] = field(default_factory=list)
    _reference: Reference | None = None
    _reward_versions: set[str] = field(default_factory=set)
    _triggers: dict[str, Trigger] = field(init=False)

    def __post_init__(self) -> None:
        self._triggers = {name: Trigger(config) for name, config in self.config.alarms.items()}

    def step(self, step: int, samples: Sequence[ScoredRollout]) -> Seen:
        """Compare the batch of a step with the reference window, to which the first batches belong."""
        observed = observe(samples, weights=self.weights)
        versions = {sample.reward_version for sample in samples}
        if versions - self._reward_versions:  # another reward model has another scale: what is usual begins anew
            self._reward_versions, self._window, self._reference = versions, [], None
        if self._reference is None:
            self._window.append(observed)
            row = self._row({name: float(values.mean()) for name, values in observed.plain.items()}, {})
            if len(self._window) < self.config.reference_steps:
                return Seen(row)
            self._reference, self._window = reference_of(self._window), []
            wanted = bool(self.learned) and "latent" in self._triggers
            return Seen(row, latent_unknown=wanted and "latent" not in self._reference.means)
        reference = self._reference
        signals = reference.signals(observed)
        drifts = {
            name: reference.drift(name, signals[name])
            for name in self._triggers
            if name in signals and name in reference.means
        }
        noise = reference.noise(observed.num_groups)
        raised, cleared = [], []
        for name, drift in drifts.items():
            trigger = self._triggers[name]
            match trigger.update(step, drift, noise=noise):
                case "raised":
                    usual = reference.means[name]
                    raised.append(
                        Alarm(
                            name=name,
                            step=step,
                            onset=step if trigger.onset is None else trigger.onset,
                            value=float(signals[name].mean()),
                            usual=usual,
                            drift=drift,
                            suspicious=self._most(name, signals[name], usual),
                        )
                    )
                case "cleared":
                    cleared.append(name)
        means = {name: float(values.mean()) for name, values in signals.items()}
        return Seen(self._row(means, drifts), tuple(raised), tuple(cleared))

    def _row(self, means: Mapping[str, float], drifts: Mapping[str, float]) -> dict[str, float]:
        """All keys in every row; in the reference window drifts are 0."""
        row: dict[str, float] = {}
        for name in self._triggers:
            row[f"watch/{name}"] = means.get(name, 0.0)
            row[f"watch/{name}_drift"] = drifts.get(name, 0.0)
        return row | {"watch/alarms": float(sum(trigger.raised for trigger in self._triggers.values()))}

    def _most(self, name: str, values_B: Array, usual: float) -> tuple[int, ...]:
        """The responses that lie farthest from what is usual, in the direction in which the batch does."""
        away_B = values_B - usual
        order = np.argsort(-(away_B if away_B.mean() >= 0 else -away_B), kind="stable")
        return tuple(int(at) for at in order[: self.config.suspicious])


def watch_of(config: Config) -> Watch | None:
    """The watch that a run's configuration asks for."""
    if config.watch is None:
        return None
    learned = [component.name for component in config.rewards if component.model is not None]
    return Watch(config.watch, {component.name: component.weight for component in config.rewards}, learned)
