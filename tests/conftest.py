import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: results depend on it
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "true")
