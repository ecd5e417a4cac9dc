"""Saved views of an experiment's page: which runs, columns and charts to show, in which order.

MLflow stores a view as a tag of the experiment.  They are written only when the experiment is
created, so that later changes by users are kept.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

TRAINING = "workflowType=machine_learning"
"""Selects the mode of MLflow's pages that shows runs; their default is the one for agents."""
NETWORKS = "networks"
"""The view that links open."""


def address(experiment: str) -> str:
    """The path of an experiment's page with the view of networks, on the server."""
    return f"/#/experiments/{experiment}/runs?{TRAINING}&viewStateShareKey={NETWORKS}"


def tags() -> dict[str, str]:
    """The views as tags of an experiment."""
    return {f"mlflow.sharedViewState.{key}": json.dumps(view) for key, view in _views()}


def _views() -> Iterator[tuple[str, dict[str, object]]]:
    # The runs of comparisons, which can be hundreds, have a view of their own.
    pipeline, comparison = "tags.`kd.pipeline` LIKE '%'", "tags.`kd.comparison` LIKE '%'"
    yield (
        NETWORKS,
        _view(
            "Networks: teacher, assistants, student, baselines",
            f"metrics.params_m > 0 and {pipeline}",
            metrics=("val_accuracy", "val_nll", "params_m", "size_mb"),
            params=("teachers", "model.kind", "model.depth", "method.kind"),
            **_charts(("size_mb", "val_accuracy"), ("multiply_adds_m", "val_accuracy")),
        ),
    )
    yield (
        "weights",
        _view(
            "Weight sets",
            f"tags.`kd.stage` = 'weights' and tags.`mlflow.parentRunId` LIKE '%' and {pipeline}",
            metrics=("held_out_nll", "held_out_accuracy", "val_nll", "gap"),
            params=("weighting.kind",),
            # By date, MLflow would hide the sets below the stage's own run.
            orderByKey="metrics.`held_out_nll`",
            orderByAsc=True,
        ),
    )
    yield (
        "exports",
        _view(
            "Exports",
            f"tags.`kd.stage` = 'exports' and {pipeline}",
            metrics=("val_accuracy", "parity_top1_agreement", "size_mb", "latency_ms"),
            params=("export.kind", "export.precision"),
            **_charts(("size_mb", "val_accuracy"), ("latency_ms", "val_accuracy")),
        ),
    )
    yield (
        "comparisons",
        _view(
            "Comparisons: means over seeds",
            f"tags.`kd.cell` LIKE '_%' and {comparison}",
            metrics=("val_accuracy", "val_nll", "val_worst_class_accuracy"),
            tags=(),
            groupBy={
                "aggregateFunction": "average",
                "groupByKeys": [
                    {"mode": "tag", "groupByData": each} for each in ("kd.cell", "kd.comparison")
                ],
            },
        ),
    )


def _view(
    name: str,
    runs: str,
    metrics: tuple[str, ...],
    params: tuple[str, ...] = (),
    tags: tuple[str, ...] = ("kd.pipeline_run",),
    **state: object,
) -> dict[str, object]:
    """A view.

    Args:
        name: Its name in the menu.
        runs: The filter that finds its runs.
        metrics: Columns.
        params: Columns.
        tags: Columns.
        state: What else differs from the page's defaults, under MLflow's keys.
    """
    columns = [
        *(f"tags.`{each}`" for each in tags),
        *(f"metrics.`{each}`" for each in metrics),
        *(f"params.`{each}`" for each in params),
    ]
    state = {
        "searchFilter": runs,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
        **state,
    }
    now = int(time.time() * 1000)
    return {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(state)}


def _charts(*scatters: tuple[str, str]) -> dict[str, Any]:
    """The page's charts: first one metric against another, then MLflow's own of each metric."""
    first, *own = "Trade-offs", "Model metrics", "System metrics"
    charts = [
        {
            "type": "SCATTER",
            "uuid": f"{across}-{up}",
            "metricSectionId": first,
            "xaxis": {"key": across, "type": "METRIC"},
            "yaxis": {"key": up, "type": "METRIC"},
            "runsCountToCompare": 100,
            "deleted": False,
            "isGenerated": False,
        }
        for across, up in scatters
    ]
    # MLflow adds charts of the metrics that have none, but drops its own sections if not named.
    sections = [
        {"uuid": each, "name": each, "display": True, "isReordered": False}
        for each in (first, *own)
    ]
    return {"compareRunCharts": charts, "compareRunSections": sections}
