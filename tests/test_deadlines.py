"""Every wait across processes has a deadline: read from the code itself, so that a new one cannot be forgotten."""

from pathlib import Path

import pytest

from tests.waits import ANSWERING, Reading, Wait, read

ROOT = Path(__file__).parents[1]
ROOMS = ("contracts", "models", "actors", "learner", "serving", "cluster")

_CHANGING = "a lock held for work on files of this process, not for an answer of another"
# Waits without a deadline of their own, and why that is right. All of them are waits for something in this process,
# which itself waits with a deadline, or for what is meant to last as long as the run.
WITHOUT = {
    "actors/delivery.py _newest_keyframe: asked": "LearnerGroup.keyframe, which answers within deadlines.weights_s",
    "actors/placement.py look: ray.nodes()": "in a thread for which `missing`, or launch.cluster, waits in answer()",
    "cluster/capacity.py capacity: ray.cluster_resources()": "in a thread for which launch.cluster waits in answer()",
    "cluster/commands/until_signal.py main: task": "the whole run",
    "cluster/job.py another_worker: found": "room at a worker; pool.failure ends the run where none comes any more",
    "cluster/job.py next_lease: self._collector": "room at a worker; pool.failure ends the run where none comes",
    "cluster/job.py next_round: self._next_round": "the version that is being trained: deadlines.learn_s, weights_s",
    "cluster/nodes.py look: ray.nodes()": "in a thread for which `_look` waits in answer()",
    "cluster/progress.py __exit__: self._heart.join()": "a thread of this process that was just told to end",
    "cluster/submit.py _show_log: self._client.tail_job_logs(job)": "`ended` beside it gives up after LOST_S",
    "cluster/label_command.py _until_stopped: asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)": "as long as "
    "people label",
    "cluster/label_command.py _until_stopped: stopping.wait()": "as long as people label",
    "cluster/application.py until_stopped: asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)": ""
    "as long as it is served",
    "cluster/application.py until_stopped: stopping.wait()": "as long as it is served",
    "cluster/reward_train.py _pass_on: stopping.wait()": "as long as it trains",
    "cluster/loop.py next_round: asyncio.wait({turn, told}, return_when=asyncio.FIRST_COMPLETED)": ""
    "each thing that a round waits for has a deadline, people preferences.people.wait_s",
    "cluster/loop.py next_round: job.stopping.wait()": "ends with the round",
    "cluster/loop.py next_round: turn": "it was cancelled",
    "cluster/loop.py next_round: told": "it was cancelled",
    "cluster/serve_file.py __call__: scorer(messages, response, columns)": "Scorer has deadlines.score_s",
    "cluster/simulated.py _follow: self.on_change('updated')": "a simulation has no other process",
    "cluster/simulated.py _start_later: self.on_change('started')": "a simulation has no other process",
    "cluster/train.py raise_pool_failure: job.pool.failure": "watches for as long as the run trains",
    "learner/experience_queue.py _wait_for_room: let_in": "back-pressure: the learner's next batch makes room",
    "learner/group.py _once: asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)": "each is in answer()",
    "learner/group.py _once: calls": "each is in answer(), and was cancelled",
    "learner/group.py _once: [watcher] if watcher else []": "it was cancelled",
    "learner/places.py reserve: self._missing(self._bundle)": "actors.placement.missing, which waits in answer()",
    "learner/ranks.py alone: dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)": "nobody "
    "else is in the group",
    "models/engine.py _final_output: self._llm.generate(prompt, params, request_id, lora_request=lora_request)": "the "
    "lease of the request, deadlines.lease_s, aborts it",
    "models/engine.py _finished: task": "an update, of which every call to the engine core has the deadline",
    "models/engine.py _together: tasks": "the pool, which replaces an actor that takes longer than deadlines.lease_s",
    "models/engine.py check_health: self._llm.check_health()": "vLLM only looks at a flag of this process",
    "models/engine.py generate: running": "the lease of the request, deadlines.lease_s, aborts it",
    "models/engine.py _update: exchange_in()": "what the caller gives: serving.rollover.Gate.drained, which gives up",
    "models/engine.py accepting: self._accepting.wait()": "an update, of which every call to the core has the deadline",
    "models/engine_scoring.py response_logprobs: engine.llm.generate(prompt, params, request_id, "
    "lora_request=lora_request)": "GateEngine._logprobs waits for it in answer()",
    "models/engine_start.py start_vllm: AsyncLLM.from_engine_args(engine_args)": "VLLM_ENGINE_READY_TIMEOUT_S, which "
    "child_environment sets to start_timeout_s",
    "models/engine_together.py last_output: collector.get()": "the pool, as for _together",
    "models/vllm_weights.py watch: psutil.Process(owner_pid).wait()": "a thread that ends the core when its owner ends",
    "serving/labelling/errors.py __call__: receive()": "the HTTP server, which says when a client has left",
    "serving/labelling/errors.py __call__: refusal(scope, receive, closed)": "the HTTP server, for the same reason",
    "serving/labelling/errors.py __call__: self._app(scope, read_already, closed)": "routes, each in Desk.ask",
    "serving/labelling/errors.py __call__: self._app(scope, receive, send)": "the start and end of the app itself",
    "serving/labelling/errors.py closed: send(message)": "the HTTP server, which says when a client has left",
    "serving/labelling/errors.py read_already: receive()": "the HTTP server, which says when a client has left",
    "models/openai.py _created: self._chat.create_chat_completion(ChatCompletionRequest(**body))": ""
    "PolicyReplica.answer waits request.deadline_s",
    "models/openai.py _created: self._completion.create_completion(CompletionRequest(**body))": "the same",
    "models/openai.py _events: aclosing(events)": "a generator of this process",
    "models/openai.py _events: events": "PolicyReplica aborts the request at its deadline, which ends them",
    "models/openai.py _noted: aclosing(outputs)": "a generator of this process",
    "models/openai.py _noted: outputs": "PolicyReplica aborts the request at its deadline, which ends them",
    "models/openai.py _first: anext(events)": "PolicyReplica.answer waits request.deadline_s",
    "models/openai.py _first: events.aclose()": "a generator of this process",
    "models/openai.py abort: self._engine.llm.abort([request_id] if kind == 'chat' else parts)": "a message is sent; "
    "nobody answers it",
    "serving/asking.py _listen: self._response": "beside _Call.head and part, which wait in answer() and end it",
    "serving/ingress.py lifespan: http": "it begins to listen; a caller is not waited for",
    "serving/ingress.py lifespan: ray.get_runtime_context().get_node_id()": "of this process",
    "serving/replica.py __init__: ray.get_runtime_context().get_node_id()": "of this process",
    "serving/wire.py _to: self._connecting": "whoever has it connects, in answer()",
    "serving/wire.py deliver: parts": "PolicyReplica ends them at the request's deadline",
    "serving/wire.py opened: loop.create_unix_server(lambda: _Reader(self._boxes, connections), path)": ""
    "it begins to listen; a replica is not waited for",
    "serving/wire.py _take: self._came.wait()": "_Call.head and part, in answer()",
    "serving/replica.py answer: aclosing(self._said(request))": "a generator of this process",
    "serving/replica.py answer: said": "what it waits for has the request's deadline",
    "serving/replica.py _written: said": "the same",
    "serving/replica.py _said: aclosing(self._answered(request, running, expires))": "a generator of this process",
    "serving/replica.py _said: answered": "what it waits for has the request's deadline",
    "serving/replica.py _answered: aclosing(answered.parts)": "a generator of this process",
    "serving/replica.py _answered: answered.parts": "`expire` ends them at the request's deadline",
    "serving/replica.py _answered: asyncio.timeout_at(expires)": "it is the deadline",
    "cluster/serving.py finish: self._sending": "each thing that `_send` waits for has a deadline",
    "cluster/serving.py _found: self._find()": "find_keeper has deadlines.weights_s",
    "cluster/versions_command.py _post: urllib.request.Request(f\"{url.rstrip('/')}/v1/versions/{what}\", "
    "json.dumps(body).encode(), headers)": "it makes the request; urlopen sends it",
    "serving/door.py __call__: self._app(scope, caller.message, count)": "routes, each with request_s",
    "serving/door.py __call__: self._app(scope, receive, send)": "the start and end of the app itself",
    "serving/door.py count: send(message)": "completing._Events cuts off who does not read; a document is small",
    "serving/door.py message: self._gone.wait()": "as long as the answer takes: it ends with that",
    "serving/door.py __call__: JSONResponse({'error': error.error}, error.status, error.headers)"
    "(scope, receive, count)": "a document is small, and is in the connection's buffer at once",
    "serving/versions.py publish: self._changing": _CHANGING,
    "serving/versions.py pin: self._changing": _CHANGING,
    "serving/versions.py rollback: self._changing": _CHANGING,
    "serving/versions.py _steps: self._changing": _CHANGING,
    "serving/versions.py _judge_all: self._changing": _CHANGING,
    "serving/rollover.py _emptied: end()": "it aborts a request: a message is sent, nobody answers it",
}


