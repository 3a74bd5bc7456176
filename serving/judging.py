"""POST /v1/feedback and /v1/score: what people and reward models think of an answer."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from fastapi import APIRouter, Request
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from contracts.disk import DiskFull
from contracts.events import Event, first_line
from contracts.waiting import NoAnswer, answer
from feedback.store import Judgment, Receipt, Refused, Store
from serving.answers import Answer
from serving.asking import BUSY_S, tell
from serving.desk import SCORE_S, Desk
from serving.protocol import ApiError, FeedbackRequest, ScoreRequest

_STORE_S = 30.0
_RATING_SCALE = 5
_STATUS = {"unknown_response": 404, "key_reused": 409, "already_voted": 409, "busy": 503}

router = APIRouter()


@router.post("/v1/feedback")
async def feedback(body: FeedbackRequest, request: Request) -> dict[str, Any]:
    """It is on disk when this answers. The same key and content again bring the same receipt."""
    desk: Desk = request.app.state.desk
    who = f"{request.scope['key'].name}/{body.user}" if body.user else request.scope["key"].name
    answers = {each: desk.answers.get(each) for each in (body.id, body.other_id) if each}
    work = asyncio.to_thread(_judge, desk.store, who, body, answers)
    try:
        receipt = await answer(work, who="the feedback store", asked="keep a judgment", deadline_s=_STORE_S)
    except Refused as refused:
        raise _refused(refused) from refused
    except (DiskFull, NoAnswer) as error:
        tell(Event("disk_full", "the feedback store", first_line(error), "a judgment is refused"))
        message = "the judgment could not be stored and was not kept: send it again later"
        raise ApiError(503, message, code="store_unavailable", retry_after_s=BUSY_S) from error
    return {
        "id": body.id,
        "object": "feedback",
        "judgment_id": receipt.judgment_id,
        "repeated": receipt.repeated,
        "weights_version": receipt.weights_version_a,
    }


def _refused(refused: Refused) -> ApiError:
    status = _STATUS.get(refused.code, 400)
    message = str(refused)
    if refused.code == "unknown_response":
        message = (
            "no such answer, or it is too old for feedback: give the `id` of an answer, and an existing choice_index"
        )
    elif refused.code == "key_reused":
        message = "this idempotency_key stands for another judgment already: use a new one for a new judgment"
    elif refused.code == "already_voted":
        message = "this answer has such a judgment of this key or user already, and judgments are not changed"
    return ApiError(status, message, code=refused.code, retry_after_s=BUSY_S if status == 503 else None)


def _judge(store: Store, who: str, body: FeedbackRequest, answers: dict[str, Answer | None]) -> Receipt:
    """In one thread. Prompt and answer go into the store with the first judgment of them."""
    response_id = _kept(store, body.id, body.choice_index, answers[body.id])
    other_id = None
    value: float | None = None
    if body.kind == "comparison":
        other_id = _kept(store, str(body.other_id), body.other_choice_index, answers[str(body.other_id)])
    elif body.kind == "thumbs":
        value = float(body.value == "up")
    elif body.value is not None:
        value = float(body.value)
    choice = {"this": "a", "other": "b"}.get(body.preferred or "", body.preferred)
    judgment = Judgment(body.idempotency_key, choice=choice, value=value, text=body.text, rationale=body.comment)
    kind = "pair" if body.kind == "comparison" else body.kind
    person = store.person(who)
    return store.judge_served(person, kind, response_id, judgment, other_response_id=other_id, scale=_RATING_SCALE)


def _kept(store: Store, answer_id: str, choice: int, given: Answer | None) -> str:
    """The response's id in the store, which has it, or gets it here. One that nobody knows any more, it refuses."""
    response_id = answer_id if choice == 0 else f"{answer_id}/{choice}"
    if given is not None and choice < len(given.texts):
        prompt = store.add_prompt(given.prompts[choice], messages=given.messages)
        store.add_response(
            prompt, given.texts[choice], source="live", weights_version=given.version,
            sampling=given.sampling, response_id=response_id,
        )  # fmt: skip
    return response_id


@router.post("/v1/score")
async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
    """The reward as in training: the weighted sum of its components, and each of them with its version."""
    desk: Desk = request.app.state.desk
    if not desk.scorers:
        raise ApiError(404, "no reward is served here: start serving with the run's `rewards`", code="no_reward")
    turns = body.turns()

    async def component(name: str, weight: float, scorer: Any) -> dict[str, Any]:
        call = scorer(turns, body.response)
        try:
            value, version = await answer(call, who=f"reward component {name}", asked="score", deadline_s=SCORE_S)
        except ValueError as error:
            raise ApiError(
                400, f"component {name} cannot score this: {first_line(error)}", code="not_scorable"
            ) from error
        except (RayError, RayServeException, NoAnswer) as error:
            tell(Event("refusal", f"reward component {name}", first_line(error), "a score is answered with 503"))
            message = f"component {name} does not answer now: ask again later"
            raise ApiError(503, message, code="scorer_lost", retry_after_s=BUSY_S) from error
        if not math.isfinite(value):
            raise ApiError(400, f"component {name} gives no finite score for this", code="not_scorable")
        return {"name": name, "score": value, "weight": weight, "version": version}

    components = await asyncio.gather(*(component(name, *each) for name, each in desk.scorers.items()))
    reward = sum(each["weight"] * each["score"] for each in components)
    return {"object": "score", "model": desk.config.name, "reward": reward, "components": components}
