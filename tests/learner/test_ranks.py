"""Where the ranks meet: at one address, and nobody else hears of it."""

import socket
import threading
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from learner.ranks import LOOPBACK, meeting_place
from tests.head import free_ports

SOON = timedelta(seconds=30)


def test_rank_0_listens_at_its_address_alone() -> None:
    (port,) = free_ports(1)
    found: list[dist.Store] = []
    other = threading.Thread(
        target=lambda: found.append(meeting_place(1, 2, address=LOOPBACK, port=port, timeout=SOON))
    )
    other.start()
    store = meeting_place(0, 2, address=LOOPBACK, port=port, timeout=SOON)
    other.join(30)
    listening = [
        each.laddr.ip
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    ]
    assert listening == [LOOPBACK]
    found[0].set("word", "passed")
    assert store.get("word") == b"passed"


def test_a_rank_that_does_not_come_is_waited_for_until_the_deadline() -> None:
    (port,) = free_ports(1)
    with pytest.raises(RuntimeError):
        meeting_place(0, 2, address=LOOPBACK, port=port, timeout=timedelta(seconds=1))


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken, pytest.raises(OSError, match="in use"):
        meeting_place(0, 1, address=LOOPBACK, port=taken.getsockname()[1], timeout=SOON)
