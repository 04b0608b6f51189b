import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: threads would only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
