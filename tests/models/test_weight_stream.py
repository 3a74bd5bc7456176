"""A stream of versions from one sender to one receiver: in place, layer by layer, refused whole or taken whole."""

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from contracts.records import WeightsUpdate
from models import weight_stream
from models.weight_frames import Encoding, read_frame
from models.weight_stream import DeltaError, DeltaReceiver, DeltaSender, read_tensors
from models.weights import digest

LAYERS = 3


def model(seed=0, *, size=40):
    """A small model's weights: three layers between an embedding and a norm."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in ("attn", "mlp")]
    shapes = {"model.embed.weight": (50, size)} | dict.fromkeys(names, (size, size)) | {"model.norm.weight": (size,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def trained(tensors, seed, share=0.02):
    """As after an optimizer step: some values moved to a neighbouring one."""
    source = np.random.default_rng(seed)
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in moved.values():
        bits = tensor.reshape(-1).view(torch.int16)
        where = torch.from_numpy(np.flatnonzero(source.random(len(bits)) < share))
        bits[where] += torch.from_numpy(source.choice(np.array([-1, 1], dtype=np.int16), len(where)))
    return moved


def described(sender, frames, base_version, version):
    return WeightsUpdate(
        version=version,
        base_version=base_version,
        num_bytes=sum(len(frame) for frame in frames),
        digest=sender.digest,
        dense_bytes=sender.dense_bytes,
        num_frames=len(frames),
        fingerprint=sender.fingerprint,
    )


def sent(sender, tensors, version) -> tuple[Any, Any]:
    base_version = sender.next_base
    frames = list(sender.encode(tensors.items(), version))
    return frames, described(sender, frames, base_version, version)


def sent_keyframe(sender) -> tuple[Any, Any]:
    frames = list(sender.keyframe())
    return frames, described(sender, frames, None, sender.version)


def clone(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


class Ends:
    """Sender and receiver that start from the same weights as version 0."""

    def __init__(self, *, key=None, dense=False):
        self.weights = model()
        self.sender = DeltaSender(key=key, dense=dense)
        self.sender.seed(self.weights.items(), 0)
        self.held = clone(self.weights)
        self.receiver = DeltaReceiver(self.held, 0, key=key)

    def next_update(self, version, **options) -> tuple[Any, Any]:
        self.weights = trained(self.weights, version, **options)
        return sent(self.sender, self.weights, version)

    def take(self, frames, update):
        self.receiver.apply(frames, update=update, sender="learner")

    def refused(self, frames, update, reason, *, needs_keyframe=True):
        """Refused for this reason, on one line that names the sender, and nothing has changed."""
        before, version = clone(self.held), self.receiver.version
        with pytest.raises(DeltaError, match=reason) as caught:
            self.take(frames, update)
        error = caught.value
        assert str(error).startswith(f"weights version {update.version} from learner refused: ")
        assert "\n" not in str(error)
        assert (error.sender, error.version, error.needs_keyframe) == ("learner", update.version, needs_keyframe)
        assert self.receiver.version == version
        assert digest(before) == digest(self.held)


def test_many_versions_in_place():
    ends = Ends()
    addresses = {name: tensor.data_ptr() for name, tensor in ends.held.items()}
    for version in range(1, 30):
        frames, update = ends.next_update(version, share=(0.0, 0.02, 0.5)[version % 3])
        assert (update.base_version, update.is_keyframe, update.num_frames) == (version - 1, False, LAYERS + 2)
        ends.take(frames, update)
        assert ends.receiver.version == ends.sender.version == version
        assert update.digest == digest(ends.weights) == digest(ends.held)
    assert addresses == {name: tensor.data_ptr() for name, tensor in ends.held.items()}


def test_versions_may_be_left_out_by_the_sender():
    ends = Ends()
    ends.take(*ends.next_update(3))
    ends.take(*ends.next_update(10))
    assert digest(ends.held) == digest(ends.weights)


def test_float32_weights_stay_float32():
    """Steps below bf16's resolution arrive."""
    base = {"w": torch.linspace(-1, 1, 1000), "b": torch.zeros(3)}
    new = {"w": base["w"] * (1 + 1e-6), "b": torch.tensor([1e-40, -0.0, float("inf")])}
    assert torch.equal(base["w"].bfloat16(), new["w"].bfloat16())
    sender, held = DeltaSender(), clone(base)
    sender.seed(base.items(), 0)
    frames, update = sent(sender, new, 1)
    DeltaReceiver(held, 0).apply(frames, update=update, sender="learner")
    assert all(torch.equal(held[name].view(torch.int32), new[name].view(torch.int32)) for name in new)


