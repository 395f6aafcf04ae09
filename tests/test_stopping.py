"""The signals of one stop: several SIGTERMs are one request, a second Ctrl-C means now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from trainer.process.command import STOP_SIGNALS
from trainer.process.ranks import Ranks
from trainer.process.signals import StopRequest


class AtOnceError(Exception):
    """Raised where a signal acts as it would without a `StopRequest`."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    def act(number: int, _: FrameType | None) -> None:
        raise AtOnceError(number)

    before = {number: signal.signal(number, act) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_a_launcher_and_an_agent_that_both_ask_for_the_stop_do_not_cut_it_short(
    first: int,
) -> None:
    with StopRequest(Ranks("fp32")) as stop:
        assert not stop.agreed()
        for number in (first, signal.SIGTERM, signal.SIGTERM):
            send(number)
        assert stop.agreed()
        assert stop.signal_number == first
        with pytest.raises(AtOnceError, match=str(int(signal.SIGINT))):
            send(signal.SIGINT)
    with pytest.raises(AtOnceError):
        send(signal.SIGTERM)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(Ranks("fp32")) as stop:
        send(signal.SIGHUP)
        assert not stop.agreed()
        send(signal.SIGUSR1)
        assert stop.agreed()
        assert stop.signal_number == signal.SIGUSR1


def test_a_stop_asked_for_while_the_run_ends_does_not_end_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopRequest(Ranks("fp32"))
    has_looked, has_left = threading.Event(), threading.Event()
    look = signal.getsignal

    def look_slowly(number: int) -> Any:
        handler = look(number)
        if threading.current_thread() is not threading.main_thread():
            has_looked.set()
            has_left.wait(0.3)
        return handler

    with stop:
        monkeypatch.setattr(signal, "getsignal", look_slowly)
        asking = threading.Thread(target=stop.stop)
        asking.start()
        has_looked.wait()
    has_left.set()
    asking.join()
    assert stop.signal_number == signal.SIGTERM
