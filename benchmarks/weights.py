"""Weight deltas: seconds to encode, check and apply them, and their size as a share of the dense bytes.

    python -m benchmarks.weights [--model bundled:smollm2-135m-instruct] [--densities 0.1 0.4 1 2 5 11 18 50]
    python -m benchmarks.weights --change values --densities 50 70 80 90 95 100

`--change steps` moves values at random places to a neighbouring one, as an optimizer with a small learning rate does;
`values` puts unrelated values there, as another model's would be: the case in which dense takes over. Without --model
the tensors are random, of the names and shapes of a 135M Llama. Each figure is the fastest of several, in one thread;
what comes out is compared with what went in.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from contracts.records import WeightsUpdate
from models import bundled
from models.weight_bits import bits_of, changed
from models.weight_frames import Encoding, read_frame
from models.weight_stream import DeltaReceiver, DeltaSender
from models.weights import digest

DENSITIES = (0.1, 0.4, 1.0, 2.0, 5.0, 11.0, 18.0, 50.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with model.safetensors, or bundled:NAME; default: random tensors")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, metavar="PERCENT")
    parser.add_argument("--change", choices=["steps", "values"], default="steps")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    source = load_file(Path(bundled.resolve(arguments.model), "model.safetensors")) if arguments.model else llama_135m()
    tensors = {name: tensor.to(dtype) for name, tensor in source.items()}
    dense_mb = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    print(f"`python -m benchmarks.weights {' '.join(sys.argv[1:])}`: {dense_mb:.0f} MB dense, {arguments.dtype}\n")
    print("| changed % | bytes % | bits a change | dense tensors | encode s | check and apply s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for density in arguments.densities:
        print(measured(tensors, density / 100, arguments.change, arguments.repeats), flush=True)
    print(measured_keyframe(tensors, arguments.repeats))


def measured(tensors: dict[str, Tensor], density: float, change: str, repeats: int) -> str:
    """A row of the table: updates one after the other, as in a run."""
    sender, shadow = DeltaSender(), {name: tensor.clone() for name, tensor in tensors.items()}
    sender.seed(tensors.items(), 0)
    receiver = DeltaReceiver(shadow, 0)
    encode_s, apply_s, states = [], [], {name: tensor.clone() for name, tensor in tensors.items()}
    for version in range(1, repeats + 1):
        before = {name: bits_of(tensor).copy() for name, tensor in states.items()}
        move(states, density, change, seed=version)
        count = sum(len(changed(old, bits_of(states[name]))) for name, old in before.items())
        del before
        gc.collect()
        began = time.perf_counter()
        frames = list(sender.encode(states.items(), version))
        encode_s.append(time.perf_counter() - began)
        update = described(sender, frames, version - 1, version)
        began = time.perf_counter()
        receiver.apply(frames, update=update, sender="the benchmark")
        apply_s.append(time.perf_counter() - began)
    if not digest(shadow) == digest(states) == sender.digest:
        raise AssertionError("what came out differs from what went in")
    values = sum(tensor.numel() for tensor in tensors.values())
    dense = sum(record.encoding is Encoding.DENSE for frame in frames for record in read_frame(frame, None).records)
    return (
        f"| {100 * count / values:.2f} | {100 * update.num_bytes / update.dense_bytes:.3f} "
        f"| {8 * update.num_bytes / count:.1f} | {dense} of {len(tensors)} | {min(encode_s):.2f} | {min(apply_s):.2f} |"
    )


def measured_keyframe(tensors: dict[str, Tensor], repeats: int) -> str:
    sender = DeltaSender()
    sender.seed(tensors.items(), 1)
    encode_s, apply_s = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        frames = list(sender.keyframe())
        encode_s.append(time.perf_counter() - began)
        update = described(sender, frames, None, 1)
        receiver = DeltaReceiver({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, None)
        began = time.perf_counter()
        receiver.apply(frames, update=update, sender="the benchmark")
        apply_s.append(time.perf_counter() - began)
    share = 100 * update.num_bytes / update.dense_bytes
    return f"| keyframe | {share:.3f} | | {len(tensors)} of {len(tensors)} | {min(encode_s):.2f} | {min(apply_s):.2f} |"


def described(sender: DeltaSender, frames: list[memoryview], base_version: int | None, version: int) -> WeightsUpdate:
    return WeightsUpdate(
        version=version,
        base_version=base_version,
        num_bytes=sum(len(frame) for frame in frames),
        digest=sender.digest,
        dense_bytes=sender.dense_bytes,
        num_frames=len(frames),
        fingerprint=sender.fingerprint,
    )


def move(tensors: dict[str, Tensor], density: float, change: str, *, seed: int) -> None:
    """Change that share of the values of each tensor, in place."""
    source = np.random.default_rng(seed)
    for tensor in tensors.values():
        bits = bits_of(tensor)
        where = np.flatnonzero(source.random(bits.size, dtype=np.float32) < density)
        if change == "steps":
            bits[where] += source.choice(np.array([1, -1]).astype(bits.dtype), len(where))
        else:
            bits[where] = bits_of(torch.from_numpy(source.normal(0, 0.05, len(where))).to(tensor.dtype))


def llama_135m() -> dict[str, Tensor]:
    """Normal weights under the names and shapes of SmolLM2-135M, embeddings tied."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in _shapes()}


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, key_value, inner = 576, 192, 1536
    yield "model.embed_tokens.weight", (49152, hidden)
    for layer in range(30):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            yield f"{prefix}{name}.weight", shape
    yield "model.norm.weight", (hidden,)


if __name__ == "__main__":
    main()
