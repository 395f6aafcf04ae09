"""The sweeps of a stand-in for W&B's server, and its answers to `wandb sweep` and `wandb agent`. Grids only."""

from __future__ import annotations

import itertools
import json
from typing import Any

import yaml

from benchmarks.wandb_backend import Backend, named, opaque


class SweepBackend(Backend):
    """`sweeps` as received; each trial's run is named after its sweep: the first one of `sweep0` is `sweep0r0`."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: list[str] = []  # the sweep of each

    def on_upsertsweep(self, v: dict[str, Any]) -> Any:
        name, config = f"sweep{len(self.sweeps)}", yaml.safe_load(v["config"])
        self.sweeps[name] = {
            "yaml": v["config"],
            "config": config,
            "points": grid(config),
            "runs": [],
        }
        node = {
            "id": opaque("Sweep", name),
            "name": name,
            "project": self.project(v.get("projectName")),
        }
        return {"upsertSweep": {"sweep": node, "configValidationWarnings": []}}

    def on_sweepwithruns(self, v: dict[str, Any]) -> Any:
        name = v.get("sweep") or v["name"]
        sweep = self.sweeps[name]
        node = {
            **{
                "id": opaque("Sweep", name),
                "name": name,
                "method": "grid",
                "state": "RUNNING",
                "description": None,
            },
            **{
                "config": sweep["yaml"],
                "createdAt": "",
                "updatedAt": "",
                "heartbeatAt": "",
                "bestLoss": None,
            },
            **{
                "earlyStopJobRunning": False,
                "controller": None,
                "scheduler": None,
                "runCount": len(sweep["runs"]),
            },
            **{
                "runCountExpected": len(sweep["points"]),
                "displayName": None,
                "priorRuns": {"edges": []},
            },
            "runs": {
                "edges": [],
                "pageInfo": {"hasNextPage": False, "endCursor": None},
            },
        }
        return {"project": self.project(v.get("project")) | {"sweep": node}}

    on_getsweep = on_getsweeplegacy = on_getsweepstate = on_sweepconfig = (
        on_sweepwithruns
    )

    def on_createagent(self, v: dict[str, Any]) -> Any:
        self.agents.append(v["sweep"])
        return {
            "createAgent": {"agent": {"id": opaque("Agent", str(len(self.agents) - 1))}}
        }

    def on_heartbeat(self, v: dict[str, Any]) -> Any:
        """An agent says which of its runs are alive; the answer is what to do next, one trial at a time."""
        name = self.agents[int(named(v["id"]))]
        sweep, alive = self.sweeps[name], json.loads(v["runState"])
        if alive:
            commands = [
                {"type": "stop", "run_id": run}
                for run in alive
                if self.run(run)["stop"]
            ]
        elif len(sweep["runs"]) == len(sweep["points"]):
            commands = [{"type": "exit"}]
        else:
            run, point = (
                f"{name}r{len(sweep['runs'])}",
                sweep["points"][len(sweep["runs"])],
            )
            sweep["runs"].append(run)
            commands = [
                {
                    "type": "run",
                    "id": run,
                    "run_id": run,
                    "args": point,
                    "program": sweep["config"]["program"],
                }
            ]
        return {
            "agentHeartbeat": {
                "agent": {"id": v["id"]},
                "commands": json.dumps(commands),
            }
        }


def grid(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every point, as an agent gets it; nested parameters are one mapping."""
    axes = []
    for name, spec in config["parameters"].items():
        if "parameters" in spec:
            values = [
                {inner: item["value"] for inner, item in point.items()}
                for point in grid(spec)
            ]
        else:
            values = spec.get("values", [spec.get("value")])
        axes.append([(name, value) for value in values])
    return [
        {name: {"value": value} for name, value in point}
        for point in itertools.product(*axes)
    ]
