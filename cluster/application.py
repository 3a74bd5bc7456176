"""The application of a served policy, as `headrace serve` and a training run start it: checked, started, removed."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from transformers import AutoTokenizer

from actors.applications import application_names, delete_application, run_application
from actors.prompts import PromptRow, read_rows, render
from actors.replicas import watch
from actors.reward import RewardHandle, ScoreRequest
from cluster import launch
from cluster.http_door import check_port, url_of
from cluster.preferences import trained_reward_model
from cluster.preflight.checks import check_function, check_vllm
from cluster.progress import Progress
from cluster.reward_rollout import newest
from contracts.config import Config, ConfigError, RewardConfig
from contracts.events import Event, first_line
from contracts.records import Prompt
from contracts.serving import GateConfig, ServingConfig
from contracts.stopping import StopRequest
from contracts.waiting import NoAnswer
from serving.app import Policy, build
from serving.keys import load_keys
from serving.records import StartWeights

STOP_MARGIN_S = 30.0
_LOOK_S = 2.0
NOT_THERE = (NoAnswer, RayActorError, RayTaskError, RayServeException)  # a part of the application, or Serve


@dataclass(frozen=True)
class Application:
    """What is checked before anything starts; `components` are those of the reward, for `/v1/score` and the gate."""

    config: Config
    serving: ServingConfig
    components: tuple[RewardConfig, ...]
    gate_rows: tuple[PromptRow, ...]
    notes: tuple[str, ...]

    @property
    def url(self) -> str:
        return url_of(self.serving.host, self.serving.port)

    @property
    def where(self) -> str:
        """What to open, for a person."""
        return (
            f"OpenAI API: {self.url}/v1 (model {self.serving.name})\nChat page:  {self.url}/\n"
            f"Versions:   {self.url}/v1/versions\nMetrics:    {self.url}/metrics"
        )

    @property
    def num_engines(self) -> str:
        """For a person."""
        gate = ", and the gate's" if self.serving.gate else ""
        return f"{self.serving.replicas.min_replicas + len(self.serving.pinned)} serving engine(s){gate}"


@dataclass(frozen=True)
class Scorer:
    """Asks one component of the reward, from any process."""

    handle: RewardHandle
    deadline_s: float

    async def __call__(
        self, messages: list[dict[str, str]], response: str, columns: Mapping[str, Any] | None = None
    ) -> tuple[float, str]:
        """The score, and the version of what gave it. Raises ValueError for what cannot be scored."""
        prompt = next((each["content"] for each in reversed(messages) if each["role"] == "user"), "")
        request = ScoreRequest(messages, prompt, response, dict(columns or {}))
        score = await self.handle.score(request, deadline_s=self.deadline_s)
        if score.error:
            raise ValueError(f"reward component {self.handle.config.name}: {score.error}")
        return score.value, score.version


def check_application(config: Config, *, trains_reward: bool) -> Application:
    """What can be known before a model loads, but for the policy itself.

    Args:
        trains_reward: the run trains the reward model of `preferences` before the application starts.

    Raises:
        ConfigError: one line that names the field and what to do.
    """
    serving = config.serving or ServingConfig()
    serving = serving.model_copy(update={"keys": serving.keys.resolve() if serving.keys else None})
    if config.ray.address is None:
        check_vllm(on_gpu=serving.replicas.num_gpus > 0)
        check_port(serving.host, serving.port, section="serving")
    if not load_keys(serving.keys) and not _is_loopback(serving.host):
        raise ConfigError(
            f"serving.host is {serving.host}, so others can reach it: set serving.keys or HEADRACE_API_KEYS "
            "(`headrace key` makes one), or serve on 127.0.0.1"
        )
    components, notes = [], []
    for index, component in enumerate(config.rewards):
        if component.model == "preferences" and not (trains_reward or trained_reward_model(config.output_dir).is_dir()):
            if serving.gate is not None:
                raise ConfigError(
                    f"serving.gate: {component.name} is the reward model of `preferences`, and {config.output_dir} has "
                    "none yet: train first, or leave serving.gate out"
                )
            notes.append(f"/v1/score leaves {component.name} out: the run has trained no reward model yet")
            continue
        if component.function is not None:
            check_function(component.function, f"rewards.{index}.function")
        components.append(component)
    gate_rows = () if serving.gate is None else _gate_rows(serving.gate, config)
    return Application(config, serving, tuple(components), gate_rows, tuple(notes))


def _gate_rows(gate: GateConfig, config: Config) -> tuple[PromptRow, ...]:
    if room_for_prompts(gate, config) < 1:
        raise ConfigError(
            f"serving.gate.max_response_tokens {gate.max_response_tokens} leaves no room for a prompt in "
            f"model.max_context_tokens {config.model.max_context_tokens}"
        )
    try:
        return tuple(read_rows(gate.prompts)[: gate.num_prompts])
    except ConfigError as error:
        raise ConfigError(f"serving.gate.prompts: {error}") from error


def room_for_prompts(gate: GateConfig, config: Config) -> int:
    """Tokens of the longest prompt that the gate can judge with: prompt and response are scored as one prompt."""
    return config.model.max_context_tokens - gate.max_response_tokens - 1


def gate_prompts(application: Application, tokenizer: Any) -> tuple[list[Prompt], list[str]]:
    """The prompts of the gate as tokens, as training would render them, and what a person should know of them.

    Raises:
        ConfigError: none of them is short enough, or the chat template refuses one.
    """
    gate, config = application.serving.gate, application.config
    if gate is None:
        return [], []
    room = room_for_prompts(gate, config)
    prompts, _ = render(application.gate_rows, tokenizer, system=config.prompts.system, max_prompt_tokens=sys.maxsize)
    short = [prompt for prompt in prompts if len(prompt.tokens) <= room]
    if not short:
        raise ConfigError(
            f"serving.gate.prompts {gate.prompts}: each is longer than {room} tokens; lower "
            "serving.gate.max_response_tokens or raise model.max_context_tokens"
        )
    notes = []
    if len(short) < gate.num_prompts:
        skipped = f", {len(prompts) - len(short)} are longer than {room} tokens" if len(short) < len(prompts) else ""
        notes.append(
            f"the gate judges with {len(short)} prompts, serving.gate.num_prompts is {gate.num_prompts}{skipped}"
        )
    return short, notes


async def start_application(application: Application, start: StartWeights, progress: Progress) -> None:
    """Deploy it on the Serve that runs, and wait until it serves `start` or what follows it.

    Raises:
        ConfigError: prompts of the gate that cannot be used.
        RuntimeError: a part of it failed to start.
        NoAnswer: it did not run after `deadlines.start_s`.
    """
    config, serving = application.config, application.serving
    for note in application.notes:
        progress.warn(note)
    prompts: list[Prompt] = []
    if serving.gate is not None:
        tokenizer = await asyncio.to_thread(AutoTokenizer.from_pretrained, start.path)
        prompts, notes = gate_prompts(application, tokenizer)
        for note in notes:
            progress.warn(note)
    progress.waiting("models to load")
    bound = await asyncio.to_thread(
        build,
        serving,
        Policy(start, config.model.max_context_tokens),
        config.output_dir.resolve() / "serving",
        scorers=await _scorers(application),
        start_s=config.deadlines.start_s,
        health_s=config.deadlines.health_s,
        gate_prompts=prompts,
        listens=True,
    )
    await run_application(bound, serving.application, start_s=config.deadlines.start_s)
    progress.waiting("")


async def _scorers(application: Application) -> Mapping[str, tuple[float, Scorer]]:
    config = application.config
    components = await launch.deploy_components(
        config,
        application.components,
        f"{application.serving.application}-score",
        trained_model=trained_reward_model(config.output_dir).resolve(),
        rolled_out=newest(config.output_dir),
    )
    return {
        each.config.name: (each.config.weight, Scorer(each, config.deadlines.score_s)) for each in components.handles
    }


async def until_stopped(application: Application, progress: Progress, stopping: StopRequest) -> None:
    """Ends with the wish to stop, or when somebody else has removed the application; raises with it."""

    def tell(event: Event) -> None:
        progress.warn(f"{event.who}: {event.cause}; {event.consequence}")

    deadline_s = application.config.deadlines.silent_s
    applications = {application.serving.application: "the policy"}
    watching = asyncio.create_task(watch(applications, on_event=tell, deadline_s=deadline_s))
    told = asyncio.create_task(stopping.wait())
    gone = asyncio.create_task(_until_removed(application.serving.application, deadline_s=deadline_s))
    ends = {watching, told, gone}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        if gone.done():
            progress.note(f"{application.serving.application} was removed from outside, for example by --stop")
    finally:
        for task in ends:
            task.cancel()


async def _until_removed(name: str, *, deadline_s: float) -> None:
    """Where Serve does not answer, which `watch` tells, nothing is known to be removed."""
    while True:
        with suppress(*NOT_THERE):
            if name not in await application_names(deadline_s):
                return
        await asyncio.sleep(_LOOK_S)


async def finish_answers(application: Application, progress: Progress) -> None:
    """Let the answers that are being written end, and take the application down.

    Raises:
        NoAnswer: they took longer than they may.
    """
    progress.phase("Finishing the answers that are being written")
    serving = application.serving
    await delete_application(serving.application, deadline_s=serving.request_s + STOP_MARGIN_S)


async def remove(application: Application, *, deadline_s: float) -> None:
    """Whatever of it is there: itself, and what scores for it."""
    name = application.serving.application
    for each in (name, *(f"{name}-score-{component.name}" for component in application.components)):
        try:
            await delete_application(each, deadline_s=deadline_s)
        except NOT_THERE as error:
            logging.getLogger("headrace.serving").warning(
                "Serve application %s may be left: %s", each, first_line(error)
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
