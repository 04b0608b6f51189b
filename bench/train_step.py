"""
The training step beside other trainers', and each of our levers alone: one run, alternating, medians.

    python fineweb.py --dataset python-docs --out data/python-docs       # once: something to train on
    python bench/train_step.py                                           # ours, eager and compiled
    python bench/train_step.py --peer ../build-nanogpt ../nanoGPT --variants ours ours,compile build-nanogpt \\
        build-nanogpt,compile nanoGPT,compile transformers,compile

A variant is a name and settings behind commas. `ours` takes the trainer's own knobs (`ours,recompute`,
`ours,sdpa=cudnn`, `ours,micro_batch=32`) and levers taken out of it, one at a time (`ours,plain_loss`; LEVERS lists
them). A peer has the name of its directory: the model and the optimizer come out of its file, whose training does not
run, and the step is the one its loop makes, in bfloat16. `transformers` is its GPT-2 with fused AdamW. `compile` says
torch.compile to any of them, and `ours,ranks=2` runs two processes in DDP, with as many micro-batches each. There
torch.compile cuts the graph at DDP's buckets, so that averaging may overlap: `ddp_whole` keeps it in one, `ddp_inside`
puts torch.compile around DDP instead of inside.

Every variant lives in a process of its own, since allocator settings and peak memory belong to a process; they get the
turn one after another, round by round, and begin with the same weights and batches. Their losses stand in the table:
with equally many ranks they must differ by no more than rounding, which is checked. Reading the data is in our time and
not in the peers'. The first steps (compilation) are apart. CPU seconds count all threads: on a busy machine they say
more than the clock.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this folder would hide modules of its names

import ast
import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import signal
import socket
import statistics
import time
import types
import typing
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import train_gpt2
from extras import hardware
from extras.cli import UserError, run
from extras.hardware import flops_per_token, peak_flops
from train_gpt2 import GPT, SIZES, GPTConfig


@dataclass
class Config:
    variants: list[str] = field(default_factory=lambda: ["ours", "ours,compile"])
    """what to measure; ratios are to the first"""
    peer: list[str] = field(default_factory=list)  # checkouts of build-nanogpt or nanoGPT
    data_dir: str = "data/python-docs"  # token shards
    model: Literal[*SIZES] = "gpt2"  # size
    n_layer: int = 0  # instead of the model's own
    micro_batch: int = 4  # windows per forward
    seq_len: int = 1024  # tokens per window
    accumulate: int = 1  # micro-batches per update
    device: str = "auto"  # cuda, mps or cpu
    rounds: int = 5  # turns of each variant
    steps: int = 1  # steps per turn; more on a GPU, where waiting for each would count
    warmup: int = 2  # steps before the first turn; compilation is in them
    at_once: int = 1  # variants that start side by side: compiling takes a minute of CPU; 0 = what the card holds
    tolerance: float = 0.05  # how far losses may be from the first variant's, in nats


# ----------------------------------------------------------------------------------------------------------------------
# Ours, and its levers


def plain_loss(x, weight, targets, n_tokens):
    logits = F.linear(x, weight).float()
    logits = logits.masked_fill(torch.arange(len(weight), device=x.device) >= n_tokens, -float("inf"))
    return F.cross_entropy(logits, targets, reduction="sum")


def without_fusion(make_optimizer):
    def make(*args):
        optimizer = make_optimizer(*args)
        step = optimizer.step

        def step_without_flag():
            optimizer.found_inf = None  # only the fused kernels know it
            return step()

        for group in optimizer.param_groups:
            group.update(fused=False, foreach=True)
        optimizer.step = step_without_flag
        return optimizer

    return make


def compile_around(ddp):
    return lambda model, **settings: torch.compile(ddp(model._orig_mod, **settings), dynamic=False)


def without_padding(make_model):
    def make(config, n_tokens):
        model = make_model(config, n_tokens)
        state = {name: value[:n_tokens] if name.endswith(("wte.weight", "lm_head.weight")) else value
                 for name, value in model.state_dict().items()}  # fmt: skip
        return GPT.of(vars(model.config) | {"vocab_size": n_tokens}, state)

    return make


def without_options(compile):
    return lambda model, options=None, **settings: compile(model, **settings)


def inductor(**settings):
    for name, value in settings.items():
        setattr(torch._inductor.config, name, value)


def sigmoid_gelu(self, x):
    """GELU's tanh form as x times a sigmoid: the same function, with fewer instructions."""
    x = self.c_fc(x)
    y = x.float()
    return self.c_proj((y * torch.sigmoid(1.5957691216057308 * y * (1 + 0.044715 * y * y))).to(x.dtype))


