"""The recorder's entry point; kd/tracking/recorder.py starts it."""

import os
import sys
from pathlib import Path

from kd.tracking import recorder

if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # daemonise: the process that started us need not wait
    recorder.serve(Path(sys.argv[1]), os.environ["MLFLOW_TRACKING_URI"], Path(sys.argv[2]))
