"""The application that a training run starts itself: it takes each version, and goes on when the training has ended."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from actors.applications import application_names, delete_applications
from cluster.application import (
    NOT_THERE,
    Application,
    check_application,
    finish_answers,
    remove,
    start_application,
    until_stopped,
)
from cluster.progress import Progress
from contracts.config import Config, ConfigError
from contracts.events import Event, first_line
from contracts.stopping import StopRequest
from serving.records import StartWeights

STOPS_SERVING = "stops serving when the answers that are being written have ended"


def check_served(config: Config) -> Application | None:
    """The application of a run with `serving.start`, for all that can be known before a model loads.

    Raises:
        ConfigError: one line that names the field and what to do.
    """
    if config.served is None:
        return None
    if config.served.model is not None:
        raise ConfigError(
            "serving.model: with serving.start the policy in training is served; leave one of the two out"
        )
    return check_application(config, trains_reward=config.preferences is not None)


class Outliving:
    """Starts the application on the Ray and Serve of a run, and decides what becomes of it at the run's end.

    On a cluster it stays, whatever the end is. On a machine of its own it would end with the command's Ray: so the
    command stays too after a training that has finished, until it is stopped; any other end takes it down.

    Args:
        run_id: whose own Serve applications are of no use any more once the training has ended.
    """

    def __init__(
        self,
        application: Application,
        run_id: str,
        progress: Progress,
        stopping: StopRequest,
        *,
        on_event: Callable[[Event], None],
    ) -> None:
        self._application, self._run_id, self._progress, self._stopping = application, run_id, progress, stopping
        self._on_event = on_event
        self._on_cluster = application.config.ray.address is not None
        self._started = False

    async def start(self, start: StartWeights) -> None:
        """Serve `start`, unless the application runs on this cluster already: then versions go there.

        Raises:
            ConfigError: prompts of the gate that cannot be used.
            RuntimeError, NoAnswer: it did not start; on a cluster nothing of it is left there.
        """
        application, deadlines = self._application, self._application.config.deadlines
        name, who = application.serving.application, "the serving application"
        if self._on_cluster and name in await application_names(deadlines.start_s):
            self._progress.note(f"{name} runs on this cluster already: versions are published into it")
            return
        self._progress.phase(f"Starting {application.num_engines}")
        try:
            await start_application(application, start, self._progress)
        except BaseException:
            if self._on_cluster:
                await remove(application, deadline_s=deadlines.stop_s)
            raise
        self._started = True
        self._on_event(Event("start", who, "", f"serves version {start.version} at {application.url}"))
        self._progress.result(application.where)

    async def outlive(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Called when all other parts of the run have stopped, with the error that ended it.

        Raises:
            RuntimeError: the application's replicas keep failing to start.
        """
        application, progress = self._application, self._progress
        if not self._started:
            return
        if self._on_cluster:
            progress.note(f"the application stays on the cluster and serves at {application.url}")
            return
        if error is not None:
            return  # Ray is about to end, and takes it along
        if not self._stopping.is_set():
            progress.phase(f"Training finished; still serving at {application.url}; Ctrl-C stops")
            self._stopping.consequence, self._stopping.graceful = STOPS_SERVING, True
            await self._make_room()
            await until_stopped(application, progress, self._stopping)
        await finish_answers(application, progress)

    async def _make_room(self) -> None:
        """Remove the replicas that only training needed."""
        try:
            await delete_applications(f"{self._run_id}-", deadline_s=self._application.config.deadlines.stop_s)
        except NOT_THERE as error:
            self._progress.warn(f"replicas of the training may be left until the end: {first_line(error)}")
