import contextlib
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: threads would only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in ("no_proxy", "NO_PROXY"):  # the hub's library makes one client, in whichever test comes first
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))

with contextlib.suppress(ImportError):  # it reads the environment now, not that of the first test that needs it
    import huggingface_hub.constants  # noqa: F401