def encodings(frames):
    return {record.spec.name: record.encoding for frame in frames for record in read_frame(frame, None).records}


def test_the_smaller_encoding_is_chosen_for_each_tensor():
    base = model(size=64)
    names = list(base)
    new = clone(base)
    source = torch.Generator().manual_seed(5)
    new[names[1]] = torch.randn(base[names[1]].shape, generator=source).bfloat16() * 7  # unrelated to the old values
    new[names[2]].view(torch.int16)[:] += 1  # all of them, but by little
    new[names[3]].view(-1)[::50] += 1
    sender = DeltaSender()
    sender.seed(base.items(), 0)
    frames, update = sent(sender, new, 1)
    found = encodings(frames)
    assert [found[name] for name in names[:5]] == [
        Encoding.SAME, Encoding.DENSE, Encoding.SPARSE, Encoding.SPARSE, Encoding.SAME,
    ]  # fmt: skip
    assert update.num_bytes < 1.1 * new[names[1]].nbytes + new[names[2]].nbytes / 8 + 2000
    held = clone(base)
    DeltaReceiver(held, 0).apply(frames, update=update, sender="learner")
    assert digest(held) == digest(new)


def test_a_delta_of_an_optimizer_step_is_small():
    """0.4 % of values moved: at most 0.5 % of the dense bytes, names and digests of the tensors apart."""
    base = {f"model.layers.{layer}.w": torch.randn(700, 700).bfloat16() for layer in range(4)}
    sender = DeltaSender()
    sender.seed(base.items(), 0)
    frames, update = sent(sender, trained(base, 1, share=0.004), 1)
    assert update.num_bytes < 0.005 * update.dense_bytes
    assert set(encodings(frames).values()) == {Encoding.SPARSE}


def test_frames_come_as_layers_are_complete():
    """The first frame is out before the second layer is asked for."""
    weights = model()
    sender, asked = DeltaSender(), []
    sender.seed(weights.items(), 0)

    def one_by_one():
        for name, tensor in trained(weights, 1).items():
            asked.append(name)
            yield name, tensor

    frames = sender.encode(one_by_one(), 1)
    seen = [len(asked) for _ in frames]
    assert seen == [1, 3, 5, 7, 8]


def test_large_layers_are_cut_into_frames(monkeypatch):
    monkeypatch.setattr(weight_stream, "_FRAME_BYTES", 2 * 40 * 40)
    ends = Ends()
    frames, update = ends.next_update(1)
    assert len(frames) == 2 + 2 * LAYERS
    ends.take(frames, update)
    assert digest(ends.held) == digest(ends.weights)


def test_neither_end_holds_a_second_copy():
    """Both work in a few layers' worth of memory, deltas and keyframes."""
    torch.manual_seed(0)
    base = {f"model.layers.{layer}.w": torch.randn(512, 1024).bfloat16() for layer in range(24)}
    layer_bytes = base["model.layers.0.w"].nbytes
    sender = DeltaSender()
    sender.seed(base.items(), 0)
    receiver = DeltaReceiver(clone(base), 0)
    new = trained(base, 1, share=0.02)
    tracemalloc.start()
    frames, update = sent(sender, new, 1)
    receiver.apply(frames, update=update, sender="learner")
    delta_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for _ in sender.keyframe():
        pass
    keyframe_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert update.num_bytes < layer_bytes
    assert delta_peak < 4 * layer_bytes
    assert keyframe_peak < 4 * layer_bytes


