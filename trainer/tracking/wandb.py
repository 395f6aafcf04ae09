"""W&B, from the main process alone. It may be absent, slow or away; training goes on whatever it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import WandbConfig
from trainer.errors import ConfigError

PATIENCE = 10  # seconds that W&B's server may take to let a run start, and to take its last rows
ENVIRONMENT_MODES = {  # what WANDB_MODE may say → wandb.mode
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}

Note = Callable[[str], None]


def start_wandb(
    section: WandbConfig,
    *,
    run_name: str,
    directory: Path,
    config: Mapping[str, Any],
    run_id: str | None,
    note: Note,
) -> WandbRun | None:
    """The W&B run, or None where it is disabled or cannot start; disabled, wandb is not even imported."""
    if _wanted_mode(section) == "disabled":
        return None
    try:
        return WandbRun(section, run_name=run_name, directory=directory, config=config, run_id=run_id, note=note)
    except ConfigError:
        raise
    except Exception as error:
        note(f"W&B did not start ({_first_line(error)}); the run goes on without it")
        return None


class WandbRun:
    """A W&B run whose files lie in `directory/wandb`. `run_id` goes on with an earlier run.

    The first thing that goes wrong in it is told through `note`, and W&B is left alone from then on.
    """

    def __init__(
        self,
        section: WandbConfig,
        *,
        run_name: str,
        directory: Path,
        config: Mapping[str, Any],
        run_id: str | None,
        note: Note,
    ) -> None:
        self._note = note
        self._files = directory / "wandb"
        directory.mkdir(parents=True, exist_ok=True)  # wandb would go elsewhere without a word
        in_sweep = "WANDB_SWEEP_ID" in os.environ  # then the agent has set project, entity and id
        arguments = {
            "name": run_name,
            "dir": str(directory),
            "config": dict(config),
            "group": section.group,
            "tags": section.tags,
        }
        if not in_sweep:
            arguments |= {"project": section.project, "entity": section.entity, "id": run_id, "resume": "allow"}
        self._run, self._mode = _start(section, arguments)
        self.id: str = self._run.id
        self._active = True
        # An explicit step that is not past the last one is dropped, so the step is a value like any other.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def describe(self) -> str:
        """`online, <the run's page>`, or `offline (why), files in <directory>`."""
        if self._mode == "online":
            return f"online, {self._run.url}"
        return f"{self._mode}, files in {self._files}"

    def log(self, row: Mapping[str, float]) -> None:
        self._guarded(lambda: self._run.log(dict(row)))

    def log_images(self, images: Mapping[str, Path]) -> None:
        """Send image files, each under its name."""
        self._guarded(lambda: self._run.log(_images(images)))

    def finish(self, *, failure: str | None = None) -> None:
        """Wait for what is not sent yet, `PATIENCE` seconds at most; the rest stays in the files.

        `failure` is why the run failed, if it did; it becomes a value of the run's summary.
        """
        if failure is not None:
            self._guarded(lambda: self._run.summary.update({"failure": failure}))
        self._guarded(lambda: self._run.finish(exit_code=int(failure is not None)))
        self._active = False

    def _guarded(self, action: Callable[[], Any]) -> None:
        if not self._active:
            return
        try:
            action()
        except Exception as error:
            self._active = False
            self._note(
                f"W&B failed ({_first_line(error)}) and gets nothing more of this run; "
                f"`wandb sync` sends what is in {self._files}"
            )


def _start(section: WandbConfig, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """The run and its mode in words. Offline where nobody is logged in or the server does not answer."""
    import wandb  # heavy, and not wanted where it is disabled

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=PATIENCE, finish_timeout=PATIENCE, finish_timeout_raises=True
    )
    mode = _wanted_mode(section)
    why = " (WANDB_MODE)" if section.mode == "auto" and mode == "offline" else ""
    if mode != "offline":
        wandb.setup(wandb.Settings(silent=True, mode="online"))  # else the login is announced
        if not wandb.login(prompt=False, verify=False):
            if mode == "online":
                raise ConfigError(
                    "wandb.mode", "online needs a W&B login; run `wandb login`, or set wandb.mode=offline"
                )
            why = " (nobody is logged in)"
        else:
            try:
                return wandb.init(mode="online", settings=settings, **arguments), "online"
            except Exception as error:
                why = f" (going online failed: {_first_line(error)})"
                wandb.teardown()  # else the failed try still holds the run's id
    return wandb.init(mode="offline", settings=settings, **arguments), f"offline{why}"


def _wanted_mode(section: WandbConfig) -> str:
    """`wandb.mode`, or what WANDB_MODE says where that is `auto`; still `auto` where that says nothing."""
    said = os.environ.get("WANDB_MODE", "")
    if section.mode != "auto" or not said:
        return section.mode
    if said not in ENVIRONMENT_MODES:
        raise ConfigError("WANDB_MODE", f'"{said}" is not one of online, offline, disabled')
    return ENVIRONMENT_MODES[said]


def _images(images: Mapping[str, Path]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Image(str(path)) for name, path in images.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