@pytest.fixture(scope="module")
def waits() -> list[Wait]:
    return read(ROOT / room for room in ROOMS).waits()


def test_every_wait_across_processes_has_a_deadline(waits: list[Wait]) -> None:
    forgotten = [
        f"{wait.file}:{wait.line} {wait.code}" for wait in waits if not (wait.has_deadline or wait.key in WITHOUT)
    ]
    assert forgotten == [], "wrap it in contracts.waiting.answer, or say in WITHOUT why it needs no deadline"


def test_the_exceptions_are_those_of_the_code(waits: list[Wait]) -> None:
    """One that the code no longer needs would excuse the next."""
    assert WITHOUT.keys() - {wait.key for wait in waits if not wait.has_deadline} == set()


def test_the_waits_that_are_known_to_be_there_are_found(waits: list[Wait]) -> None:
    """What the test reads is not nothing: one call of each kind, and all that `answer` waits for."""
    timed = " ".join(f"{wait.file} {wait.code}" for wait in waits if wait.has_deadline)
    for code in (
        "actors/line.py answer(call, ",
        "actors/delivery.py answer(worker.handle.load_weights.remote(",
        "actors/replicas.py answer(until_answered(), ",
        "actors/applications.py answer(deploy, ",
        "learner/group.py self._ranks[0].keyframe.remote()",
        "learner/ranks.py dist.init_process_group(",
        "cluster/launch.py ray.init(",
        "cluster/doctor/machine.py subprocess.run(",
        "models/engine_update.py answer(llm, pause, ",
    ):
        assert code in timed
    named = "".join(path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    awaited = sum(named.count(f"await {answering}(") for answering in ANSWERING)
    assert sum(wait.code.startswith(tuple(ANSWERING)) for wait in waits) >= awaited > 20


FORGOTTEN = {
    "await handle.score.remote(x)": "a Serve response",
    "await ref": "an object reference",
    "await asyncio.gather(*refs)": "several of them",
    "await asyncio.gather(*(actor.ping.remote() for actor in actors))": "several calls",
    "await asyncio.shield(handle.f.remote())": "shielded",
    "await asyncio.wait(refs)": "without a time-out",
    "await asyncio.wait_for(ref, 5)": "it may lose a cancellation",
    "await asyncio.wait_for(event.wait(), timeout=5)": "the same for an event",
    "await asyncio.to_thread(serve.status)": "a thread that asks Serve",
    "await llm.resume_generation()": "the engine core",
    "await client.get(url)": "HTTP",
    "async for output in llm.generate(p): pass": "a stream",
    "async with asyncio.timeout(None): await ref": "a time-out that is none",
    "async with asyncio.timeout(5): pass\n    await ref": "after the time-out",
    "x = handle.f.remote()\n    await answer(x, deadline_s=1)\n    await x": "once with, once without",
    "ray.get(ref)": "blocking",
    "ray.wait([ref])": "blocking",
    "ray.get([ref], timeout=None)": "blocking, said in words",
    "serve.delete('app')": "Serve's controller",
    "subprocess.run(['sleep', '9'])": "a child",
    "process.communicate()": "a child",
    "process.wait()": "a child",
    "urllib.request.urlopen(url)": "HTTP",
    "socket.create_connection(('host', 1))": "TCP",
    "asyncio.run_coroutine_threadsafe(work(), loop).result()": "another thread's loop",
    "dist.init_process_group('gloo')": "the other ranks",
}
TIMED = (
    "await answer(handle.score.remote(x), who='w', asked='a', deadline_s=5)",
    "await asyncio.wait(refs, timeout=5)",
    "await asyncio.gather(*(answer(a.ping.remote(), who='w', asked='a', deadline_s=5) for a in actors))",
    "async with asyncio.timeout(5): await ref",
    "call = asyncio.to_thread(serve.status)\n    await answer(call, who='w', asked='a', deadline_s=5)",
    "ray.get(ref, timeout=5)",
    "subprocess.run(['sleep', '9'], timeout=5)",
    "urllib.request.urlopen(url, timeout=5)",
    "dist.init_process_group('gloo', timeout=t)",
    "await asyncio.sleep(5)",
    "await asyncio.to_thread(json.loads, text)",
)


def found(*lines: str, more: str = "") -> list[Wait]:
    """In a function with that body, and a coroutine `answer` beside it."""
    body = "\n    ".join(lines)
    return Reading({"room/file.py": f"async def answer(a, **k): ...\nasync def f():\n    {body}\n{more}"}).waits()


@pytest.mark.parametrize("code", FORGOTTEN)
def test_a_forgotten_deadline_is_found(code: str) -> None:
    assert [wait for wait in found(code) if not wait.has_deadline], FORGOTTEN[code]


@pytest.mark.parametrize("code", TIMED)
def test_what_has_a_deadline_is_left_alone(code: str) -> None:
    assert [wait.code for wait in found(code) if not wait.has_deadline] == []


def test_a_function_that_is_used_with_deadlines_alone_needs_none_of_its_own() -> None:
    asks = "async def _ask(handle):\n    await handle.f.remote()\n"
    bounded = "await answer(_ask(h), deadline_s=1)"
    assert all(wait.has_deadline for wait in found(bounded, more=asks))
    assert [wait.code for wait in found(bounded, "await _ask(h)", more=asks) if not wait.has_deadline] == [
        "handle.f.remote()"
    ]
    # Its own process goes on waiting when the caller gives up.
    remote = "await answer(actor._ask.remote(h), deadline_s=1)"
    assert [wait.code for wait in found(remote, more=asks) if not wait.has_deadline] == ["handle.f.remote()"]
