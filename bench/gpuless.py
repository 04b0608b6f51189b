"""
What the compiled step does on a GPU, read from the code that Inductor generates for one: no GPU is needed, or used.

    make gpuless                                          # in its own environment, with the Triton of CUDA's wheels
    python bench/gpuless.py [--micro_batch 64] [--model gpt2]

A faked card (tests/emulated) lets torch compile the training step for sm_80 and for sm_90. The generated code then runs
with FakeTensors, which have shapes and no numbers, and every launch is recorded. Checked: no float32 logits; nothing is
compiled after the first step, not even by an evaluation; ptxas accepts every kernel. Printed: launches, memory, bytes
and FLOPs of a micro-batch, and the milliseconds that follow if each launch takes as long as its bytes or its FLOPs need
at the rates of the data sheet ("floor") or at the shares of them in USUAL ("predicted"). Computed, not measured.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
import weakref
from collections import Counter
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # this folder would hide Python's tokenize
sys.path.append(str(ROOT / "tests"))

from unittest import mock

from emulated import device

CODE = {"sm_80": ("A100", "flash"), "sm_90": ("H100", "cudnn")}  # the card to fake, the attention torch chooses there
CARDS = {  # whose code it runs, dense bf16 TFLOP/s, TB/s: data sheets of the SXM cards
    "A100": ("sm_80", 312, 2.039),
    "H100": ("sm_90", 989, 3.35),
    "H200": ("sm_90", 989, 4.8),
}
USUAL = {"sm_80": (0.80, 0.50, 0.85), "sm_90": (0.68, 0.35, 0.85)}  # shares of those that public benchmarks of cuBLAS,
# attention with heads of 64 and copies reach: an assumption, from which "predicted" follows
VIEWS = {"view", "as_strided", "detach", "t", "transpose", "slice", "select", "expand", "permute", "unsqueeze", "alias"}
MADE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}  # memory, and no kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro_batch", type=int, default=64)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--code", choices=CODE, help="only this, as JSON")
    args = parser.parse_args()
    if args.code:
        print(json.dumps(inspect(args.code, args.model, args.micro_batch)), flush=True)
        os._exit(0)  # autograd's thread of the card doesn't end with the interpreter
    if reason := device.why_not() or ("" if find_spec("triton") else "no Triton here; `make gpuless` installs it"):
        sys.exit(f"bench/gpuless.py: {reason}")
    found = {}
    for code in CODE:
        command = [sys.executable, __file__, "--model", args.model, f"--micro_batch={args.micro_batch}", "--code", code]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[code] = json.loads(result.stdout.splitlines()[-1])
        check(code, found[code])
    print(table(found, args))


# ----------------------------------------------------------------------------------------------------------------------
# The launches of a step


class Launches:
    """What was launched since `begin`: [name, bytes read and written, FLOPs] each."""

    def __init__(self):
        self.all: list[tuple[str, float, float]] = []

    def begin(self) -> None:
        self.all.clear()

    def triton(self, kernel: "Kernel", arguments) -> None:
        moved = 0
        for name, tensor in zip(kernel.parameters, arguments):
            if hasattr(tensor, "element_size"):
                touched = min(tensor.numel(), kernel.points) * tensor.element_size()  # fewer points: it gathers
                moved += touched * ((f"tl.load({name} +" in kernel.source) + bool(kernel.writes(name)))
        self.all.append((kernel.name, moved, 0))

    def operator(self, op, arguments, results) -> None:
        """One of ATen's: matmuls, attention, and what autograd and the optimizer call."""
        import torch

        space, name = op._schema.name.split("::")
        leaves = torch.utils._pytree.tree_leaves
        tensors = {id(t): t for t in leaves((arguments, results)) if isinstance(t, torch.Tensor)}.values()
        if space != "aten" or name in VIEWS | MADE or not any(t.device.type == "cuda" for t in tensors):
            return
        moved = sum(t.numel() * t.element_size() for t in tensors)
        flops = 0
        if name in ("mm", "addmm"):
            a, b = [t for t in leaves(arguments) if isinstance(t, torch.Tensor) and t.dim() == 2][:2]
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif "dot_product" in name:  # causal: half of two matmuls of (T, hs) and (hs, T), and of five backward
            B, nh, T, hs = next(t for t in tensors if t.dim() == 4).shape
            flops = (5 if "backward" in name else 2) * B * nh * T * T * hs
        self.all.append((name, moved, flops))