LEVERS = {  # what takes one out, or turns it around: what stands in its place
    "no_kept_memory": lambda: setattr(hardware, "keep_freed_memory", lambda: None),
    "no_fusion": lambda: setattr(train_gpt2, "make_optimizer", without_fusion(train_gpt2.make_optimizer)),
    "no_padding": lambda: setattr(train_gpt2, "make_model", without_padding(train_gpt2.make_model)),
    "no_bf16_residual": lambda: setattr(train_gpt2, "casts_to_bfloat16", lambda device: False),
    "ddp_inside": lambda: setattr(train_gpt2, "DistributedDataParallel", compile_around(DistributedDataParallel)),
    "ddp_whole": lambda: setattr(torch._dynamo.config, "optimize_ddp", False),
    "plain_loss": lambda: setattr(train_gpt2, "head_loss", plain_loss),
    "no_fast_math": lambda: setattr(torch, "compile", without_options(torch.compile)),
    "autotune_pointwise": lambda: inductor(max_autotune_pointwise=True),
    "coordinate_descent": lambda: inductor(coordinate_descent_tuning=True),
    "sigmoid_gelu": lambda: setattr(train_gpt2.MLP, "forward", sigmoid_gelu),
    "no_frozen_garbage": lambda: setattr(gc, "freeze", lambda: None),
}


def ranks_of(settings: list[str]) -> int:
    number = next((setting.removeprefix("ranks=") for setting in settings if setting.startswith("ranks=")), "1")
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"ranks={number} is no number of processes; ranks=2 is one")
    return int(number)


def our_config(config: Config, settings: list[str]) -> train_gpt2.Config:
    """The trainer's, with the settings of a variant; levers are taken out on the way."""
    values = {
        "data_dir": config.data_dir, "log_dir": os.path.join("bench", "out", "unused"), "model": config.model,
        "n_layer": config.n_layer, "seq_len": config.seq_len, "order": "sequential", "hella_every": 0,
        "micro_batch": config.micro_batch, "device": config.device, "compile": False, "warmup_steps": 0,
        "total_batch_size": config.micro_batch * config.seq_len * config.accumulate * ranks_of(settings),
    }  # fmt: skip
    hints = typing.get_type_hints(train_gpt2.Config)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name == "ranks":
            continue
        if name in LEVERS:
            LEVERS[name]()
        elif name in hints:
            values[name] = (hints[name] if hints[name] in (int, float) else str)(value) if value else True
        else:
            raise UserError(f"{setting}: no knob of train_gpt2.py, and none of {', '.join(LEVERS)}")
    return train_gpt2.Config(**values)


def our_step(config: Config, settings: list[str]):
    """A function that makes the next update and returns its loss, still on the device."""
    ours = our_config(config, settings)
    trainer = train_gpt2.Run(ours, train_gpt2.join_ranks(ours.device))
    batches = train_gpt2.prefetched(trainer.batch, 0, 10**9)
    gc.collect()
    gc.freeze()
    return lambda: train_gpt2.train_step(trainer, next(batches), trainer.config.max_lr)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Peers


