"""Which version is served: the table that decides, and the deployment that tells replicas and keeps the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from contracts.records import WeightsUpdate
from contracts.serving import ServingConfig
from serving.records import Order, StartWeights, VersionRow


class VersionKeeper:
    """Exactly one replica of this deployment runs; its state is on disk, so that a restarted one goes on.

    It consumes what training publishes, what replicas report and what people ask for. Replicas wait in `order`, until
    another version is theirs to serve and it is their turn, for as long as they say. It waits for the gate alone,
    with a deadline.

    Args:
        config: of the application.
        folder: `output_dir/serving`, for the history and the archive of weights.
        start: what replicas load when they start.
        key: signs the frames, see `serving.archive.weights_key`.
        gate: the deployment `serving.gate.Gate`, where there is one.
    """

    def __init__(
        self,
        config: ServingConfig,
        folder: Path,
        start: StartWeights,
        *,
        key: bytes | None = None,
        gate: DeploymentHandle | None = None,
    ) -> None: ...

    async def publish(self, update: WeightsUpdate, frames: list[ray.ObjectRef]) -> bool:
        """Take a version that training has made; True: the next one must be a keyframe.

        The frames are written to disk before this answers, because their owner, a trainer, may die at any moment.

        Raises:
            DiskFull: there was no room for them. Nothing of the version is kept.
        """

    async def order(
        self, slot: str, replica: str, version: int | None, running: int, wait_s: float, *, starting: bool = False
    ) -> Order | None:
        """What the replica should serve next, as soon as it is its turn; None after `wait_s`.

        Args:
            slot: `live` or `pinned-VERSION`.
            version: what it serves; None if it serves no whole version, then the order begins with a keyframe.
            running: requests that it works on.
            starting: it serves nobody yet, and so takes nobody's turn. With `wait_s` 0, None says that `version` is
                the one to begin with.
        """

    async def served(self, slot: str, replica: str, version: int, error: str = "") -> None:
        """The outcome of an order: `version` is served now. With an `error` the next order begins with a keyframe."""

    async def leave(self, slot: str, replica: str) -> None:
        """The replica shuts down and takes no turns any more."""

    async def status(self) -> dict[str, Any]:
        """What is served and by whom; see docs/serving.md for the fields."""

    async def history(self) -> list[VersionRow]:
        """What became of each version, oldest first."""

    async def pin(self, target: str) -> dict[str, Any]:
        """Serve version `target` until further notice, or follow training again with "latest"; answers as `status`.

        Raises:
            ValueError: it is no version, or its weights are not here.
        """

    async def rollback(self, version: int) -> dict[str, Any]:
        """Go back to `version` and stay there until `pin("latest")`; answers as `status`.

        Raises:
            ValueError: its weights are not here, or it is not older than the current one.
        """
