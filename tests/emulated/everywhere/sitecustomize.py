"""With this folder in PYTHONPATH every Python process has the emulated card, and torch.compile runs what it traced.

For `bench/gpu.sh emulate`, whose parts start processes of their own.
"""

import atexit
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import device

status = 0


def exit_noted(code=0):
    global status
    status = code if isinstance(code, int) else int(bool(code))
    raise SystemExit(code)


def hook(*error):
    global status
    status = 1
    sys.__excepthook__(*error)


if "pip" not in sys.argv[0] and not device.why_not():
    device.start("H100")
    device.run_what_is_traced()
    sys.exit, sys.excepthook = exit_noted, hook
    atexit.register(lambda: device.end(status))
