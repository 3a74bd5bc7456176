"""What callers send, checked before anything else sees it, and errors in the shape that OpenAI's clients read.

Fields that OpenAI's clients send and that change nothing here (`user`, `store`, `metadata`, ...) are taken and left
out; those that would change the answer and are not served (`tools`, `audio`, ...) and unknown ones are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError
from pydantic import model_validator as check

from contracts.serving import ServingLimits

BUSY_S = 1.0  # Retry-After where nobody knows better
Number = StrictInt | StrictFloat
_TOKEN = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_NO_EFFECT = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity", "reasoning_effort",
}  # fmt: skip
_MAX_STOPS = 16


class ApiError(Exception):
    """An answer that is no success. `retry_after_s` becomes the Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        kind: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        default = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = {"message": message, "type": kind or default, "param": param, "code": code}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, -int(-self.retry_after_s // 1)))}


def overloaded(waiting: int) -> ApiError:
    """The answer where too many wait already."""
    message = f"{waiting} requests wait for a free place already, which is the limit: ask again later"
    return ApiError(503, message, code="overloaded", retry_after_s=BUSY_S)


class Body(BaseModel):
    """A JSON object; what it does not know is refused, so that a misspelt field does not silently do nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def rendered(self) -> dict[str, str]:
        """As chat templates know it: they have no developer, which is OpenAI's newer name for system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against eavesdroppers, which we never add


class TextFormat(Body):
    type: Literal["text"]


class Sampling(Body):
    """What chat and text completions share."""

    model: StrictStr = Field(min_length=1, max_length=200)
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    n: StrictInt | None = Field(default=None, ge=1)
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, gt=0, le=1)
    top_k: StrictInt | None = Field(default=None, ge=-1, lt=2**31)
    min_p: Number | None = Field(default=None, ge=0, le=1)
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(default=None, gt=0, le=10)
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[_TOKEN] | None = Field(default=None, max_length=_MAX_STOPS)
    ignore_eos: StrictBool | None = None
    min_tokens: StrictInt | None = Field(default=None, ge=0)
    skip_special_tokens: StrictBool | None = None
    return_token_ids: StrictBool | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]] | None = (
        Field(default=None, max_length=300)
    )
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    verbosity: Any = None
    reasoning_effort: Any = None

    @check(mode="after")
    def _fits_together(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _MAX_STOPS or any(not 1 <= len(stop) <= 1000 for stop in stops):
            raise ValueError(f"stop takes at most {_MAX_STOPS} texts of 1 to 1000 characters")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, must be at most max_tokens ({self.max_tokens})")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The longest response that was asked for."""
        return self.max_tokens

    @property
    def prompts(self) -> int:
        return 1

    def for_engine(self, name: str) -> dict[str, Any]:
        """What vLLM's handlers read; without max_tokens where the caller gave none. A stream ends with its usage."""
        body = self.model_dump(exclude_none=True, exclude=_NO_EFFECT | {"stream_options"})
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        return body | {"model": name}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1, description="max_tokens, by its newer name")
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @check(mode="after")
    def _says_something(self) -> ChatRequest:
        for index, message in enumerate(self.messages):
            if message.role == "user" and not message.text.strip():
                raise ValueError(f"messages.{index}.content is empty: a user message needs text")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def text(self) -> str:
        """The prompt as people read it: of several messages each with its role."""
        if len(self.messages) == 1:
            return self.messages[0].text
        return "\n\n".join(f"{message.role.capitalize()}: {message.text}" for message in self.messages)

    def turns(self) -> list[dict[str, str]]:
        return [message.rendered() for message in self.messages]

    def for_engine(self, name: str) -> dict[str, Any]:
        body = super().for_engine(name)
        for field in ("response_format", "modalities"):
            body.pop(field, None)
        return body | {"messages": self.turns()}


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[_TOKEN] | list[list[_TOKEN]]
    logprobs: StrictInt | None = Field(default=None, ge=0, le=5)
    echo: StrictBool | None = None

    @check(mode="after")
    def _says_something(self) -> CompletionRequest:
        if not self.prompt or (isinstance(self.prompt, list) and any(part in ("", []) for part in self.prompt)):
            raise ValueError("prompt is empty: it needs at least one character or token")
        return self

    @property
    def prompts(self) -> int:
        batched = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return len(self.prompt) if batched else 1

    def texts(self) -> list[str]:
        """Its prompts as text; token ids as JSON."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [str(self.prompt)]
        return [part if isinstance(part, str) else str(part) for part in self.prompt]


class ScoreRequest(Body):
    """POST /v1/score: a prompt (text or messages) and a response to it."""

    prompt: StrictStr | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    response: StrictStr

    @check(mode="after")
    def _one_prompt(self) -> ScoreRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def turns(self) -> list[dict[str, str]]:
        if self.messages is not None:
            return [message.rendered() for message in self.messages]
        return [{"role": "user", "content": str(self.prompt)}]


class FeedbackRequest(Body):
    """POST /v1/feedback: one judgment of an answer; which fields it takes depends on `kind`."""

    id: StrictStr = Field(min_length=1, max_length=200, description="of the answer")
    kind: Literal["thumbs", "label", "rating", "correction", "comparison"]
    choice_index: StrictInt = Field(default=0, ge=0, lt=1000, description="which choice of an answer with n > 1")
    value: StrictInt | StrictBool | Literal["up", "down"] | None = Field(
        default=None, description="thumbs: up or down; label: 0 or 1; rating: 1 to 5"
    )
    text: StrictStr | None = Field(default=None, description="correction: the better answer")
    other_id: StrictStr | None = Field(default=None, max_length=200, description="comparison: of the other answer")
    other_choice_index: StrictInt = Field(default=0, ge=0, lt=1000)
    preferred: Literal["this", "other", "tie", "both_bad"] | None = Field(default=None, description="comparison")
    comment: StrictStr = Field(default="", max_length=10_000)
    idempotency_key: StrictStr = Field(min_length=1, max_length=100, description="the same again: the same receipt")
    user: StrictStr = Field(default="", max_length=100, description="who of this key's users says so")

    @check(mode="after")
    def _is_whole(self) -> FeedbackRequest:
        needs = {"correction": ("text",), "comparison": ("other_id", "preferred")}.get(self.kind, ("value",))
        for name in ("value", "text", "other_id", "preferred"):
            if (getattr(self, name) is None) == (name in needs):
                raise ValueError(f"a {self.kind} {'needs' if name in needs else 'takes no'} {name}")
        allowed: dict[str, tuple[Any, ...]] = {"thumbs": ("up", "down"), "label": (0, 1), "rating": (1, 2, 3, 4, 5)}
        if self.kind in allowed and (
            self.value not in allowed[self.kind] or (self.kind == "rating" and isinstance(self.value, bool))
        ):
            raise ValueError(
                f"value is {self.value!r}, allowed for {self.kind} is {', '.join(map(str, allowed[self.kind]))}"
            )
        if (self.other_id, self.other_choice_index) == (self.id, self.choice_index):
            raise ValueError("a comparison takes two different answers: other_id is the answer itself")
        return self


class PinRequest(Body):
    """POST /v1/versions/pin."""

    version: StrictInt | StrictStr = Field(description='a version, or "latest" to follow training again')


class RollbackRequest(Body):
    """POST /v1/versions/rollback."""

    version: StrictInt = Field(ge=0)


def check_limits(request: Sampling, limits: ServingLimits) -> None:
    """What one request may ask for.

    Raises:
        ApiError: 400, with the limit.
    """
    most = limits.max_response_tokens
    if request.most_tokens is not None and request.most_tokens > most:
        raise ApiError(400, f"max_tokens is {request.most_tokens}, allowed are 1 to {most}", param="max_tokens")
    choices = request.prompts * (request.n or 1)
    if choices > limits.max_choices:
        raise ApiError(
            400, f"{choices} choices were asked for (prompts times n), allowed are {limits.max_choices}", param="n"
        )


def refusal(errors: list[Mapping[str, Any]] | ValidationError) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field, and what would be right."""
    found = errors.errors(include_url=False) if isinstance(errors, ValidationError) else errors
    first = min(found, key=lambda error: len(_field(error)) == 0)
    param = _field(first)
    if first["type"] == "json_invalid":
        where = f" ({first['ctx']['error']})" if "error" in first.get("ctx", {}) else ""
        return ApiError(400, f"the body is not valid JSON{where}: send one JSON object", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param} is not known or not served here: leave it out", param=param, code="unknown_field"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        message = (
            "is missing" if param else "the body is missing: send one JSON object with content-type application/json"
        )
    elif "input" in first and isinstance(first["input"], str | int | float | None) and param:
        message = f"{first['input']!r:.60} is not allowed: {message[:1].lower()}{message[1:]}"
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def _field(error: Mapping[str, Any]) -> str:
    """`messages.0.role`; without the names of the union's members, which pydantic adds."""
    path = [str(part) for part in error["loc"] if part != "body"]
    return ".".join(part for part in path if part.isdigit() or (part.isidentifier() and part not in _UNION_MEMBERS))


_UNION_MEMBERS = {"str", "int", "float", "bool", "TextPart"}
