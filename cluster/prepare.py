"""From a checked configuration to a job that is ready to train: everything started, everything restored."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import psutil
from transformers import AutoTokenizer

from actors.pool import RolloutPool
from actors.prompts import PromptStream, render
from cluster import launch
from cluster.application import Application
from cluster.doctor.software import versions
from cluster.job import Job
from cluster.leases import LeaseBook
from cluster.loop import Loop
from cluster.outliving import Outliving
from cluster.preferences import prepare_reward_model, trained_reward_model
from cluster.preflight import Preflight
from cluster.preflight.adapters import check_adapters
from cluster.progress import Progress
from cluster.recover import standing
from cluster.reproducible import decisive_settings
from cluster.resume import restore, resumption
from cluster.reward_rollout import newest
from cluster.run_log import RunLog, write_json, write_whole
from cluster.scaling import Scaling
from cluster.serving import ServingLink, find_keeper
from cluster.trackers import Trackers, start_trackers
from cluster.trackers.ray_metrics import RayMetrics, watch
from cluster.watch import watch_of
from contracts.config import Config
from contracts.events import Event, first_line
from contracts.loading import dump
from contracts.records import Prompt
from contracts.stopping import StopRequest
from learner import checkpoint as checkpoints
from learner.experience_queue import ExperienceQueue, StalenessBound
from models import bundled
from models.engine_adapters import AdapterSettings
from serving.archive import weights_key
from serving.records import StartWeights


async def prepare(
    config: Config,
    preflight: Preflight,
    progress: Progress,
    stopping: StopRequest,
    stack: AsyncExitStack,
    served: Application | None = None,
) -> Job:
    """Start Ray, the rollout actors, replicas and the learner; train the reward model; restore a resumed run.

    With `served` that application too. What it starts is stopped when `stack` closes.
    """
    found = resumption(config, preflight, progress)
    saved = found.checkpoint if found else None
    progress.phase(f"Loading {config.model.path}")
    base_path = await asyncio.to_thread(bundled.resolve, config.model.path)
    tokenizer = await asyncio.to_thread(AutoTokenizer.from_pretrained, base_path)
    if config.training.lora is not None:  # the preflight could not look into a model that was not here yet
        await asyncio.to_thread(check_adapters, config.training.lora, base_path, "model.path")
    prompts, eval_prompts = render_prompts(config, preflight, tokenizer, progress)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(config.output_dir / "config.yaml", dump(config))
    write_json(config.output_dir / "environment.json", versions())
    log = RunLog(
        config.output_dir,
        resume_step=found.last_logged if found else None,
        last_row=found.last_row if found else None,
        quarantined=found.quarantined if found else None,
    )
    stack.callback(log.close)
    # Called after everything that is started below has been stopped.
    stack.push(lambda kind, error, trace: log.event(ended(error)))
    trackers = start_trackers(
        config,
        last_row=found.last_row if found else None,
        on_lost=lambda name, cause: tracker_lost(log, progress, name, cause),
        tell=progress.note,
    )
    stack.push_async_exit(lambda kind, error, trace: trackers.close(failed=error is not None))
    log.on_row = trackers.write
    stack.callback(setattr, stopping, "on_signal", stopping.on_signal)
    stopping.on_signal = lambda name, consequence: log.event(Event("signal", "the run", name, consequence))
    tell_phases(log, progress, stack)
    started = f"weights version {saved.step}" if saved else f"{config.steps} steps of {config.model.path}"
    log.event(Event("start", "the run", "resume=true" if saved else "", started))
    run_id = launch.new_run_id()
    door = served.serving if served else None
    await stack.enter_async_context(launch.cluster(config, run_id, progress, served=door))
    outliving = Outliving(served, run_id, progress, stopping, on_event=log.event) if served else None
    if outliving is not None:
        stack.push_async_exit(outliving.outlive)
    measured = RayMetrics(run_id=run_id, run=config.output_dir.resolve().name)
    stack.callback(measured.close)
    log.on_event = measured.event
    log.on_row = lambda row: shown(row, trackers, measured)
    version = saved.step if saved else 0
    path, adapters = policy_to_start_from(config, base_path, saved)
    # Who does not have it can send no weights. A serving application outlives runs, and so does its key.
    key = weights_key(config.output_dir / "serving") if config.serving else secrets.token_bytes(32)
    pool = RolloutPool(
        config.model,
        config.rollout,
        config.deadlines,
        path=path,
        version=version,
        seed=config.seed,
        base_path=base_path,
        adapters=adapters,
        weights_key=key,
        repeatable=config.deterministic,
    )
    pool.on_change = log.event
    stack.push_async_callback(pool.stop)
    progress.phase(f"Starting {config.rollout.num_workers} rollout actor(s), the learner and the reference model")
    learner = launch.learner_group(config, base_path, saved, log.logged, progress, weights_key=key, on_event=log.event)
    stack.callback(learner.stop)
    pool.keyframes_from(learner.keyframe)
    progress.waiting("models to load")
    reference, parameters, _ = await asyncio.gather(
        launch.deploy_reference_model(config, base_path, run_id), learner.ready(), pool.start()
    )
    log.event(Event("start", "the reference model", "", f"{config.reference_workers.num_replicas} replica(s) are up"))
    environment = await learner.numerics()
    write_json(config.output_dir / "environment.json", versions() | environment)
    progress.note(f"learner: {parameters / 1e6:.0f}M parameters on {config.learner.num_ranks} rank(s)")
    if config.preferences is not None and not trained_reward_model(config.output_dir).exists():
        await prepare_reward_model(config, prompts, pool, progress=progress)
    progress.phase("Starting the reward replicas")
    trained, rolled_out = trained_reward_model(config.output_dir).resolve(), newest(config.output_dir)
    judges_config = config.evaluation.judges
    rewards, judges = await asyncio.gather(
        launch.deploy_components(config, config.rewards, run_id, trained_model=trained, rolled_out=rolled_out),
        launch.deploy_components(config, judges_config, run_id, trained_model=trained, rolled_out=rolled_out),
    )
    progress.waiting("")
    for component in (*config.rewards, *config.evaluation.judges):
        up = f"{config.reward_workers.num_replicas} replica(s) are up"
        log.event(Event("start", f"reward component {component.name}", "", up))

    if outliving is not None:
        await outliving.start(StartWeights(path, version, config.model.dtype, adapters))
    bound = StalenessBound(
        config.streaming.max_lag_steps, config.training.prompts_per_batch, config.streaming.stale_tokens
    )
    job = Job(
        config=config,
        run_id=run_id,
        prompts=PromptStream(prompts, seed=config.seed),
        eval_prompts=eval_prompts,
        pool=pool,
        learner=learner,
        rewards=rewards,
        judges=judges,
        reference=reference,
        queue=ExperienceQueue(bound, max_samples=config.queue_samples, max_bytes=config.streaming.queue_bytes),
        leases=LeaseBook(bound, config.training.samples_per_prompt),
        log=log,
        progress=progress,
        stopping=stopping,
        version=version,
        choosing=version,
        provenance={"environment": environment, "settings": decisive_settings(config)},
    )
    pool.on_change = lambda event: worker_changed(job, event)
    pool.on_update = lambda: look_again(job)
    if found is not None:
        restore(job, found, prompts)
        open_work = f"{len(job.queue)} groups in the queue, {len(job.pending)} prompts issued again"
        cause = "; ".join(("resume=true", *(f"passed over: {problem}" for problem in found.problems)))
        log.event(Event("resume", "the run", cause, f"goes on after step {job.version}: {open_work}"))
    job.watch = watch_of(config)
    job.standing = standing(job, job.version)
    if config.rollout.autoscale is not None:
        job.scaling = Scaling(job, config.rollout.autoscale)
    if config.loop is not None:
        job.loop = Loop(config.loop, prompts)
    if (serving := config.serving) is not None:
        deadline_s = config.deadlines.weights_s
        job.serving = ServingLink(
            lambda: find_keeper(serving, deadline_s=deadline_s),
            learner.keyframe,
            deadline_s=deadline_s,
            on_event=log.event,
        )
        stack.push_async_callback(job.serving.finish)
    stack.callback(asyncio.create_task(watch(job, measured)).cancel)
    return job


def tell_phases(log: RunLog, progress: Progress, stack: AsyncExitStack) -> None:
    """From now on every phase is an event; those before there was a log, from the command's begin, are told late."""
    log.event(Event("phase", "the run", "", "The command"), at=psutil.Process().create_time())
    for at, text in progress.phases:
        log.event(Event("phase", "the run", "", text), at=at)
    stack.callback(setattr, progress, "on_phase", progress.on_phase)
    progress.on_phase = lambda text: log.event(Event("phase", "the run", "", text))