def definitions(path: str) -> types.ModuleType:
    """The imports, functions and classes of a script, without what else it does."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    foreign = {"hellaswag", "tiktoken"}  # of their evaluations
    tree.body = [node for node in tree.body if isinstance(node, kinds) and getattr(node, "module", None) not in foreign]
    module = types.ModuleType("peer")
    sys.modules["peer"] = module  # where dataclasses look for it
    module.master_process = False  # build-nanogpt's optimizer reads it
    exec(compile(tree, path, "exec"), module.__dict__)
    return module


def make_peer(config: Config, name: str, device: torch.device):
    """Model and optimizer of a peer, with our initial weights."""
    base = train_gpt2.Config(model=config.model, n_layer=config.n_layer, seq_len=config.seq_len)
    weights, sizes = train_gpt2.make_model(base, 50257), SIZES[config.model] | {}
    sizes["n_layer"] = config.n_layer or sizes["n_layer"]
    if name == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        model = GPT2LMHeadModel(GPT2Config(n_positions=config.seq_len, **sizes, **none))
        state = weights.state_dict()
        for key, value in model.state_dict().items():
            conv = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            value.copy_(state[key].t() if conv else state[key][: len(value)])
        model.to(device)
        return model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    folder = next((path for path in config.peer if os.path.basename(os.path.normpath(path)) == name), None)
    if folder is None:
        raise UserError(f"{name}: neither ours nor transformers nor a --peer directory")
    file = os.path.join(folder, "model.py" if os.path.exists(os.path.join(folder, "model.py")) else "train_gpt2.py")
    module = definitions(file)
    model = module.GPT(module.GPTConfig(block_size=config.seq_len, vocab_size=50304, **sizes))
    model.load_state_dict(weights.state_dict())
    model.to(device)
    options = {"weight_decay": 0.1, "learning_rate": 6e-4, "device_type": device.type}
    if "betas" in model.configure_optimizers.__code__.co_varnames:
        options["betas"] = (0.9, 0.95)
    return model, model.configure_optimizers(**options)


def peer_step(config: Config, name: str, settings: list[str]):
    """The update that the loops of these trainers make; transformers' gets it, too."""
    if set(settings) - {"compile"}:
        raise UserError(f"{name} knows compile and no other setting")
    data = our_config(config, [])
    ranks = train_gpt2.Ranks(0, 1, machine_device(config.device))
    if ranks.device.type == "cuda" and ranks.device.index is not None:
        torch.cuda.set_device(ranks.device)
    torch.set_float32_matmul_precision("high")
    model, optimizer = make_peer(config, name, ranks.device)
    raw_model, model = model, torch.compile(model) if "compile" in settings else model
    shards = train_gpt2.open_shards(data.data_dir, train_gpt2.read_manifest(data.data_dir), "train")
    windows = train_gpt2.SampleStream(shards, config.seq_len, 50257)
    samples, state = config.micro_batch * config.accumulate, {"step": 0}
    ahead = {}

    def read(step):
        x, y, _ = train_gpt2.batch_of_step(windows, step * samples, samples, config.micro_batch, ranks)
        return x.long(), y.long()

    def step():
        xs, ys = ahead.pop(state["step"], None) or read(state["step"])
        state["step"] += 1
        optimizer.zero_grad()
        total = 0.0
        for x, y in zip(xs, ys):
            x, y = x.to(ranks.device), y.to(ranks.device)
            with torch.autocast(ranks.device.type, torch.bfloat16):
                if name == "transformers":
                    logits = model(x).logits
                    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
                else:
                    loss = model(x, y)[1]
            loss = loss / config.accumulate
            total += loss.detach()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 6e-4
        optimizer.step()
        return total.item()  # printed every step

    def prepare(count):
        for index in range(state["step"], state["step"] + count):
            ahead[index] = read(index)

    step.prepare = prepare
    return step


def machine_device(kind: str) -> torch.device:
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(kind)


