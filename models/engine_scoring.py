"""Log-probabilities of responses that are there already, under the weights that an engine serves."""

from __future__ import annotations

from models.engine import Engine


async def response_logprobs(
    engine: Engine, prompt_tokens: list[int], response_tokens: list[int], *, request_id: str
) -> list[float]:
    """Natural log-probabilities of the response's tokens at temperature 1, one a token, by one forward pass.

    vLLM takes both as one prompt, and samples a token that nobody uses: together they may be one token shorter than
    the engine's context. Waits without a deadline of its own; cancelling it aborts the request. On the engine's loop.

    Raises:
        ValueError: too long, or tokens that the model does not have.
        WeightsError: the engine is broken.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError

    salt = await engine.accepting()
    tokens = [*prompt_tokens, *response_tokens]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    prompt = TokensPrompt(prompt_token_ids=tokens, cache_salt=salt)
    try:
        with engine.adapter() as adapter:
            lora_request = adapter.request if adapter else None
            async for output in engine.llm.generate(prompt, params, request_id, lora_request=lora_request):
                if output.finished and output.prompt_logprobs is not None:
                    found = zip(output.prompt_logprobs[len(prompt_tokens) :], response_tokens, strict=True)
                    return [at[token].logprob for at, token in found if at is not None]
    except VLLMValidationError as error:
        raise ValueError(str(error)) from error
    except EngineDeadError as error:
        raise engine.died(error) from error
    raise RuntimeError(f"request {request_id} ended without log-probabilities")
