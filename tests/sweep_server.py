"""As much of W&B's server as the real client and `wandb agent` need for a grid sweep, on the loopback.

Modelled on what the client asks for. `runs` and `sweeps` hold what was received; `unknown` what could not be answered.
"""

# ruff: noqa: N802, N815 - the names are W&B's
from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

ENTITY = "tester"


def _opaque(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def _name(opaque: str) -> str:
    return base64.b64decode(opaque).decode().split(":", 1)[1]


class Server:
    """Use as a context; `environment(directory)` points the client here and its files there."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: list[str] = []
        self.unknown: list[str] = []
        handler = type("Bound", (Handler,), {"server_state": self})
        self._http = Listener(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, directory: Path) -> dict[str, str]:
        out = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_ERROR_REPORTING": "false"}
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            out[f"WANDB_{name}"] = str(directory / name.lower())
            Path(out[f"WANDB_{name}"]).mkdir(parents=True, exist_ok=True)
        return {**out, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HOME": str(directory)}

    def stop_run(self, run: str) -> None:
        """What the Stop button and early termination do."""
        with self.lock:
            self._run(run)["stop"] = True

    # ------------------------------------------------------------ runs

    def _run(self, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"config": {}, "summary": {}, "history": {}, "writers": set(), "rewritten": 0}
        return self.runs.setdefault(name, {**empty, "state": "running", "exit": None, "stop": False, "project": None})

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self._run(name)
        project = run["project"] or "uncategorized"
        return {
            **{"id": _opaque("Run", name), "name": name, "displayName": name, "description": None, "notes": None},
            **{"tags": [], "config": "{}", "summaryMetrics": "{}", "state": run["state"], "exitcode": run["exit"]},
            **{"sweepName": None, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00"},
            **{"historyLineCount": 0, "eventsLineCount": 0, "logLineCount": 0, "historyTail": "[]", "eventsTail": "[]"},
            **{"wandbConfig": "{}", "shouldStop": run["stop"], "stopped": run["stop"]},
            "project": {**_project(project)},
        }

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Lines of a run's files, by number: a retried request changes nothing, a second writer does."""
        run = self._run(name)
        for file, chunk in (body.get("files") or {}).items():
            if file == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
            if file == "wandb-history.jsonl":
                for place, line in enumerate(chunk["content"], start=chunk["offset"]):
                    run["rewritten"] += run["history"].get(place, line) != line
                    run["history"][place] = line
        if body.get("complete"):
            run["exit"] = body.get("exitcode")
            run["state"] = "finished" if run["exit"] == 0 else "failed"
        return {"exitcode": None, "limits": {}, "stopped": run["stop"]}

    # ------------------------------------------------------------ GraphQL, a method for each operation

    def answer(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            method = getattr(self, f"op_{operation}", None)
            if method is None:
                self.unknown.append(operation)
                raise ValueError(f"unknown operation {operation}")
            return dict(method(v))

    def op_ServerFeaturesQuery(self, v: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def op_Viewer(self, v: Any) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY, "id": _opaque("Entity", ENTITY)}}]}
        me = {"id": _opaque("User", ENTITY), "entity": ENTITY, "username": ENTITY, "name": ENTITY, "flags": "{}"}
        more = {"email": "a@b", "teams": teams, "admin": False, "apiKeys": {"edges": []}, "deletedAt": None}
        return {"viewer": {**me, **more}}

    def op_OrganizationCoreWeaveOrganizationID(self, v: Any) -> Any:
        return {"entity": {"organization": None}}

    op_GetViewer = op_GetDefaultEntity = op_Viewer

    def op_UpsertBucket(self, v: Any) -> Any:
        name = v.get("name") or _name(v["id"])
        inserted = name not in self.runs
        run = self._run(name)
        run["project"] = v.get("project") or run["project"]
        if v.get("config"):
            run["config"] = {key: item.get("value") for key, item in json.loads(v["config"]).items()}
            run["writers"] |= set((run["config"].get("_wandb") or {}).get("e") or {})
        if v.get("summaryMetrics"):
            run["summary"] |= json.loads(v["summaryMetrics"])
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}

    def op_RunResumeStatus(self, v: Any) -> Any:
        bucket = self._bucket(v["name"]) if v["name"] in self.runs else None
        return {"model": {**_project(v.get("project")), "bucket": bucket}}

    def op_CreateRunFiles(self, v: Any) -> Any:
        files = [{"name": file, "uploadUrl": f"{self.url}/storage/{file}"} for file in v["files"]]
        return {"createRunFiles": {"runID": _opaque("Run", v["run"]), "uploadHeaders": [], "files": files}}

    def op_UpsertSweep(self, v: Any) -> Any:
        name = f"sweep{len(self.sweeps)}"
        config = yaml.safe_load(v["config"])
        self.sweeps[name] = {"yaml": v["config"], "config": config, "points": _grid(config), "runs": []}
        node = {"id": _opaque("Sweep", name), "name": name, "project": _project(v.get("projectName"))}
        return {"upsertSweep": {"sweep": node, "configValidationWarnings": []}}

    def op_SweepWithRuns(self, v: Any) -> Any:
        name = v.get("sweep") or v.get("name")
        sweep = self.sweeps[name]
        node = {
            **{"id": _opaque("Sweep", name), "name": name, "method": "grid", "state": "RUNNING", "description": None},
            **{"config": sweep["yaml"], "createdAt": "", "updatedAt": "", "heartbeatAt": "", "bestLoss": None},
            **{"earlyStopJobRunning": False, "controller": None, "scheduler": None, "runCount": len(sweep["runs"])},
            **{"runCountExpected": len(sweep["points"]), "displayName": None, "priorRuns": {"edges": []}},
            "runs": {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}},
        }
        return {"project": {**_project(v.get("project")), "sweep": node}}

    op_GetSweep = op_GetSweepLegacy = op_GetSweepState = op_SweepConfig = op_SweepWithRuns

    def op_CreateAgent(self, v: Any) -> Any:
        self.agents.append(v["sweep"])
        return {"createAgent": {"agent": {"id": _opaque("Agent", str(len(self.agents) - 1))}}}

    def op_Heartbeat(self, v: Any) -> Any:
        name = self.agents[int(_name(v["id"]))]
        sweep, alive = self.sweeps[name], json.loads(v["runState"])
        if alive:
            commands = [{"type": "stop", "run_id": run} for run in alive if self.runs.get(run, {}).get("stop")]
        elif len(sweep["runs"]) == len(sweep["points"]):
            commands = [{"type": "exit"}]
        else:
            run = f"{name}r{len(sweep['runs'])}"
            point = sweep["points"][len(sweep["runs"])]
            sweep["runs"].append(run)
            commands = [{"type": "run", "id": run, "run_id": run, "args": point, "program": sweep["config"]["program"]}]
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(commands)}}


