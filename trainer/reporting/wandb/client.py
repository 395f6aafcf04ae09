"""The W&B client: how it is started, in bounded time, and what it says; nothing of a run's contents."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from textwrap import shorten
from threading import Thread
from typing import Any, Literal

from trainer.config.schema import WandbConfig
from trainer.errors import ConfigError, LockstepError
from trainer.config.secrets import redacted_arguments

ENVIRONMENT_MODES = {  # what WANDB_MODE may say → wandb.mode
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
REQUEST_SECONDS = 10  # for one request, so that a server that hangs and comes back is met again soon
GRACE = 2  # seconds beyond the client's own limit before it is ended from outside
UNSENT = "will not be synced"  # in the client's warning that it uploads nothing more


class Messages:
    """What the client would print, kept: `unsent` is its warning that rows stay on the disk."""

    def __init__(self) -> None:
        self.unsent = False

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.unsent |= UNSENT in message

    error = warning


def wanted_mode(section: WandbConfig) -> str:
    """`wandb.mode`, or what WANDB_MODE says where that is `auto`; still `auto` where that says nothing."""
    said = os.environ.get("WANDB_MODE", "")
    if section.mode != "auto" or not said:
        return section.mode
    if said not in ENVIRONMENT_MODES:
        raise ConfigError("WANDB_MODE", f'"{said}" is not one of online, offline, disabled')
    return ENVIRONMENT_MODES[said]


def start_client(
    section: WandbConfig, arguments: Mapping[str, Any], messages: Messages, **settings: Any
) -> tuple[Any, str, Exception | None]:
    """A run of the client; `online`, or `offline` and why; and the error, if the server could not be reached."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # set to nothing is as good as not set, but not to the client
    import wandb  # heavy, and not wanted where it is disabled

    def start(mode: Literal["online", "offline"]) -> Any:
        wandb.setup(wandb.Settings(silent=True, mode="online"))  # else the login is announced
        wandb.termsetup(wandb.Settings(silent=True), messages)
        with _redacted_command_line():
            return wandb.init(mode=mode, settings=_settings(section, settings), **arguments)

    mode = wanted_mode(section)
    if mode == "offline":
        return start("offline"), "offline (WANDB_MODE)" if section.mode == "auto" else "offline", None
    wandb.setup(wandb.Settings(silent=True, mode="online"))
    if not wandb.login(prompt=False, verify=False):
        if mode == "online":
            raise ConfigError("wandb.mode", "online needs a W&B login; run `wandb login`, or set wandb.mode=offline")
        return start("offline"), "offline (nobody is logged in)", None
    try:
        return start("online"), "online", None
    except Exception as error:
        wandb.teardown()  # else the failed try still holds the run's id
        if section.strict:
            raise LockstepError(f"W&B is out of reach ({in_short(error)})") from None
        return start("offline"), "offline", error


def _settings(section: WandbConfig, more: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=section.init_timeout,
        finish_timeout=section.finish_timeout,
        finish_timeout_raises=True,
        x_file_stream_timeout_seconds=REQUEST_SECONDS,
        x_graphql_timeout_seconds=REQUEST_SECONDS,
        **more,
    )


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """The client uploads the command line it finds when a run starts."""
    given = sys.argv
    sys.argv = [given[0], *redacted_arguments(given[1:])]
    try:
        yield
    finally:
        sys.argv = given


def within(seconds: float, action: Callable[[], None]) -> None:
    """Run `action`, but end the client from outside and raise `TimeoutError` if it takes longer than it may."""
    failure: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:
            failure.append(error)

    thread = Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds + GRACE)
    if thread.is_alive():
        _end_client()
        raise TimeoutError(f"not all was sent within {seconds:g} s")
    if failure:
        raise failure[0]


def _end_client() -> None:
    """Kill the client's process: whatever waits for it, the interpreter's exit too, waits no longer."""
    from wandb.sdk import wandb_setup

    with suppress(AttributeError):  # no public way leads there
        wandb_setup.singleton().ensure_service()._proc._process.kill()  # type: ignore[union-attr]


def in_short(error: Exception) -> str:
    """What an error says, shortened: the first line of some is a heading."""
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__