def policy_to_start_from(
    config: Config, base_path: str, saved: checkpoints.Checkpoint | None
) -> tuple[str, AdapterSettings | None]:
    """The model that engines load first. With LoRA it is always the base: adapters are published for that one."""
    lora = config.training.lora
    if lora is None:
        return (str(saved.policy.resolve()) if saved else base_path), None
    initial = str(saved.adapter.resolve()) if saved else None
    # Responses may run on that began up to max_lag_steps before the newest version but one.
    return base_path, AdapterSettings(lora, initial, max_versions=config.streaming.max_lag_steps + 2)


def shown(row: Mapping[str, Any], trackers: Trackers, measured: RayMetrics) -> None:
    """A row of metrics.jsonl, everywhere else."""
    trackers.write(row)
    measured.row(row)


def tracker_lost(log: RunLog, progress: Progress, name: str, cause: str) -> None:
    """Log and show it: the run goes on without that tracker."""
    progress.warn(f"{name} is not written to any more: {cause}")
    log.event(Event("untracked", name, cause, "the run goes on without it, metrics.jsonl has every step"))


def worker_changed(job: Job, event: Event) -> None:
    """Log and show it, and let groups that wait for a worker look again."""
    job.log.event(event)
    if event.event != "rollover":  # every engine takes every version: no news for a person
        job.progress.note(line(event))
        look_again(job)