# ----------------------------------------------------------------------------------------------------------------------
# Measurement


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_gib(device: torch.device) -> float:
    """Most memory this process has had: of the GPU, or else of the host (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def work(pipe, config: Config, variant: str, environment: dict) -> None:
    """A variant's process: for each number of steps it is sent, their seconds, CPU seconds, last loss, peak memory."""
    os.environ.update(environment)
    try:
        name, *settings = variant.split(",")
        device = machine_device(config.device)
        step = our_step(config, settings) if name == "ours" else peer_step(config, name, settings)
        while count := pipe.recv():
            getattr(step, "prepare", lambda count: None)(count)
            wait_for(device)
            clock, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                loss = step()
            loss = float(loss)
            wait_for(device)
            answer = time.perf_counter() - clock, time.process_time() - cpu, loss, peak_gib(device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the next variant needs it, and has its turn once we have answered
            pipe.send(answer)
    except Exception as error:  # whatever a peer or a lever may raise, the others are measured
        pipe.send(error if isinstance(error, UserError) else UserError(f"{variant}: {error!r}".splitlines()[0]))


def measure(config: Config) -> dict[str, dict]:
    """variant -> seconds and CPU seconds of each turn, losses of each turn, peak memory, seconds before the first."""
    pipes, results = {}, {}
    for some in batches(config.variants, config.at_once or room(config.device)):
        for variant in some:
            pipes[variant] = start(config, variant)
            send(pipes[variant], config.warmup)
        for variant in some:
            first = collect(pipes[variant], variant)
            if first is None:
                del pipes[variant]
                continue
            results[variant] = {"seconds": [], "cpu": [], "loss": [], "first": first[0]}
            print(f"{variant}: first {config.warmup} steps {first[0]:.1f} s, loss {first[2]:.4f}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # SIGTERM, too: what was measured by then is shown
        for variant, pipe in list(pipes.items()) * config.rounds:
            if config.steps > 1:  # on a GPU: what was freed for the others is allocated again
                turn(pipe, variant, 1)
            answer = turn(pipe, variant, config.steps)
            if answer is None:
                raise UserError(f"{variant} failed in the middle; measure it alone, or with a smaller --micro_batch")
            seconds, cpu, loss, results[variant]["peak"] = answer
            results[variant]["seconds"].append(seconds / config.steps)
            results[variant]["cpu"].append(cpu / config.steps)
            results[variant]["loss"].append(loss)
            times = f"{1000 * seconds / config.steps:.1f} ms, CPU {cpu / config.steps:.2f} s"
            print(f"{variant}: {times}, loss {loss:.4f}", flush=True)
    for pipe in chain(*pipes.values()):
        pipe.send(0)
    return results


PROCESSES = {}  # variant -> its processes


def start(config: Config, variant: str) -> list:
    """Pipes to the processes of a variant, one a rank."""
    context, pipes, world_size = multiprocessing.get_context("spawn"), [], ranks_of(variant.split(","))
    port = str(free_port())
    for rank in range(world_size):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {name: str(value) for name, value in environment.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as torchrun has it
        pipe, there = context.Pipe()
        arguments = (there, config, variant, environment if world_size > 1 else {})
        PROCESSES.setdefault(variant, []).append(context.Process(target=work, args=arguments, daemon=True))
        PROCESSES[variant][-1].start()
        there.close()  # or we would wait for a process that died
        pipes.append(pipe)
    return pipes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def room(device: str) -> int:
    """How many processes of 40 GiB a card holds: 124M at 64 x 1024 tokens."""
    device = machine_device(device)
    return max(1, torch.cuda.get_device_properties(device).total_memory // (40 * 2**30)) if device.type == "cuda" else 1


def batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def turn(pipes: list, variant: str, count: int):
    """`count` steps of a variant; see `collect`."""
    send(pipes, count)
    return collect(pipes, variant)


def send(pipes: list, count: int) -> None:
    for pipe in pipes:
        with contextlib.suppress(OSError):  # it died; `collect` says so
            pipe.send(count)


def collect(pipes: list, variant: str):
    """What `work` answers: the first rank's seconds, all ranks' CPU seconds, their mean loss, the highest peak."""
    answers = {}
    try:
        while len(answers) < len(pipes):  # whoever speaks first: the others may wait for one that failed
            for pipe in multiprocessing.connection.wait([pipe for pipe in pipes if pipe not in answers]):
                answers[pipe] = pipe.recv()
                if isinstance(answers[pipe], UserError):
                    raise answers[pipe]
    except (EOFError, OSError, UserError) as error:
        why = error if isinstance(error, UserError) else "its process died"
        print(f"{variant} is left out: {why}", flush=True)
        for process in PROCESSES[variant]:
            process.terminate()
            process.join()
        return None
    seconds, cpu, losses, peaks = zip(*(answers[pipe] for pipe in pipes))
    return seconds[0], sum(cpu), sum(losses) / len(losses), max(peaks)


def show(config: Config, results: dict[str, dict]) -> bool:
    """The table, in Markdown. Whether all the losses agree."""
    results = {variant: result for variant, result in results.items() if result["seconds"]}
    if not results:
        return False
    device = machine_device(config.device)
    sizes = SIZES[config.model] | ({"n_layer": config.n_layer} if config.n_layer else {})
    flops, peak = flops_per_token(GPTConfig(config.seq_len, 50304, **sizes), config.seq_len), peak_flops(device)
    per_rank = config.micro_batch * config.seq_len * config.accumulate  # tokens
    ranks = {variant: ranks_of(variant.split(",")) for variant in results}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} cores"
    print(f"\n{config.model}, {config.accumulate} x {config.micro_batch} x {config.seq_len} tokens a step, {card}, "
          f"torch {torch.__version__}, medians of {config.rounds} turns of {config.steps}\n")  # fmt: skip
    print("| variant | ms a step | tokens/s | MFU | CPU s | peak GiB | loss | first | turns | ratio | CPU ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    first = next(iter(results.values()))
    base, base_cpu = statistics.median(first["seconds"]), statistics.median(first["cpu"])
    for variant, result in results.items():
        seconds, cpu = statistics.median(result["seconds"]), statistics.median(result["cpu"])
        tokens, times = per_rank * ranks[variant], ranks[variant] / next(iter(ranks.values()))
        mfu = f"{100 * per_rank / seconds * flops / peak:.1f}%" if peak else "n/a"
        cells = [
            variant, f"{1000 * seconds:.1f}", f"{tokens / seconds:,.0f}", mfu, f"{cpu:.2f}", f"{result['peak']:.2f}",
            f"{result['loss'][-1]:.4f}", f"{result['first']:.0f} s", str(len(result["seconds"])),
            f"{times * base / seconds:.3f}", f"{times * base_cpu / cpu:.3f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    alike = [name for name in results if ranks[name] == next(iter(ranks.values()))]  # the others' batch is another
    alike = [name for name in alike if "recipe=fast" not in name]  # Muon takes other steps
    far = [name for name in alike if abs(results[name]["loss"][-1] - first["loss"][-1]) > config.tolerance]
    for variant in far:
        print(f"\n{variant}: the loss is not that of {config.variants[0]}")
    return not far


def main(config: Config) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a lease ends
    if hasattr(os, "getloadavg"):
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    results = measure(config)
    if not results or not show(config, results):
        sys.exit(1)


if __name__ == "__main__":
    run(main, Config, __doc__)