class Kernel:
    """A Triton kernel of Inductor's that is written down instead of launched."""

    def __init__(self, name: str, source: str, launches: Launches):
        self.name, self.source, self.launches = name, source, launches
        self.parameters = re.search(r"^def \w+\((.*?)\):", source, re.MULTILINE)[1].split(", ")
        sizes = re.findall(r"^    (?:[xyz]|r\d_)numel = (\d+)", source, re.MULTILINE)
        self.points = 1
        for size in sizes:
            self.points *= int(size)

    def writes(self, name: str):
        return re.search(rf"tl\.(store|atomic_add)\({name} \+", self.source)

    @property
    def wide(self) -> bool:
        """Whether its indices have 64 bits."""
        return bool(re.search(r"tl\.program_id\(\d\)\.to\(tl\.int64\)", self.source))

    def run(self, *arguments, **_) -> None:
        self.launches.triton(self, arguments)


def fake_inductor(capability: int, launches: Launches) -> list[Kernel]:
    """Let Inductor generate for the faked card, and its code run with FakeTensors. Returns the kernels to come."""
    import torch
    import torch._dynamo  # first: the next ones import each other
    import torch._functorch._aot_autograd.runtime_wrappers as wrappers
    import torch._functorch.config
    import torch._inductor.async_compile
    import torch._inductor.config
    import triton
    from triton.backends.compiler import GPUTarget

    kernels: list[Kernel] = []

    def make_kernel(_, name, source, device_str="cuda", **__):
        kernels.append(Kernel(name, source, launches))
        return kernels[-1]

    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda index=0: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
        )
    )  # fmt: skip
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    torch._inductor.async_compile.AsyncCompile.triton = make_kernel
    torch._inductor.async_compile.AsyncCompile.wait = lambda self, scope: None
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
    generated = torch._C._dynamo.guards  # what the generated code calls, in C++
    generated._empty_strided_cuda = lambda *args: torch.empty_strided(*args[:2], dtype=args[2], device="cuda:0")
    generated._reinterpret_tensor = torch.as_strided
    generated.assert_size_stride = generated.assert_alignment = lambda *args: None
    # attention could have dropout, so it is given a generator's state
    torch.ops.higher_order.graphsafe_run_with_rng_state = lambda op, *args, rng_state=None, **kw: op(*args, **kw)
    states = lambda tracker: [torch.cuda.default_generators[0]] * tracker.num_rng  # noqa: E731
    wrappers._AutogradRngStateTracker.add_forward_args = lambda self, ctx, args: (*args, *states(self))
    wrappers._AutogradRngStateTracker.add_backward_args = lambda self, ctx, args: args.extend(states(self))
    return kernels


def choose_attention(kernel: str) -> None:
    """A CPU build can't choose among CUDA's kernels: call the one that CUDA would choose."""
    import torch

    aten = torch.ops.aten

    def attention(q, k, v, attn_mask=None, is_causal=False):
        if kernel == "cudnn":
            grads = torch.is_grad_enabled()
            return aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, grads, 0.0, is_causal)[0]
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    torch.nn.functional.scaled_dot_product_attention = attention


