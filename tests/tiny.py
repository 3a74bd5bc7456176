"""A tiny Llama with a real tokenizer, built on the spot: loads in seconds, needs no download.

The tokenizer follows SmolLM2: byte-level BPE, ChatML, pad == eos == `<|im_end|>`.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SENTENCES = [
    "A headrace is the channel that carries water to the wheel of a mill.",
    "The miller opened the gate, and the wheel began to turn in the morning.",
    "What is the best way to learn a new language? Read, listen and speak every day.",
    "system user assistant: please answer the question in one short sentence.",
    "Thank you, that was helpful and kind. I am sorry, this answer is not right.",
    "One, two, three, four, five; 6, 7, 8, 9, 10 (and so on)!",
]


def build_tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` tokens (from 259: 256 bytes and the specials)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    assert bpe.get_vocab_size() == vocab_size, "too few sentences for this many merges"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token=EOS,
        pad_token=EOS,
        unk_token="<|endoftext|>",
        model_max_length=256,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_tiny_model(
    folder: Path,
    *,
    tied: bool,
    seed: int = 0,
    vocab_size: int = 320,
    hidden_size: int = 128,
    num_layers: int = 2,
) -> Path:
    """Save a random bf16 Llama and its tokenizer to `folder`, and return it.

    Head size 32, half as many key-value heads as heads, context 256. The weights are large
    enough for token probabilities to differ clearly, so that a comparison of log-probs can
    fail. The same `seed` gives the same weights; every seed has the same names and shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tiny_tokenizer(vocab_size)
    num_heads = hidden_size // 32
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 2),
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Logits are normalised states times embeddings: their spread is about
        # sqrt(hidden_size) * initializer_range, here 1.4.
        initializer_range=0.125,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