def line(event: Event) -> str:
    """What happened to a rollout actor, for a person."""
    match event.event:
        case "death":
            return f"{event.who} lost: {event.cause}"
        case "start_failed":
            return f"a new rollout actor did not start: {event.cause}"
        case "killed":
            return f"{event.who} was killed: {event.cause}"
        case "scale":
            return f"{event.who}: {event.consequence}, {event.cause}"
        case "pending":
            return f"{event.who} {event.cause}; {event.consequence}"
        case "refusal":
            return f"{event.who} {event.consequence}, it refused a delta: {event.cause}"
        case _:
            return f"{event.who} {event.consequence}"


def ended(error: BaseException | None) -> Event:
    """The last event of a run, with the error that ended it."""
    match error:
        case None:
            cause = ""
        case asyncio.CancelledError():
            cause = "it was cancelled"
        case _:
            cause = first_line(error)
    return Event("end", "the run", cause, "its parts were stopped")


def look_again(job: Job) -> None:
    asyncio.get_running_loop().create_task(job.notify())


def render_prompts(
    config: Config, preflight: Preflight, tokenizer: object, progress: Progress
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts as tokens; too long ones are skipped and counted."""
    options = {"system": config.prompts.system, "max_prompt_tokens": config.max_prompt_tokens}
    prompts, skipped = render(preflight.train_rows, tokenizer, **options)  # type: ignore[arg-type]
    eval_prompts, eval_skipped = render(preflight.eval_rows, tokenizer, **options)  # type: ignore[arg-type]
    progress.note(f"prompts: {len(prompts)} to train on, {len(eval_prompts)} held out")
    if skipped or eval_skipped:
        progress.warn(f"{skipped + eval_skipped} prompts are longer than {config.max_prompt_tokens} tokens: skipped")
    return prompts, eval_prompts