def make_memory(launches: Launches):
    """A FakeTensorMode that knows how many bytes of the card are in use, and tells `launches` of ATen's operators."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Memory(FakeTensorMode):
        now = peak = depth = 0

        def __torch_dispatch__(self, op, classes, args=(), kwargs=None):
            self.depth += 1
            results = super().__torch_dispatch__(op, classes, args, kwargs or {})
            self.depth -= 1
            if self.depth:  # a part of another operator, as it is done without numbers
                return results
            launches.operator(op, (args, kwargs), results)
            for tensor in torch.utils._pytree.tree_leaves(results):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                    self.note(tensor)
            return results

        def __init__(self):
            super().__init__()
            self.known: dict[int, int] = {}  # storage -> bytes
            self.float32 = 0  # elements of the largest tensor

        def note(self, tensor) -> None:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = bytes = -(-storage.nbytes() // 512) * 512
                self.now += bytes
                self.peak = max(self.peak, self.now)
                if tensor.dtype == torch.float32:
                    self.float32 = max(self.float32, tensor.numel())
                weakref.finalize(storage, self.free, storage._cdata)

        def free(self, key: int) -> None:
            self.now -= self.known.pop(key)

    return Memory()


# ----------------------------------------------------------------------------------------------------------------------
# The checks


def inspect(code: str, size: str, B: int) -> dict:
    """Compile the step of train_gpt2.py for that code; all that the table needs."""
    card, attention = CODE[code]
    device.start(card)
    import torch

    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # as autograd does
    launches = Launches()
    kernels = fake_inductor(int(code[3:]), launches)
    choose_attention(attention)
    import train_gpt2

    on_the_card(train_gpt2.GPT)
    T, memory = 1024, make_memory(launches)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as directory, memory:
        config = train_gpt2.Config(
            data_dir=tokens(Path(directory)), log_dir=directory + "/log", device="cuda", model=size, micro_batch=B,
            total_batch_size=2 * B * T, hella_every=0, compile=True, dtype="bfloat16",
        )  # fmt: skip
        run = train_gpt2.Run(config, train_gpt2.Ranks(0, 1, torch.device("cuda", 0)))
        compiled, model, held = len(kernels), run.model, []
        memory.float32 = 0  # from here on, what is there is there: while it compiled, whole graphs were

        def marked(*args):
            held.append(memory.now)
            memory.peak = memory.now
            return model(*args)

        run.model = marked
        x = torch.zeros(2, B, T, dtype=torch.int32)
        steps = []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for weights in ([1.0], [1.0], [0.5, 0.5]):  # the first makes the moments
                launches.begin()
                train_gpt2.train_step(run, (x, x, weights), 1e-3)
                steps.append(Counter(launches.all))
            peak = (memory.peak - held[-1]) / (B * T)
            with torch.no_grad(), run.autocast():
                run.raw_model(x[0, :3, :45].to("cuda"))
                run.raw_model(x[0].to("cuda"), x[0].long().to("cuda"))
            train_gpt2.train_step(run, (x, x, [1.0]), 1e-3)
    assert len(kernels) == compiled, f"{len(kernels) - compiled} kernels were compiled after the first step"
    logits = B * T * run.raw_model.config.vocab_size
    assert 0 < memory.float32 < logits, f"a float32 buffer of {memory.float32} elements; the logits are {logits}"
    micro_batch = steps[2] - steps[1]  # two of them less one, the second with gradients to add to
    return {
        "micro_batch": [[*launch, n] for launch, n in micro_batch.items()],
        "optimizer": sum((steps[1] - micro_batch).values()),
        "kernels": len(kernels),
        "wide": sorted(kernel.name for kernel in kernels if kernel.wide),
        "peak": peak,
        "cubins": sorted({compile_to_cubin(kernel) for kernel in kernels}),
        "shape": [getattr(run.raw_model.config, name) for name in ("n_layer", "n_embd", "vocab_size")],
        "tokens": B * T,
    }


def compile_to_cubin(kernel: Kernel) -> str:
    """Through Triton and ptxas, in every configuration that Inductor would try. Returns ptxas' target."""
    import torch._inductor.runtime.triton_helpers as helpers
    import triton

    helpers.set_driver_to_gpu = lambda: None
    binaries = []
    with tempfile.TemporaryDirectory() as directory, mock.patch("triton.compile", keeping(triton.compile, binaries)):
        path = Path(directory, "kernel.py")
        path.write_text(kernel.source)
        module = types.ModuleType(kernel.name)
        module.__file__ = str(path)
        exec(compile(kernel.source, str(path), "exec"), module.__dict__)
        tuner = getattr(module, kernel.name)
        for config in tuner.configs:
            tuner._precompile_config(config)
    assert len(binaries) == len(tuner.configs) and all(b.asm["cubin"].startswith(b"\x7fELF") for b in binaries)
    return re.search(r"^\.target (\w+)", binaries[0].asm["ptx"], re.MULTILINE)[1]


