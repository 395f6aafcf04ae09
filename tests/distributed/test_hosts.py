"""Agreement on the host: who waits for whom and how long, over which interface, and what ends a wait."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from torch import distributed

from tests.distributed.ranks import on_ranks
from tests.distributed.small import Points, config, mlp
from tests.programs import run_program
from trainer import ConfigError, Trainer
from trainer.errors import DataError, LockstepError
from trainer.process import interface, store
from trainer.process.interface import choose_gloo_interface
from trainer.process.ranks import Ranks


def test_values_and_turns() -> None:
    def agree(directory: Path) -> tuple[Any, ...]:
        ranks = Ranks("fp32")
        gathered = ranks.gather([ranks.rank] * (ranks.rank + 1))
        votes = (
            *ranks.any_rank_each([ranks.rank == 2]),
            *ranks.any_rank_each([False]),
        )
        with ranks.main_first():
            start = time.monotonic()
            time.sleep(0.05)
            turn = start, time.monotonic()
        return gathered, votes, ranks.on_main(lambda: ranks.rank), turn

    results = on_ranks(3, agree, Path())
    for gathered, votes, main, _ in results:
        assert (gathered, votes, main) == ([0, 1, 1, 2, 2, 2], (True, False), 0)
    ends_of_main = results[0][3][1]
    assert all(turn[0] >= ends_of_main for *_, turn in results[1:])


def test_each_machine_has_a_first_rank_after_rank_0() -> None:
    def turn() -> tuple[float, float]:
        ranks = Ranks("fp32")
        ranks._host.machines = ["a", "a", "b", "b"]
        with ranks.main_first():
            start = time.monotonic()
            time.sleep(0.05)
            return start, time.monotonic()

    first, second, third, fourth = on_ranks(4, turn)
    assert third[0] >= first[1]
    assert second[0] >= third[1]
    assert fourth[0] >= third[1]


def test_nothing_the_host_agrees_on_uses_the_devices_group(tmp_path: Path) -> None:
    """On GPUs that group is NCCL's, which spins the GPU while it waits, for as long as its watchdog allows."""

    def agree() -> list[str]:
        used: list[str] = []
        ranks = Ranks("fp32")
        for name in (
            "all_reduce",
            "broadcast",
            "all_gather",
            "barrier",
            "all_gather_object",
            "broadcast_object_list",
        ):
            original = getattr(distributed, name)

            def recorded(
                *args: Any,
                name: str = name,
                original: Callable[..., Any] = original,
                **more: Any,
            ) -> Any:
                if more.get("group") in (None, distributed.group.WORLD):
                    used.append(name)
                return original(*args, **more)

            setattr(distributed, name, recorded)
        ranks.gather([1])
        assert ranks.any_rank_each([ranks.is_main, False]) == [True, False]
        ranks.on_main(lambda: 1)
        ranks.on_each(lambda: 1)
        ranks.barrier()
        with ranks.main_first():
            pass
        return used

    assert on_ranks(2, agree) == [[], []]


@pytest.mark.parametrize("kind", ["on_main", "main_first"])
def test_long_work_of_one_rank_outlasts_the_timeout(kind: str) -> None:
    def work() -> str:
        ranks = Ranks("fp32", timeout=1)
        if kind == "on_main":
            return str(ranks.on_main(lambda: time.sleep(3) or "done"))
        with ranks.main_first():
            if ranks.is_main:
                time.sleep(3)
        return "done"

    assert on_ranks(2, work) == ["done", "done"]


@pytest.mark.parametrize("kind", ["gather", "any_rank_each", "on_main", "main_first"])
def test_a_rank_that_does_not_come_is_named(kind: str) -> None:
    def wait() -> str:
        ranks = Ranks("fp32", timeout=1)
        ranks.barrier()
        if ranks.rank == 1:
            time.sleep(4)
            return ""

        def first() -> None:
            with ranks.main_first():
                pass

        calls: dict[str, Callable[[], Any]] = {
            "gather": lambda: ranks.gather([1]),
            "any_rank_each": lambda: ranks.any_rank_each([True]),
            "on_main": lambda: ranks.on_main(lambda: 1),
            "main_first": first,
        }
        with pytest.raises(LockstepError) as caught:
            for _ in range(3):  # a broadcast's sender may end before its receivers come
                calls[kind]()
        # The store ends with rank 0; that of a launcher outlives every rank.
        time.sleep(2)
        return str(caught.value)

    first, _, third = on_ranks(3, wait)
    assert first == third
    assert first.startswith(
        f"the ranks waited 1 s for rank 1 on {socket.gethostname()}, and no longer"
    )
    assert "raise run.timeout" in first


def test_a_rank_that_hangs_in_training_is_named(tmp_path: Path) -> None:
    class Slow(Points):
        def __getitem__(self, i: int) -> Any:
            if os.environ["RANK"] == "1" and i == 20:
                time.sleep(5)
            return super().__getitem__(i)

    def train(directory: Path) -> str:
        data = Slow(56, ignored=False)
        settings = config(directory, batch__micro_size=14, run__timeout=1)
        with pytest.raises(LockstepError) as caught:
            Trainer(
                settings,
                model=mlp(),
                train_data=data,
                val_data=Points(28, ignored=False),
            ).fit()
        return str(caught.value)

    started = time.monotonic()
    with pytest.raises(EOFError):  # its watchdog ends it
        on_ranks(2, partial(check_first, train), tmp_path)
    assert time.monotonic() - started < 30


