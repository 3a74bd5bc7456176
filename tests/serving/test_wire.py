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


def opened(inbox: Inbox) -> Box:
    found = inbox.box()
    assert found is not None
    return found


def new_box(number: int = 0) -> Box:
    return Box(ReplyTo(NODE, "nowhere", number))


def mode_of_folder(reply: ReplyTo) -> int | None:
    folder = Path(reply.path).parent
    return stat.S_IMODE(folder.stat().st_mode) if folder.exists() else None


async def test_many_answers_of_two_replicas_come_whole_and_in_order() -> None:
    inbox, replicas = Inbox(), [Wires(NODE), Wires(NODE)]
    async with inbox.opened(NODE):
        answers = [[f"{number}:{index};".encode() * (1 + index % 50) for index in range(200)] for number in range(20)]
        boxes = [opened(inbox) for _ in answers]
        sent = [
            asyncio.create_task(replicas[number % 2].deliver(given_parts(parts), boxes[number].reply_to))
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
        box = opened(inbox)
        parts = endless()
        sending = asyncio.create_task(replica.deliver(parts, box.reply_to))
        assert await asyncio.wait_for(box.take(), 20)
    with pytest.raises(WireLost, match="the ingress that asked is gone"):
        await asyncio.wait_for(sending, 20)
    with pytest.raises(WireLost, match="No such file"):
        await replica.deliver(given_parts([b"x"]), box.reply_to)
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
    assert inbox.box() is None  # nobody can connect yet
    async with inbox.opened(NODE):
        reply = opened(inbox).reply_to
        assert Wires(NODE).reached(reply) == reply
        assert Wires("another node").reached(reply) is None
        assert Wires(NODE).reached(None) is None
        assert mode_of_folder(reply) == 0o700
    assert mode_of_folder(reply) is None
    assert inbox.box() is None


async def test_what_comes_for_a_closed_box_is_dropped() -> None:
    inbox, replica = Inbox(), Wires(NODE)
    async with inbox.opened(NODE):
        gone, box = opened(inbox), opened(inbox)
        inbox.close(gone)
        await replica.deliver(given_parts([b"late"]), gone.reply_to)
        await replica.deliver(given_parts([b"in time"]), box.reply_to)
        assert await all_of(box) == b"in time"
        replica.close()