def _project(name: str | None) -> dict[str, Any]:
    name = name or "uncategorized"
    entity = {"id": _opaque("Entity", ENTITY), "name": ENTITY}
    return {"id": _opaque("Project", name), "internalId": "1", "name": name, "entity": entity}


def _grid(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every point, as the agent gets it; a parameter of nested ones is a mapping."""
    axes = []
    for name, spec in config["parameters"].items():
        if "parameters" in spec:
            inner = [{k: v["value"] for k, v in point.items()} for point in _grid(spec)]
            axes.append([(name, value) for value in inner])
        else:
            axes.append([(name, value) for value in spec.get("values", [spec.get("value")])])
    return [{name: {"value": value} for name, value in point} for point in itertools.product(*axes)]


class Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was ended in the middle of a sentence is no failure."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        data = b""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _handle(self) -> None:
        state, body, status = self.server_state, self._body(), 200
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            found = re.search(r"\b(?:query|mutation)\s+(\w+)", asked["query"])
            operation = asked.get("operationName") or (found.group(1) if found else "")
            try:
                answer = {"data": state.answer(operation, asked.get("variables") or {})}
            except Exception as error:
                status, answer = 400, {"errors": [{"message": repr(error)}]}
        elif self.path.endswith("/file_stream"):
            with state.lock:
                answer = state.stream(self.path.split("/")[-2], json.loads(body or b"{}"))
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _handle