def check_first(train: Callable[[Path], str], directory: Path) -> None:
    message = train(directory)
    assert os.environ["RANK"] == "0"
    assert "for rank 1 on " in message


def test_a_failure_in_an_earlier_turn_is_everyones() -> None:
    def fail() -> str:
        ranks = Ranks("fp32")
        with pytest.raises(DataError) as caught, ranks.main_first():
            if ranks.is_main:
                raise DataError("no server")
            raise AssertionError("a later turn must not run")
        return str(caught.value)

    assert on_ranks(3, fail) == ["no server"] * 3


def test_a_failure_on_some_ranks_names_them() -> None:
    def fail(failing: list[int], error: LockstepError) -> tuple[str, str]:
        ranks = Ranks("fp32")

        def work() -> None:
            if ranks.rank in failing:
                raise error

        with pytest.raises(type(error)) as caught:
            ranks.on_each(work)
        return type(caught.value).__name__, str(caught.value)

    host = socket.gethostname()
    place = f"(on rank 1 of 2, machine {host}; the other ranks do not fail)"
    assert (
        on_ranks(2, fail, [1], ConfigError("a.b", "is wrong"))
        == [("ConfigError", f"a.b: is wrong {place}")] * 2
    )
    assert on_ranks(2, fail, [0, 1], DataError("gone")) == [("DataError", "gone")] * 2


# ---------------------------------------------------------------- the interface


def address(family: int, text: str) -> Any:
    return SimpleNamespace(family=family, address=text)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a loopback interface and some others, on which the way to MASTER_ADDR has `own` address."""

    def pretend(own: str | None, local: str = "2", **addresses: str) -> None:
        entries = {
            "lo": [
                address(socket.AF_INET, "127.0.0.1"),
                address(socket.AF_INET6, "::1"),
            ]
        }
        for name, text in addresses.items():
            entries[name] = [
                address(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
            ]
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)
        monkeypatch.setattr(psutil, "net_if_stats", dict)
        monkeypatch.setattr(interface, "_own_address_towards", lambda host: own)
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("MASTER_ADDR", "node0")
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")

    return pretend


@pytest.mark.parametrize(
    ("own", "addresses", "local", "expected"),
    [
        ("10.0.0.5", {"eth0": "192.168.0.1", "ib0": "10.0.0.5"}, "2", "ib0"),
        ("fd00::5", {"eth0": "192.168.0.1", "ib0": "fd00::5%ib0"}, "2", "ib0"),
        ("127.0.0.1", {"eth0": "192.168.0.1"}, "4", "lo"),  # one machine
        # Rank 0's machine, by the name in its own hosts file.
        ("127.0.1.1", {"eth0": "192.168.0.1"}, "2", "eth0"),
        # No interface has this address: gloo is left to itself.
        ("127.0.1.1", {"eth0": "192.168.0.1"}, "4", ""),
        (None, {"eth0": "192.168.0.1"}, "2", ""),
    ],
)
def test_gloo_uses_the_interface_towards_the_master(
    network: Callable[..., None],
    own: str | None,
    addresses: dict[str, str],
    local: str,
    expected: str,
) -> None:
    network(own, local, **addresses)
    choose_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == expected


def test_an_interface_of_the_user_is_left(
    network: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    network("10.0.0.5", ib0="10.0.0.5")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    choose_gloo_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_an_interface_that_cannot_be_told_is_asked_for(
    network: Callable[..., None],
) -> None:
    network("127.0.1.1", eth0="192.168.0.1", ib0="10.0.0.5")
    with pytest.raises(
        ConfigError,
        match=r"set GLOO_SOCKET_IFNAME to .* one of eth0 \(192.168.0.1\), ib0 \(10.0.0.5",
    ):
        choose_gloo_interface()


def test_the_address_towards_a_host_is_read_off_the_routes() -> None:
    assert interface._own_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface._own_address_towards("no-such-host.invalid") is None


def test_a_store_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "SECONDS_TO_ANSWER", 0.1)
    monkeypatch.setattr(
        distributed.distributed_c10d, "_get_default_store", lambda: time.sleep(60)
    )
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        store.ask_store(lambda _: 1)
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- who reports


def test_a_machine_that_fails_before_the_ranks_join_says_so(tmp_path: Path) -> None:
    """Only its own ranks can: one of them does. The other machine may have nothing to report."""
    code = "import sys; from trainer.commands.train import main; sys.exit(main(sys.argv[1:]))"
    ranks = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for rank, local_rank, count in (("2", "0", 1), ("3", "1", 0)):
        environment = {**os.environ, **ranks, "RANK": rank, "LOCAL_RANK": local_rank}
        result = run_program(
            ["-c", code, str(tmp_path / "missing.yaml")], env=environment
        )
        assert result.returncode == 2
        assert result.stderr.count("missing.yaml") == count


def test_a_defect_is_shown_with_its_traceback_and_once(tmp_path: Path) -> None:
    """The ranks that only hear of it leave the report to the one it happened on."""
    code = (
        "import os, sys\n"
        "from trainer.process.exit import exit_process, report_error\n"
        "from trainer.process.ranks import Ranks\n"
        "def defect():\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('a defect')\n"
        "try:\n"
        "    Ranks('fp32').on_each(defect)\n"
        "except Exception as error:\n"
        "    exit_process(report_error(error))\n"
    )
    result = run_program(["-c", code], ranks=3)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert "KeyError: 'a defect'" in result.stderr
    assert "error: " not in result.stderr
