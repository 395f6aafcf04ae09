"""MLflow: rows as metrics, the config as parameters, figures and summary as artifacts of one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainer.config.yaml_dump import to_yaml
from trainer.reporting.trackers.base import (
    Ending,
    Row,
    Session,
    Tracker,
    flat_config,
    numbers_in,
)

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Of one request and of a parameter's value; MLflow refuses more.
PARAMETERS_AT_ONCE = 100
LONGEST_PARAMETER = 6000  # letters; MLflow refuses longer ones


class MlflowTracker(Tracker):
    """A run of `experiment`, at `tracking_uri` or where MLFLOW_TRACKING_URI says; a resumed run continues it.

    Its name is `run_name`, or else the run's. The digest, a text, is left out.
    """

    module: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "mlflow-skinny"

    def __init__(
        self,
        experiment: str = "lockstep",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        if tracking_uri is not None and not tracking_uri.strip():
            raise ValueError(
                "tracking_uri is empty; leave it out for that of MLFLOW_TRACKING_URI"
            )
        self._experiment = experiment
        self._uri = tracking_uri
        self._run_name = run_name
        self._tags = tags or {}

    def begin(self, session: Session) -> None:
        # The client, not MLflow's active run: that belongs to a thread, and a program may have one of its own.
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client: Any = MlflowClient(tracking_uri=self._uri)
        self._client = client
        known: Mapping[str, str] = {}
        if session.id is None:
            self.id = self._make_run(session)
        else:
            self.id = session.id
            client.update_run(self.id, status="RUNNING")
            known = client.get_run(self.id).data.params
        parameters = []
        for name, value in flat_config(session.config).items():
            # MLflow refuses another value for a parameter that a resume has changed; the artifact has it.
            if name not in known:
                parameters.append(Param(name, str(value)[:LONGEST_PARAMETER]))
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            client.log_batch(
                self.id, params=parameters[start : start + PARAMETERS_AT_ONCE]
            )
        text = to_yaml(session.config, sort_keys=False, allow_unicode=True)
        client.log_text(self.id, text, "config.yaml")

    def _make_run(self, session: Session) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        experiment_id = (
            self._client.create_experiment(self._experiment)
            if experiment is None
            else experiment.experiment_id
        )
        run = self._client.create_run(
            experiment_id, run_name=self._run_name or session.name, tags=self._tags
        )
        run_id: str = run.info.run_id
        return run_id

    def describe(self) -> str:
        return f"experiment {self._experiment}, run {self.id}"

    def log(self, row: Row) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = []
        for name, value in numbers_in(row).items():
            metrics.append(Metric(name, float(value), now, int(row["step"])))
        self._client.log_batch(self.id, metrics=metrics)

    def figures(self, step: int, figures: Mapping[str, Path]) -> None:
        for path in figures.values():
            self._client.log_artifact(self.id, str(path), "figures")

    def finish(self, ending: Ending) -> None:
        if ending.summary:
            self._client.log_dict(self.id, dict(ending.summary), "summary.json")
        if ending.reason:
            self._client.set_tag(self.id, "failure", ending.reason)
        self._client.set_terminated(self.id, STATUS[ending.status])
