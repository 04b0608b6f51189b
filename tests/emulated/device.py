"""
Builds, loads and controls the emulated "cuda" device of device.cpp, for a CPU build of torch on Linux.

    from emulated import device
    device.start("A100")              # before torch is imported
    with device.counted() as waits: ...

    python tests/emulated/device.py train_gpt2.py --max_steps 10    # any script, on the emulated card

It can't be taken out of a process again, so its tests run in one of their own: see tests/test_emulated.py.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
card: ctypes.CDLL | None = None
CARDS = {  # compute capability, multiprocessors, bytes
    "V100": ((7, 0), 80, 32e9),
    "A100": ((8, 0), 108, 80e9),
    "H100": ((9, 0), 132, 80e9),
    "H200": ((9, 0), 132, 141e9),
}


def torch_directory() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


def why_not() -> str:
    """Why there can be no emulated device here; empty if there can."""
    if not sys.platform.startswith("linux"):
        return f"the emulated device was made for Linux, not {sys.platform}"
    if list((torch_directory() / "lib").glob("libtorch_cuda*")):
        return "this torch has CUDA of its own; the emulated device needs a CPU build"
    if not compiler():
        return "no C++ compiler, which the emulated device is built with: apt install g++"
    return ""


def build() -> Path:
    """The library, in build/ beside this file; made anew when torch or device.cpp are others. Some 20 s."""
    torch_version = importlib.metadata.version("torch")
    key = hashlib.sha256((HERE / "device.cpp").read_bytes() + torch_version.encode()).hexdigest()[:16]
    library = HERE / "build" / f"device-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made, root = library.with_suffix(f".{os.getpid()}"), torch_directory()
        include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        command = [compiler(), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", str(HERE / "device.cpp"), "-o", str(made)]
        subprocess.run([*command, *include, f"-L{root}/lib", "-lc10", "-ltorch_cpu"], check=True)
        os.replace(made, library)  # several processes may build at once
    return library


def start(name: str = "A100") -> None:
    """Load the library, before torch, and let torch.cuda tell of this card."""
    global card
    if "torch" in sys.modules:
        raise ImportError("start the emulated device before torch is imported: it must be there when torch looks")
    if reason := why_not():
        raise ImportError(reason)
    for library in ("libgomp*.so*", "libc10.so", "libtorch_cpu.so"):
        for path in (torch_directory() / "lib").glob(library):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    card = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    for function in (card.card_syncs, card.card_allocated, card.card_peak):
        function.restype = ctypes.c_int64
    card.card_set_limit.argtypes = [ctypes.c_int64]
    pretend(name)


def pretend(name: str) -> None:
    """A CPU build's torch.cuda has no card to ask."""
    import torch

    capability, multiprocessors, memory = CARDS[name]
    properties = types.SimpleNamespace(
        name=f"NVIDIA {name}", major=capability[0], minor=capability[1], multi_processor_count=multiprocessors,
        total_memory=int(memory), warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=49152, shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936, L2_cache_size=40 << 20, gcnArchName="", is_integrated=0,
        clock_rate=1410000, memory_clock_rate=1215000, memory_bus_width=5120,
    )  # fmt: skip
    told = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: torch._C._accelerator_synchronizeDevice(0),
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "mem_get_info": lambda device=None: (int(memory) - card.card_allocated(), int(memory)),
        "memory_allocated": lambda device=None: card.card_allocated(),
        "memory_reserved": lambda device=None: card.card_allocated(),
        "max_memory_allocated": lambda device=None: card.card_peak(),
        "reset_peak_memory_stats": lambda device=None: card.card_reset_peak(),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "current_stream": lambda device=None: None,
        "default_generators": (torch.Generator("cuda"),),
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    for attribute, value in told.items():
        setattr(torch.cuda, attribute, value)
    torch.version.cuda = "13.0"


def run_what_is_traced() -> None:
    """torch.compile without a compiler: the graphs that it traces, forward and backward, run by their operators."""
    import torch

    compile_by = torch.compile
    torch.compile = lambda model=None, *, options=None, **settings: compile_by(model, backend="aot_eager", **settings)
    try:
        from extras import hardware
    except ImportError:
        return
    hardware.triton_problem = lambda: ""


class Waits:
    """How often the host waited for the card, in a `with` or up to now."""

    def __init__(self):
        self.first, self.last = card.card_syncs(), None

    def __int__(self) -> int:
        return (card.card_syncs() if self.last is None else self.last) - self.first


@contextlib.contextmanager
def counted():
    waits = Waits()
    yield waits
    waits.last = card.card_syncs()


@contextlib.contextmanager
def limited_to(more: int):
    """The card has `more` bytes left than are in use."""
    card.card_set_limit(card.card_allocated() + more)
    try:
        yield
    finally:
        card.card_set_limit(2**62)


def end(status: int) -> None:
    """Autograd's thread of the card doesn't end with the interpreter."""
    with contextlib.suppress(ValueError):  # a child of multiprocessing may have closed it
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    start()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as status:
        end(status.code if isinstance(status.code, int) else bool(status.code))
    end(0)