def test_a_keyframe_brings_anybody_on():
    ends = Ends()
    for version in (1, 2):
        ends.next_update(version)
    late = {name: torch.full_like(tensor, float("nan")) for name, tensor in ends.weights.items()}
    frames, update = sent_keyframe(ends.sender)
    assert (update.base_version, update.version) == (None, 2)
    empty = DeltaReceiver(late, None)
    empty.apply(frames, update=update, sender="learner")
    assert digest(late) == digest(ends.weights) == update.digest
    ends.take(frames, update)  # which is at version 0
    frames, update = ends.next_update(3)
    for receiver, held in ((empty, late), (ends.receiver, ends.held)):
        receiver.apply(frames, update=update, sender="learner")
        assert digest(held) == digest(ends.weights)


def test_a_dense_sender_sends_keyframes_alone():
    ends = Ends(dense=True)
    for version in (1, 2):
        frames, update = ends.next_update(version)
        assert update.is_keyframe
        assert update.dense_bytes < update.num_bytes < 1.2 * update.dense_bytes
        ends.take(frames, update)
        assert digest(ends.held) == digest(ends.weights)


def test_a_sender_without_a_state_begins_with_a_keyframe():
    weights, sender = model(), DeltaSender()
    with pytest.raises(RuntimeError, match="nothing was published"):
        next(sender.keyframe())
    frames, update = sent(sender, weights, 5)
    assert update.is_keyframe
    assert digest(read_tensors(frames, update=update, sender="learner")) == digest(weights)
    _, update = sent(sender, trained(weights, 1), 6)
    assert update.base_version == 5


def test_an_interrupted_update_is_followed_by_a_keyframe():
    """Whether the tensors end, something raises between them, or the taker gives up."""
    for interrupt in ("short", "raises", "closed"):
        ends = Ends()
        new = trained(ends.weights, 1)
        items = list(new.items())

        def broken(items=items):
            yield from items[:4]
            raise ConnectionError("a rank died")

        if interrupt == "closed":
            frames = ends.sender.encode(items, 1)
            for _ in range(LAYERS + 2):  # all frames came, and putting the last one somewhere failed
                next(frames)
            frames.close()
        else:
            source = items[:4] if interrupt == "short" else broken()
            with pytest.raises((ValueError, ConnectionError), match=r"did not come|a rank died"):
                list(ends.sender.encode(source, 1))
        assert ends.sender.version is None
        with pytest.raises(RuntimeError, match="no whole version"):
            next(ends.sender.keyframe())
        frames, update = sent(ends.sender, new, 2)
        assert update.is_keyframe
        ends.take(frames, update)
        assert digest(ends.held) == digest(new)


@pytest.mark.parametrize("wrong", ["order", "shape", "dtype", "extra"])
def test_a_sender_takes_its_own_tensors_alone(wrong):
    weights, sender = model(), DeltaSender()
    sender.seed(weights.items(), 0)
    items = list(weights.items())
    name, tensor = items[2]
    if wrong == "order":
        items[1], items[2] = items[2], items[1]
    elif wrong == "extra":
        items.append(("more", tensor))
    else:
        items[2] = (name, tensor[:5] if wrong == "shape" else tensor.half())
    with pytest.raises(ValueError, match=r"came where .* was expected|came behind the last"):
        list(sender.encode(items, 1))
    sender.seed(weights.items(), 4)
    with pytest.raises(ValueError, match="version 4 does not follow version 4"):
        list(sender.encode(weights.items(), 4))


def test_what_came_already_is_refused_for_that():
    ends = Ends()
    first, second = ends.next_update(1), ends.next_update(2)
    ends.take(*first)
    ends.take(*second)
    for frames, update in (first, second, sent_keyframe(ends.sender)):
        ends.refused(frames, update, "it came already, version 2 is held", needs_keyframe=False)


def test_a_missed_version_asks_for_a_keyframe():
    ends = Ends()
    ends.next_update(1)
    ends.refused(*ends.next_update(2), "it builds on version 1, version 0 is held")
    ends.take(*sent_keyframe(ends.sender))
    assert digest(ends.held) == digest(ends.weights)


def flipped(frame, position=-50):
    damaged = bytearray(frame)
    damaged[position] ^= 4
    return bytes(damaged)


def forged(frame, old, new):
    """Bytes replaced and the plain checksum made to fit."""
    assert old in bytes(frame)
    body = bytes(frame[:-32]).replace(old, new)
    return body + blake3(body).digest()


