"""Experiment tracking: every stage is a run in MLflow.

    with tracking.run("assistants", "large", params=params, tags=tags, enabled=True) as run:
        run.log_epoch(1, {"val_accuracy": 0.91})
        run.log_final({"val_accuracy": 0.97, "params_m": 0.31})

Importing MLflow takes longer than many stages, so no stage does.  Instead `run` sends messages
over a socket to one recorder process on this machine (kd/tracking/recorder.py), which it starts
if there is none; MLflow's work happens in parallel to the training.  However a stage dies, its
socket is closed, and the recorder ends the run: none is left RUNNING.

A stage's side needs only the standard library; MLflow is imported in store.py, models.py and
trash.py.
"""

from kd.tracking.address import TrackingError, prepare_store, tracking_uri
from kd.tracking.client import NullRun, Run, Version, run, start

__all__ = [
    "NullRun",
    "Run",
    "TrackingError",
    "Version",
    "prepare_store",
    "run",
    "start",
    "tracking_uri",
]