def keeping(function, results: list):
    def called(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return called


def on_the_card(module: type) -> None:
    """Make its instances there: FakeTensors that are parameters can't be moved."""
    import torch

    make = module.__init__

    def make_there(self, *args):
        with torch.device("cuda"):
            make(self, *args)

    module.__init__, module.to = make_there, lambda self, device: self


def tokens(directory: Path) -> str:
    """Shards that are long enough; what is in them doesn't matter."""
    import numpy as np

    for name in ("train_000001", "val_000000"):
        np.save(directory / f"edufineweb_{name}.npy", (np.arange(2**18) % 50257).astype(np.uint16))
    return str(directory)


# ----------------------------------------------------------------------------------------------------------------------
# The table


def kind(name: str) -> str:
    if name in ("mm", "addmm"):
        return "matmul"
    return "attention" if "dot_product" in name else "triton" if name.startswith("triton") else "aten"


def sums(launches: list) -> dict[str, list[float]]:
    """kind -> launches, bytes, FLOPs."""
    found = {name: [0, 0.0, 0.0] for name in ("matmul", "attention", "triton", "aten")}
    for name, moved, flops, n in launches:
        found[kind(name)] = [a + b for a, b in zip(found[kind(name)], (n, n * moved, n * flops))]
    return found


def milliseconds(launches: list, card: str, usual: bool) -> list[float]:
    """Of matmuls, attention and the rest: each launch takes as long as its bytes or its FLOPs, one after the other."""
    code, tflops, terabytes = CARDS[card]
    times = dict.fromkeys(("matmul", "attention", "triton", "aten"), 0.0)
    for name, moved, flops, n in launches:
        matmul, attention, memory = USUAL[code] if usual else (1.0, 1.0, 1.0)
        share = attention if kind(name) == "attention" else matmul
        times[kind(name)] += n * max(moved / (memory * terabytes * 1e12), flops / (share * tflops * 1e12)) * 1e3
    return [times["matmul"], times["attention"], times["triton"] + times["aten"]]


def check(code: str, one: dict) -> None:
    """What must hold of that code; the numbers are bounds with some room, not records."""
    L, C, V, found = *one["shape"], sums(one["micro_batch"])
    assert found["matmul"][2] == 6 * (12 * L * C**2 + V * C) * one["tokens"], "each weight: forward, and twice backward"
    assert found["attention"][0] == 2 * L
    assert one["kernels"] <= 45 and found["triton"][0] <= 30 * L, (one["kernels"], found["triton"][0])
    assert one["peak"] <= 34 * L * C + 2.1 * V, one["peak"]
    assert not one["wide"], one["wide"]
    assert one["cubins"] == ["sm_90a" if code == "sm_90" else code], one["cubins"]


def column(card: str, one: dict, tokens: int) -> dict[str, str]:
    """What is said of a card, by row."""
    kinds = sums(one["micro_batch"])
    cells = {
        "code, attention": f"{one['cubins'][0]}, {CODE[CARDS[card][0]][1]}",
        "Triton kernels, all made to cubins": str(one["kernels"]),
        "of them with 64-bit indices": str(len(one["wide"])),
        "launches: Triton": f"{kinds['triton'][0]:.0f}",
        "matmuls, attention, others": ", ".join(f"{kinds[k][0]:.0f}" for k in ("matmul", "attention", "aten")),
        "once a step": str(one["optimizer"]),
        "peak beyond weights, moments and gradients, bytes a token": f"{one['peak']:,.0f}",
        "bytes moved, GB": f"{sum(moved for _, moved, _ in kinds.values()) / 1e9:.0f}",
        "TFLOP of matmuls, attention": ", ".join(f"{kinds[k][2] / 1e12:.1f}" for k in ("matmul", "attention")),
    }
    for name, usual in (("floor", False), ("predicted", True)):
        parts = milliseconds(one["micro_batch"], card, usual)
        cells[f"{name}: matmuls, attention, rest, ms"] = ", ".join(f"{part:.1f}" for part in parts)
        cells[f"**{name}, ms**"] = f"**{sum(parts):.1f}**"
        cells[f"{name}, tokens/s"] = f"{tokens / sum(parts):,.0f}k"
    return cells


def table(found: dict, args) -> str:
    columns = {card: column(card, found[CARDS[card][0]], 1024 * args.micro_batch) for card in CARDS}
    rows = [[f"{args.model}, {args.micro_batch} x 1024 tokens, computed", *CARDS], ["---"] * (1 + len(CARDS))]
    rows += [[name, *(cells[name] for cells in columns.values())] for name in columns["A100"]]
    how = f"`python {' '.join(sys.argv)}`, {date.today()}, torch {version('torch')}, Triton {version('triton')}"
    return "\n".join([how, "", *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    main()
