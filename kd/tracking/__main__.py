"""The recorder's door; kd/tracking/recorder.py knocks on it."""

import os
import sys
from pathlib import Path

from kd.tracking import recorder

if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # the starter has nobody to wait for
    recorder.serve(Path(sys.argv[1]), os.environ["MLFLOW_TRACKING_URI"], Path(sys.argv[2]))
