"""A policy small enough to be written out as a table: its log-probabilities after every prefix of every prompt.

P prompts, N prefixes of one length, V vocabulary, C = V - 1 tokens that continue, T tokens of a response, L tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.learner.soft_value_iteration import all_prefixes


def build_tiny_policy(folder: Path, *, vocabulary: int, seed: int) -> Path:
    """Save a random fp32 Llama whose last token is EOS to `folder`, and return it.

    Its logits differ by about 1 from token to token and from prefix to prefix.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        initializer_range=0.125,  # logits: sqrt(hidden_size) * 0.125 = 1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logprob_table(model: Any, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[Tensor]:
    """Log-probabilities in float64, a [P, N, V] tensor for each number of tokens so far.

    One causal pass over the longest prefixes of a prompt holds the shorter ones: with tokens counted in base C,
    every C**k-th row is the first that begins with a given prefix.
    """
    branching = model.config.vocab_size - 1
    longest_NL = all_prefixes(num_tokens - 1, branching)
    by_prompt = []
    for prompt in prompts:
        input_NL = torch.cat([torch.tensor(prompt).expand(len(longest_NL), -1), longest_NL], dim=1)
        logits_NTV = model(input_ids=input_NL).logits[:, len(prompt) - 1 :].double()
        logprobs_NTV = logits_NTV.log_softmax(-1)
        by_prompt.append([logprobs_NTV[:: branching ** (num_tokens - 1 - t), t] for t in range(num_tokens)])
    return [torch.stack(levels) for levels in zip(*by_prompt, strict=True)]
