"""Parts of answers through a Unix socket: whole, in order, each in its box, and no wait when an end is gone."""

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.waiting import NoAnswer
from serving.wire import Box, Inbox, ReplyTo, WireLost, Wires, _Reader

NODE = "this node"


async def given_parts(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
        await asyncio.sleep(0)


async def all_of(box: Box) -> bytes:
    taken = b""
    while part := await asyncio.wait_for(box.take(), 20):
        taken += part
    return taken


def to(box: Box) -> ReplyTo:
    assert box.reply_to is not None
    return box.reply_to


def new_box(number: int = 0) -> Box:
    return Box(ReplyTo(NODE, "nowhere", number))


def mode_of_folder(reply: ReplyTo) -> int | None:
    folder = Path(reply.path).parent
    return stat.S_IMODE(folder.stat().st_mode) if folder.exists() else None


async def test_many_answers_of_two_replicas_come_whole_and_in_order() -> None:
    inbox, replicas = Inbox(), [Wires(NODE), Wires(NODE)]
    async with inbox.opened(NODE):
        answers = [[f"{number}:{index};".encode() * (1 + index % 50) for index in range(200)] for number in range(20)]
        boxes = [inbox.box() for _ in answers]
        sent = [
            asyncio.create_task(replicas[number % 2].deliver(given_parts(parts), to(boxes[number])))
            for number, parts in enumerate(answers)
        ]
        came = await asyncio.gather(*(all_of(box) for box in boxes))
        await asyncio.gather(*sent)
        assert came == [b"".join(parts) for parts in answers]
        for each in replicas:
            each.close()


async def test_what_has_come_is_taken_at_once() -> None:
    box = new_box()
    for part in (b"a", b"b", b"c"):
        box.put(part)
    assert await box.take() == b"abc"
    box.put(b"d")
    box.put(b"")
    assert await box.take() == b"d"
    assert [await box.take(), await box.take()] == [b"", b""]


async def test_the_first_part_can_be_taken_alone() -> None:
    box = new_box()
    box.put(b"head")
    assert await box.take_first() == b"head"
    taking = asyncio.ensure_future(box.take())
    await asyncio.sleep(0.01)
    assert not taking.done()
    box.put(b"a")
    assert await taking == b"a"
    for part in (b"head", b"a", b"b", b""):
        box.put(part)
    assert [await box.take_first(), await box.take(), await box.take_first()] == [b"head", b"ab", b""]


async def test_what_is_said_in_one_turn_is_one_write() -> None:
    inbox, replica, writes = Inbox(), Wires(NODE), 0

    def read(self: _Reader, data: bytes) -> None:
        nonlocal writes
        writes += 1
        data_received(self, data)

    data_received = _Reader.data_received
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Reader, "data_received", read)
        async with inbox.opened(NODE):
            boxes = [inbox.box() for _ in range(10)]
            await replica.deliver(given_parts([b"connected"]), to(boxes[0]))
            assert await all_of(boxes[0]) == b"connected"
            begun, writes = writes, 0
            await asyncio.gather(*(replica.deliver(given_parts([b"head", b"part"]), to(box)) for box in boxes[1:]))
            assert [await all_of(box) for box in boxes[1:]] == [b"headpart"] * 9
            replica.close()
    assert begun <= 2
    assert writes <= 4, "nine answers of three frames, in three turns"


async def test_a_failure_comes_after_what_was_sent_before_it() -> None:
    box = new_box()
    box.put(b"begun")
    box.fail(RuntimeError("the replica died"))
    assert await box.take() == b"begun"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the replica died"):
            await box.take()


async def test_after_the_end_nothing_fails_any_more() -> None:
    box = new_box()
    box.put(b"")
    box.fail(RuntimeError("its process ended"))
    assert await box.take() == b""


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.binary(min_size=1, max_size=40)), max_size=20),
    st.lists(st.integers(1, 60), max_size=40),
)
def test_frames_may_be_cut_anywhere(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    async def read() -> None:
        boxes = {number: new_box(number) for number in range(2)}  # box 2 is closed already
        reader = _Reader(boxes, set())
        stream = b"".join(len(part).to_bytes(4) + number.to_bytes(8) + part for number, part in sent)
        for cut in cuts:
            reader.data_received(stream[:cut])
            stream = stream[cut:]
        reader.data_received(stream)
        for number, box in boxes.items():
            box.put(b"")
            assert await all_of(box) == b"".join(part for to, part in sent if to == number)

    asyncio.run(read())


async def test_an_ingress_that_is_gone_ends_the_answer() -> None:
    inbox, replica, ended = Inbox(), Wires(NODE), asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"word " * 100
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    async with inbox.opened(NODE):
        box = inbox.box()
        parts = endless()
        sending = asyncio.create_task(replica.deliver(parts, to(box)))
        assert await asyncio.wait_for(box.take(), 20)
    with pytest.raises(WireLost, match="the ingress that asked is gone"):
        await asyncio.wait_for(sending, 20)
    with pytest.raises(WireLost, match="No such file"):
        await replica.deliver(given_parts([b"x"]), to(box))
    await parts.aclose()  # type: ignore[attr-defined]
    assert ended.is_set()


class _Deaf(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()


async def test_an_ingress_that_reads_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.wire._WAIT_S", 0.2)
    path = str(tmp_path / "in")
    server = await asyncio.get_running_loop().create_unix_server(_Deaf, path)
    replica = Wires(NODE)
    with pytest.raises(NoAnswer, match=r"the ingress did not answer within 0.2 s, asked .* to read answers"):
        await asyncio.wait_for(replica.deliver(given_parts([b"x" * (1 << 20)] * 8), ReplyTo(NODE, path, 0)), 20)
    replica.close()
    server.close()


async def test_only_a_replica_of_the_same_node_is_within_reach() -> None:
    inbox = Inbox()
    assert inbox.box().reply_to is None  # nobody can connect yet
    async with inbox.opened(NODE):
        reply = to(inbox.box())
        assert Wires(NODE).reached(reply) == reply
        assert Wires("another node").reached(reply) is None
        assert Wires(NODE).reached(None) is None
        assert mode_of_folder(reply) == 0o700
    assert mode_of_folder(reply) is None
    assert inbox.box().reply_to is None


async def test_what_comes_for_a_closed_box_is_dropped() -> None:
    inbox, replica = Inbox(), Wires(NODE)
    async with inbox.opened(NODE):
        gone, box = inbox.box(), inbox.box()
        inbox.close(gone)
        await replica.deliver(given_parts([b"late"]), to(gone))
        await replica.deliver(given_parts([b"in time"]), to(box))
        assert await all_of(box) == b"in time"
        replica.close()
