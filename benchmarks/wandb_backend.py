"""The stand-in W&B server's data: the runs and artifacts it received, and its answers to the client's operations."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

ENTITY = "somebody"


def opaque(kind: str, name: str) -> str:
    """An id in the form of GraphQL servers: `kind:name` in base64."""
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def named(gid: str) -> str:
    """The name within an id."""
    return base64.b64decode(gid).decode().partition(":")[2]


class Backend:
    """`runs` and `artifacts` as received; the answer to operation `UpsertBucket` is method `on_upsertbucket`."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.unknown: list[str] = []

    # ---------------------------------------------------------------- runs

    def run(self, name: str) -> dict[str, Any]:
        if name not in self.runs:
            self.runs[name] = {
                "name": name,
                "project": "p",
                "state": "running",
                "config": {},
                "summary": {},
                # What else the client said of the run: displayName, tags, …
                "fields": {},
                "lines": {},  # by file, then by line number
                "rewritten": 0,  # lines that were sent twice with different text
                "files": {},
                "alerts": [],
                "exit": None,
                "stop": False,  # set by a test: the run is asked to stop
                "writers": set(),  # the client's processes
            }
        return self.runs[name]

    def history(self, name: str) -> list[dict[str, Any]]:
        lines = self.runs[name]["lines"].get("wandb-history.jsonl", {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def on_upsertbucket(self, v: dict[str, Any]) -> Any:
        name = v.get("name") or named(v["id"])
        inserted = name not in self.runs
        run = self.run(name)
        run["fields"] |= {key: value for key, value in v.items() if value is not None}
        run["project"] = v.get("project") or run["project"]
        if v.get("host"):
            run["state"] = "running"
        if v.get("config"):
            run["config"] = {
                key: item["value"] for key, item in json.loads(v["config"]).items()
            }
            run["writers"] |= set((run["config"].get("_wandb") or {}).get("e") or {})
        if v.get("summaryMetrics"):
            run["summary"] |= json.loads(v["summaryMetrics"])
        # Given the true count of lines here, the client would append to them by itself.
        return {
            "upsertBucket": {
                "bucket": self.bucket(run) | {"historyLineCount": 0},
                "inserted": inserted,
            }
        }

    def on_runresumestatus(self, v: dict[str, Any]) -> Any:
        run = self.runs.get(v["name"])
        return {
            "model": self.project(v.get("project"))
            | {"bucket": run and self.bucket(run)}
        }

    def bucket(self, run: dict[str, Any]) -> dict[str, Any]:
        history = run["lines"].get("wandb-history.jsonl", {})
        events = run["lines"].get("wandb-events.jsonl", {})
        return {
            "id": opaque("Run", run["name"]),
            "name": run["name"],
            "displayName": run["fields"].get("displayName") or run["name"],
            "config": json.dumps(
                {key: {"value": value} for key, value in run["config"].items()}
            ),
            "summaryMetrics": json.dumps(run["summary"]),
            "sweepName": None,
            "project": self.project(run["project"]),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": 0,
            "historyTail": json.dumps([history[max(history)]] if history else []),
            "eventsTail": json.dumps([events[max(events)]] if events else []),
            "wandbConfig": json.dumps({"t": 1} | (run["config"].get("_wandb") or {})),
            "tags": run["fields"].get("tags") or [],
            "shouldStop": run["stop"],
            "stopped": run["stop"],
        }

    def project(self, name: str | None) -> dict[str, Any]:
        entity = {"id": opaque("Entity", ENTITY), "name": ENTITY}
        return {
            "id": opaque("Project", name or "p"),
            "internalId": "1",
            "name": name or "p",
            "entity": entity,
        }

    def stream(self, name: str, body: dict[str, Any]) -> Any:
        """Store rows of a run by line number, so that a repeated request changes nothing."""
        run = self.run(name)
        for file, chunk in (body.get("files") or {}).items():
            if file == "wandb-summary.json":
                run["summary"] = json.loads(chunk["content"][-1])
                continue
            lines = run["lines"].setdefault(file, {})
            for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                run["rewritten"] += lines.get(number, line) != line
                lines[number] = line
        if body.get("complete"):
            run["exit"] = body.get("exitcode")
            run["state"] = "failed" if run["exit"] else "finished"
        return {"exitcode": None, "limits": {}, "stopped": run["stop"]}

    def on_notifyscriptablerunalert(self, v: dict[str, Any]) -> Any:
        self.run(v["runName"])["alerts"].append((v["title"], v["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def on_serverfeaturesquery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def on_viewer(self, _: Any) -> Any:
        viewer = {
            "id": opaque("User", ENTITY),
            "entity": ENTITY,
            "username": ENTITY,
            "email": "",
            "flags": "{}",
        }
        teams = {"edges": [{"node": {"name": ENTITY, "id": opaque("Entity", ENTITY)}}]}
        rest = {
            "name": ENTITY,
            "admin": False,
            "apiKeys": {"edges": []},
            "deletedAt": None,
        }
        return {"viewer": viewer | rest | {"teams": teams}}

    on_getviewer = on_getdefaultentity = on_viewer

    # ---------------------------------------------------------------- files and artifacts

    def on_createrunfiles(self, v: dict[str, Any]) -> Any:
        files = [
            {"name": file, "uploadUrl": self.upload_url("run", v["run"], file)}
            for file in v["files"]
        ]
        return {
            "createRunFiles": {
                "runID": opaque("Run", v["run"]),
                "uploadHeaders": [],
                "files": files,
            }
        }

    def upload_url(self, *parts: str) -> str:
        return f"{self.url}/storage/{quote('/'.join(parts))}"

    def store(self, path: str, data: bytes) -> None:
        kind, owner, name = path.split("/", 2)
        if kind == "run":
            self.run(owner)["files"][name] = data
        elif kind == "artifact":
            self.artifacts[int(owner)]["files"][name] = data

    def on_createartifact(self, v: dict[str, Any]) -> Any:
        v = v.get("input", v)
        name = v["artifactCollectionName"]
        aliases = [item["alias"] for item in v.get("aliases") or []]
        artifact = self.committed_artifact(name, v["digest"])
        if artifact is not None:
            self.move_aliases(artifact, aliases)
        else:
            artifact = {
                "id": len(self.artifacts),
                "name": name,
                "type": v["artifactTypeName"],
                "digest": v["digest"],
                "metadata": json.loads(v.get("metadata") or "null"),
                "files": {},
                "committed": False,
                "aliases": [],
                "future aliases": aliases,  # from the commit on
            }
            self.artifacts.append(artifact)
        answer = {
            "id": opaque("Artifact", str(artifact["id"])),
            "digest": v["digest"],
            "state": "COMMITTED" if artifact["committed"] else "PENDING",
            "artifactSequence": {
                "id": opaque("ArtifactCollection", name),
                "latestArtifact": None,
            },
        }
        return {"createArtifact": {"artifact": answer}}

    def committed_artifact(self, name: str, digest: str) -> dict[str, Any] | None:
        for artifact in self.artifacts:
            if artifact["committed"] and (artifact["name"], artifact["digest"]) == (
                name,
                digest,
            ):
                return artifact
        return None

    def move_aliases(self, artifact: dict[str, Any], aliases: list[str]) -> None:
        """Give the aliases to this version: an alias belongs to one version of a name."""
        for other in self.artifacts:
            if other["name"] == artifact["name"]:
                other["aliases"] = [
                    alias for alias in other["aliases"] if alias not in aliases
                ]
        artifact["aliases"] += aliases

    def on_createartifactmanifest(self, v: dict[str, Any]) -> Any:
        url = self.upload_url("manifest", named(v["artifactID"]), v["name"])
        file = {"id": opaque("File", v["name"]), "uploadHeaders": [], "uploadUrl": url}
        manifest = {"id": opaque("Manifest", named(v["artifactID"])), "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def on_updateartifactmanifest(self, v: dict[str, Any]) -> Any:
        request = {"artifactID": v["artifactManifestID"], "name": "wandb_manifest.json"}
        return {
            "updateArtifactManifest": self.on_createartifactmanifest(request)[
                "createArtifactManifest"
            ]
        }

    def on_createartifactfiles(self, v: dict[str, Any]) -> Any:
        edges = []
        for spec in v.get("input", v)["artifactFiles"]:
            parts = "artifact", named(spec["artifactID"]), spec["name"]
            path = "/".join(parts)
            node = {
                "id": opaque("File", path),
                "name": spec["name"],
                "displayName": spec["name"],
                "artifact": {"id": spec["artifactID"]},
                "storagePath": path,
                "uploadUrl": self.upload_url(*parts),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_commitartifact(self, v: dict[str, Any]) -> Any:
        artifact = self.artifacts[int(named(v["artifactID"]))]
        artifact["committed"] = True
        self.move_aliases(artifact, [*artifact["future aliases"], "latest"])
        return {
            "commitArtifact": {
                "artifact": {"id": v["artifactID"], "digest": artifact["digest"]}
            }
        }

    def on_artifacttype(self, v: dict[str, Any]) -> Any:
        return {"project": self.project(v.get("project")) | {"artifact": None}}

    def on_fetchartifactdigestalgorithm(self, _: Any) -> Any:
        return {"project": {"artifactType": None}}

    def on_orgfeatureflags(self, _: Any) -> Any:
        return {"organization": {"featureFlags": []}}

    def on_fetchorgentityfromentity(self, _: Any) -> Any:
        return {"entity": {"organization": None}}

    on_organizationcoreweaveorganizationid = on_fetchorgentityfromentity

    def on_xxhashdigestsenabled(self, _: Any) -> Any:
        return {"entity": {"xxhashDigestsEnabled": False}}