def test_damage_on_the_way_is_refused():
    ends = Ends()
    frames, update = ends.next_update(1)
    for index, frame in enumerate(frames):
        for bad, reason in {
            flipped(frame): "it is damaged: its checksum differs",
            bytes(frame[:-7]): f"it has {len(frame) - 7} bytes of {len(frame)}",
            b"": "0 bytes are too few for a frame",
        }.items():
            damaged = [*frames[:index], bad, *frames[index + 1 :]]
            ends.refused(damaged, update, f"frame {index + 1} of 5: {reason}")
    ends.refused(frames[:-1], update, "4 of 5 frames came")
    ends.refused([], update, "0 of 5 frames came")
    ends.refused([*frames, frames[0]], update, "6 of 5 frames came")
    ends.refused([frames[1], frames[0], *frames[2:]], update, "frame 1 of 5: it is frame 2 of 5")
    ends.refused([frames[0], frames[0], *frames[2:]], update, "frame 2 of 5: it is frame 1 of 5")
    ends.refused(frames, replace(update, digest="0" * 64), "its digest is not the announced one")
    ends.refused(frames, replace(update, num_bytes=5), "bytes, 5 were announced")
    ends.take(frames, update)  # and none of it did harm
    assert digest(ends.held) == digest(ends.weights)


def test_frames_of_another_update_are_refused():
    ends = Ends()
    frames, update = ends.next_update(1)
    other = DeltaSender()
    other.seed(trained(ends.weights, 7).items(), 0)
    foreign, _ = sent(other, ends.weights, 1)  # same versions, another base
    num_bytes = update.num_bytes - len(frames[0]) + len(foreign[0])
    mixed = [foreign[0], *frames[1:]]
    ends.refused(mixed, replace(update, num_bytes=num_bytes), "the bits held are not those that the change is for")
    later, _ = ends.next_update(2)
    ends.refused([later[0], *frames[1:]], update, "it leads from version 1 to 2")
    keyframe, announced = sent_keyframe(ends.sender)
    ends.refused([keyframe[0], *frames[1:]], update, "it leads from version None to 2")
    ends.refused([later[0], *keyframe[1:]], announced, "it leads from version 1 to 2")


def test_a_base_with_other_bits_is_refused():
    """The sender took its base from somewhere else."""
    ends = Ends()
    other = DeltaSender()
    other.seed(trained(ends.weights, 7).items(), 0)
    ends.refused(*sent(other, trained(ends.weights, 8), 1), "the bits held are not those that the change is for")


def test_another_model_is_refused():
    ends = Ends()
    for foreign in (model(size=41), model() | {"more": torch.zeros(1)}, {"w": torch.zeros(3)},
                    {name: tensor.half() for name, tensor in model().items()}):  # fmt: skip
        sender = DeltaSender()
        sender.seed(foreign.items(), 0)
        update = sent(sender, trained(foreign, 1) if foreign.keys() > {"model"} else foreign, 1)
        ends.refused(*update, r"this model has|is no tensor of this model")
        ends.refused(*sent_keyframe(sender), r"this model has|is no tensor of this model")
    fewer = {name: tensor for name, tensor in model().items() if "layers.1" not in name}
    sender = DeltaSender()
    sender.seed(fewer.items(), 1)
    ends.refused(*sent_keyframe(sender), "it lacks model.layers.1.attn.weight")


def test_with_a_key_only_its_holder_is_believed():
    ends = Ends(key=b"secret of the run")
    frames, update = ends.next_update(1)
    for name, other in {"unsigned": None, "wrong": b"another secret"}.items():
        forger = DeltaSender(key=other)
        forger.seed(model().items(), 0)
        forgery, announced = sent(forger, trained(model(), 9), 1)
        ends.refused(forgery, announced, "it is not signed" if name == "unsigned" else "its signature does not fit")
    bits = bytes(frames[0])
    plain = blake3(bits[:-32]).digest()
    ends.refused([bits[:-32] + plain, *frames[1:]], update, "frame 1 of 5: its signature does not fit")
    ends.take(frames, update)
    assert digest(ends.held) == digest(ends.weights)
    keyless = Ends()
    keyless.refused(frames, update, "it is signed with a key that is not known here")


