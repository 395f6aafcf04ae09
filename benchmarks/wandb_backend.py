"""What a stand-in for W&B's server holds of runs and artifacts, and how it answers the real client's operations."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

ENTITY = "somebody"


def opaque(kind: str, name: str) -> str:
    """An id as such servers make them."""
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def named(gid: str) -> str:
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
            blank = {"name": name, "config": {}, "summary": {}, "lines": {}, "files": {}, "alerts": []}
            self.runs[name] = blank | {"state": "running", "exit": None, "rewritten": 0, "project": "p", "fields": {}}
            self.runs[name] |= {"stop": False, "writers": set()}  # asked to stop; the client's processes
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
            run["config"] = {key: item["value"] for key, item in json.loads(v["config"]).items()}
            run["writers"] |= set((run["config"].get("_wandb") or {}).get("e") or {})
        if v.get("summaryMetrics"):
            run["summary"] |= json.loads(v["summaryMetrics"])
        # With the true count of lines here the client would append to them by itself.
        return {"upsertBucket": {"bucket": self.bucket(run) | {"historyLineCount": 0}, "inserted": inserted}}

    def on_runresumestatus(self, v: dict[str, Any]) -> Any:
        run = self.runs.get(v["name"])
        return {"model": self.project(v.get("project")) | {"bucket": run and self.bucket(run)}}

    def bucket(self, run: dict[str, Any]) -> dict[str, Any]:
        history, events = (run["lines"].get(f"wandb-{kind}.jsonl", {}) for kind in ("history", "events"))
        return {
            "id": opaque("Run", run["name"]),
            "name": run["name"],
            "displayName": run["fields"].get("displayName") or run["name"],
            "config": json.dumps({key: {"value": value} for key, value in run["config"].items()}),
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
        return {"id": opaque("Project", name or "p"), "internalId": "1", "name": name or "p", "entity": entity}

    def stream(self, name: str, body: dict[str, Any]) -> Any:
        """Rows of a run: by line number, so that a repeated request changes nothing."""
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
        viewer = {"id": opaque("User", ENTITY), "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}"}
        teams = {"edges": [{"node": {"name": ENTITY, "id": opaque("Entity", ENTITY)}}]}
        rest = {"name": ENTITY, "admin": False, "apiKeys": {"edges": []}, "deletedAt": None}
        return {"viewer": viewer | rest | {"teams": teams}}

    on_getviewer = on_getdefaultentity = on_viewer

    # ---------------------------------------------------------------- files and artifacts

    def on_createrunfiles(self, v: dict[str, Any]) -> Any:
        files = [{"name": file, "uploadUrl": self.upload_url("run", v["run"], file)} for file in v["files"]]
        return {"createRunFiles": {"runID": opaque("Run", v["run"]), "uploadHeaders": [], "files": files}}

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
        name, aliases = v["artifactCollectionName"], [item["alias"] for item in v.get("aliases") or []]
        same = [a for a in self.artifacts if a["name"] == name and a["digest"] == v["digest"] and a["committed"]]
        if same:
            artifact = same[0]
            self.give(artifact, aliases)
        else:
            artifact = {"id": len(self.artifacts), "name": name, "type": v["artifactTypeName"], "aliases": []}
            artifact |= {"wanted": aliases, "files": {}, "digest": v["digest"], "committed": False}
            artifact["metadata"] = json.loads(v.get("metadata") or "null")
            self.artifacts.append(artifact)
        sequence = {"id": opaque("ArtifactCollection", name), "latestArtifact": None}
        told = {"id": opaque("Artifact", str(artifact["id"])), "digest": v["digest"], "artifactSequence": sequence}
        return {"createArtifact": {"artifact": told | {"state": "COMMITTED" if artifact["committed"] else "PENDING"}}}

    def give(self, artifact: dict[str, Any], aliases: list[str]) -> None:
        """An alias belongs to one version of a name."""
        for other in self.artifacts:
            if other["name"] == artifact["name"]:
                other["aliases"] = [alias for alias in other["aliases"] if alias not in aliases]
        artifact["aliases"] += aliases

    def on_createartifactmanifest(self, v: dict[str, Any]) -> Any:
        url = self.upload_url("manifest", named(v["artifactID"]), v["name"])
        file = {"id": opaque("File", v["name"]), "uploadHeaders": [], "uploadUrl": url}
        manifest = {"id": opaque("Manifest", named(v["artifactID"])), "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def on_updateartifactmanifest(self, v: dict[str, Any]) -> Any:
        again = {"artifactID": v["artifactManifestID"], "name": "wandb_manifest.json"}
        return {"updateArtifactManifest": self.on_createartifactmanifest(again)["createArtifactManifest"]}

    def on_createartifactfiles(self, v: dict[str, Any]) -> Any:
        edges = []
        for spec in v.get("input", v)["artifactFiles"]:
            parts = "artifact", named(spec["artifactID"]), spec["name"]
            node = {"id": opaque("File", "/".join(parts)), "name": spec["name"], "displayName": spec["name"]}
            node |= {"storagePath": "/".join(parts), "uploadUrl": self.upload_url(*parts), "uploadHeaders": []}
            edges.append({"node": node | {"uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_commitartifact(self, v: dict[str, Any]) -> Any:
        artifact = self.artifacts[int(named(v["artifactID"]))]
        artifact["committed"] = True
        self.give(artifact, [*artifact["wanted"], "latest"])
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": artifact["digest"]}}}

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
