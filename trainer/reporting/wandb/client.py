"""The W&B client: started and ended in bounded time, silent, and without secrets in the command line it uploads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, Literal

from trainer.config.run_sections import WandbConfig
from trainer.config.secrets import redacted_arguments
from trainer.errors import ConfigError, LockstepError
from trainer.process.signals import stop_run
from trainer.reporting.formats import shorten_error

ENVIRONMENT_MODES = {  # values of WANDB_MODE → values of wandb.mode
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
# Seconds for one request: after a hang, the client notices soon that the server is back.
REQUEST_TIMEOUT = 10
KILL_DELAY = 2  # seconds beyond the client's own limit before its process is killed
# In the client's warning that it uploads nothing more.
UPLOAD_STOPPED = "will not be synced"


class ClientMessages:
    """Receives what the client would print, and drops it; `upload_stopped` says that rows stayed on the disk."""

    def __init__(self) -> None:
        self.upload_stopped = False

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        if UPLOAD_STOPPED in message:
            self.upload_stopped = True

    error = warning


@dataclass(frozen=True)
class Client:
    """A started run of the client; `state` is `online`, or `offline` and why; `error` says why no server answered."""

    run: Any
    state: str
    error: Exception | None = None


def effective_mode(section: WandbConfig) -> str:
    """`wandb.mode`; if that is `auto`, the mode WANDB_MODE names, or `auto` still where it is not set.

    Raises `ConfigError` for a WANDB_MODE that names no mode.
    """
    environment_mode = os.environ.get("WANDB_MODE", "")
    if section.mode != "auto" or not environment_mode:
        return section.mode
    if environment_mode not in ENVIRONMENT_MODES:
        raise ConfigError(
            "WANDB_MODE",
            f'"{environment_mode}" is not one of online, offline, disabled',
        )
    return ENVIRONMENT_MODES[environment_mode]


def start_client(
    section: WandbConfig,
    arguments: Mapping[str, Any],
    messages: ClientMessages,
    **settings: Any,
) -> Client:
    """Start the client, offline if nobody is logged in or the server does not answer in time.

    `arguments` are those of `wandb.init`, `settings` those of `wandb.Settings`. Raises `ConfigError` for mode `online`
    without a login, `LockstepError` for a server out of reach where `wandb.strict` is set.
    """
    _drop_empty_variables()
    import wandb  # heavy, and not needed where it is disabled

    def start(mode: Literal["online", "offline"]) -> Any:
        # Otherwise the client announces the login.
        wandb.setup(wandb.Settings(silent=True, mode="online"))
        wandb.termsetup(wandb.Settings(silent=True), messages)
        with _redacted_command_line():
            return wandb.init(
                mode=mode, settings=_client_settings(section, settings), **arguments
            )

    mode = effective_mode(section)
    if mode == "offline":
        return Client(
            start("offline"),
            "offline (WANDB_MODE)" if section.mode == "auto" else "offline",
        )
    wandb.setup(wandb.Settings(silent=True, mode="online"))
    if not wandb.login(prompt=False, verify=False):
        if mode == "online":
            raise ConfigError(
                "wandb.mode",
                "online needs a W&B login; run `wandb login`, or set wandb.mode=offline",
            )
        return Client(start("offline"), "offline (nobody is logged in)")
    try:
        return Client(start("online"), "online")
    except Exception as error:
        wandb.teardown()  # otherwise the failed attempt still holds the run's id
        if section.strict:
            raise LockstepError(
                f"W&B is out of reach ({shorten_error(error)})"
            ) from None
        return Client(start("offline"), "offline", error)


def _drop_empty_variables() -> None:
    """Remove empty WANDB_ variables, which the client does not treat as unset."""
    for name, value in list(os.environ.items()):
        if name.startswith("WANDB_") and not value:
            del os.environ[name]


def _client_settings(section: WandbConfig, more: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=section.init_timeout,
        finish_timeout=section.finish_timeout,
        finish_timeout_raises=True,
        # Its own way is a SIGINT. An agent has sent a SIGTERM for the same stop by then, or will: the run would take
        # the two for one that is to end at once, without a checkpoint.
        stop_fn=stop_run,
        x_file_stream_timeout_seconds=REQUEST_TIMEOUT,
        x_graphql_timeout_seconds=REQUEST_TIMEOUT,
        **more,
    )


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Hide secrets in `sys.argv`, which the client uploads when a run starts."""
    original = sys.argv
    sys.argv = [original[0], *redacted_arguments(original[1:])]
    try:
        yield
    finally:
        sys.argv = original


def run_with_timeout(seconds: float, action: Callable[[], None]) -> None:
    """Run `action`; if it takes longer than `seconds`, kill the client's process and raise `TimeoutError`.

    The client's own timeout is not enough: with much to send it is not honoured.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds + KILL_DELAY)
    if thread.is_alive():
        _kill_client()
        raise TimeoutError(f"not all was sent within {seconds:g} s")
    if errors:
        raise errors[0]


def _kill_client() -> None:
    """Kill the client's process, so that nothing waits for it any longer, not even the interpreter's exit."""
    from wandb.sdk import wandb_setup

    # Private names: there is no public way to the process.
    with suppress(AttributeError):
        wandb_setup.singleton().ensure_service()._proc._process.kill()  # type: ignore[union-attr]