def test_a_digest_that_does_not_fit_after_the_write_leaves_only_a_keyframe():
    """Somebody else wrote to the memory: nothing but the hash of what is there now can tell."""
    ends = Ends()
    ends.held["model.layers.1.mlp.weight"][3, 3] += 1
    frames, update = ends.next_update(1)
    with pytest.raises(DeltaError, match=r"layers.1.mlp.weight: its digest differs after the write") as caught:
        ends.take(frames, update)
    assert caught.value.needs_keyframe
    assert ends.receiver.version is None
    ends.refused(frames, update, "it builds on version 0, no whole version is held")
    ends.take(*sent_keyframe(ends.sender))
    assert digest(ends.held) == digest(ends.weights)
    assert ends.receiver.version == 1
    ends.take(*ends.next_update(2))
    assert digest(ends.held) == digest(ends.weights)


def test_a_receiver_told_to_forget_takes_a_keyframe_of_any_version():
    ends = Ends()
    ends.take(*ends.next_update(1))
    ends.receiver.forget()
    ends.refused(*ends.next_update(2), "it builds on version 1, no whole version is held")
    ends.take(*sent_keyframe(ends.sender))
    ends.take(*ends.next_update(3))
    assert digest(ends.held) == digest(ends.weights)


def test_keyframes_with_changes_in_them_are_refused():
    """A delta passed off as a keyframe would leave the rest as it was."""
    ends = Ends()
    frames, update = ends.next_update(1)
    base = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    none = (-1).to_bytes(8, "little", signed=True) + (1).to_bytes(8, "little")
    ends.refused(
        [forged(frame, base, none) for frame in frames], replace(update, base_version=None), "a keyframe with a"
    )


def test_only_memory_that_can_be_written_in_place_is_received_into():
    weights = model()
    name = "model.embed.weight"
    readonly = np.zeros((50, 40), np.uint16)
    readonly.flags.writeable = False
    for unfit in (weights[name].T, readonly):
        with pytest.raises(ValueError, match=f"{name}: weights are received in place"):
            DeltaReceiver(weights | {name: unfit}, 0)


def test_frames_may_be_read_only_arrays():
    """As Ray's object store gives them."""
    ends = Ends()
    frames, update = ends.next_update(1)
    arrays = [np.frombuffer(bytes(frame), np.uint8) for frame in frames]
    assert not arrays[0].flags.writeable
    ends.take(arrays, update)
    assert digest(ends.held) == digest(ends.weights)


def test_tensors_that_nobody_holds_are_read_from_a_keyframe():
    adapter = {"a.lora_A": torch.randn(4, 8), "a.lora_B": torch.zeros(8, 4).bfloat16(), "s": torch.tensor(3)}
    sender = DeltaSender(dense=True)
    frames, update = sent(sender, adapter, 7)
    found = read_tensors(frames, update=update, sender="learner")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in adapter.items()
    }
    assert digest(found) == digest(adapter)
    with pytest.raises(DeltaError, match=r"version 7 from learner refused: frame 1 of 1: it is damaged"):
        read_tensors([flipped(frames[0])], update=update, sender="learner")
    ends = Ends()
    with pytest.raises(DeltaError, match="a keyframe was expected"):
        read_tensors(*ends.next_update(1)[:1], update=ends.next_update(2)[1], sender="learner")


def test_a_forged_shape_is_refused_before_it_is_allocated():
    adapter = {"a": torch.zeros(4, 8, dtype=torch.int8)}
    [frame], update = sent(DeltaSender(dense=True), adapter, 7)
    shape = (4).to_bytes(8, "little") + (8).to_bytes(8, "little")
    for large in (2**20, 2**40, 2**63):
        data = forged(frame, shape, large.to_bytes(8, "little") + (8).to_bytes(8, "little"))
        with pytest.raises(DeltaError, match="not complete"):
            read_tensors([data], update=update, sender="learner")
        record = read_frame(data, None).records[0]
        fitting = replace(
            update,
            fingerprint=weight_stream.fingerprint([record.spec]).hex(),
            digest=weight_stream.digest_of_state([(record.spec, record.digest)]),
        )
        data = forged(data, bytes.fromhex(update.fingerprint), bytes.fromhex(fitting.fingerprint))
        with pytest.raises(DeltaError, match="cannot bring a"):
            read_tensors([data], update=fitting, sender="learner")
