"""
How many tokens --recipe fast saves: both recipes tuned alike, then held against each other at several lengths.

    python bench/recipe/study.py                                     # bytes of the built-in corpus, smallest size
    python fineweb.py --input 'texts/*.parquet' --tokenizer bytes --out data/texts
    python bench/recipe/study.py --data_dir data/texts --sizes 0.6M 3M --out log/recipe
    python bench/recipe/study.py --out log/recipe --report           # what is known so far; trains nothing

Learning rates fall to their end with a run's last step, so a run cut short says nothing: what counts is where whole
runs of different lengths end. The stages, for each size:

    grid      max_lr of gpt2 and the rates of fast, equally many of each: gpt2 at N steps, fast at its greatest length
    lengths   gpt2 at N steps; fast at N / 1.8, N / 2.4 and N / 3.2 (--lengths): three seeds of each
    clock     steps of both by turns, in one process

The answer is N over the length at which fast would end where gpt2 ends: interpolated between its lengths. Every trial
is a run directory in OUT, made by train_gpt2.py on one thread; those that are done are not done again, so the study can
be killed and started again at will. OUT/report.md and OUT/curves_SIZE.png are written anew after each stage.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # as in the other benchmarks

import json
import math
import statistics
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from extras.cli import UserError, run
from extras.files import atomic_file
from train_gpt2 import RECIPES

SMALL = {"seq_len": 128, "total_batch_size": 8192, "micro_batch": 16, "val_tokens": 65536, "dtype": "auto"}
SIZES = {  # the model, the batch, and the middle of the grids: max_lr of gpt2, muon_lr of fast
    "tiny": (SMALL | {"n_layer": 2, "n_head": 1, "n_embd": 32, "total_batch_size": 2048}, 6e-3, 1e-2),
    "0.6M": (SMALL | {"n_layer": 3, "n_head": 2, "n_embd": 128}, 3e-3, 2e-2),
    "3M": (SMALL | {"n_layer": 7, "n_head": 3, "n_embd": 192}, 2e-3, 1.4e-2),
    "8M": (
        SMALL
        | {"n_layer": 10, "n_head": 4, "n_embd": 256, "total_batch_size": 2048, "val_tokens": 32768, "val_every": 100},
        7e-4,
        1.4e-2,
    ),
    "124M": ({"model": "gpt2", "val_tokens": 2**21}, 1.2e-3, 3.6e-3),  # on a GPU
}


@dataclass
class Config:
    data_dir: str = ""  # token shards; empty = the bytes of the built-in corpus, made in OUT/data
    out: str = "log/recipe"  # run directories, report.md and curves.png go here
    sizes: list[str] = field(default_factory=lambda: ["0.6M"])  # of the names above
    steps: int = 300  # N, of the gpt2 recipe
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)  # of the middle of the grids, on both sides
    lengths: tuple[float, ...] = (1.8, 2.4, 3.2)  # times fewer steps than gpt2; of the first, fast's rates are tuned
    seeds: int = 3  # of each length
    workers: int = 2  # trials at a time, one thread each
    device: str = "cpu"  # cpu, or cuda with --workers 1
    picture: str = ""  # the last size's picture goes there, too
    report: bool = False  # only report what is there


# ----------------------------------------------------------------------------------------------------------------------
# Trials


@dataclass(frozen=True)
class Trial:
    """One run: a size, a recipe with its knobs, a length and a seed. Two that are equal are one."""

    size: str
    arm: str
    steps: int
    knobs: tuple[tuple[str, object], ...] = field(default=())
    seed: int = 1

    def log_dir(self, config: Config) -> Path:
        knobs = "_".join(f"{name}={value:g}" for name, value in self.knobs if isinstance(value, float))
        return Path(config.out) / self.size / f"{self.arm}_{knobs}_{self.steps}steps_seed{self.seed}"

    def settings(self, config: Config) -> dict:
        """The trainer's Config, as a dict."""
        warmup = max(1, round(self.steps * 715 / 19073))  # the share of the run that it has in the paper's recipe
        return {
            "data_dir": config.data_dir, "log_dir": str(self.log_dir(config)), "max_steps": self.steps,
            "warmup_steps": warmup, "seed": self.seed, "device": config.device, "val_every": max(1, self.steps // 10),
            "hella_every": 0, "sample_every": 0, "save_every": 100, "keep_checkpoints": 1,
            **SIZES[self.size][0], **dict(self.knobs),
        }  # fmt: skip

    def losses(self, config: Config) -> dict[int, float]:
        """step -> validation loss; {} if the trial is not done."""
        path = self.log_dir(config) / "log.txt"
        if not path.exists() or "# done" not in path.read_text(encoding="utf-8"):
            return {}
        text = path.read_text(encoding="utf-8")
        begun = next(line for line in text.splitlines() if line.startswith("# config "))
        was = json.loads(begun.removeprefix("# config "))
        now = vars(train_gpt2.resolve(train_gpt2.Config(**self.settings(config))))
        for name in RECIPES["fast"]:
            if was.get(name) != now[name]:
                raise UserError(f"{path.parent} was run with --{name} {was.get(name)}, not {now[name]}: another --out")
        lines = [line.split() for line in text.splitlines() if " val " in line]
        return {int(step): float(value) for step, _, value in lines}

    def loss(self, config: Config) -> float:
        """At the end; nan if the trial is not done."""
        losses = self.losses(config)
        return losses[max(losses)] if losses else float("nan")


def gpt2(size: str, steps: int, lr: float, arm="gpt2", seed=1, **knobs) -> Trial:
    """The paper's recipe at another rate, or with one of fast's levers."""
    knobs = {"max_lr": lr, "min_lr": lr / 10} | knobs
    return Trial(size, arm, steps, tuple(knobs.items()), seed)


def fast(size: str, steps: int, lr: float, seed=1) -> Trial:
    """`lr` is Muon's; the others' keeps the recipe's ratio to it."""
    defaults = RECIPES["fast"]
    knobs = {"recipe": "fast", "max_lr": lr * defaults["max_lr"] / defaults["muon_lr"], "muon_lr": lr}
    return Trial(size, "fast", steps, tuple(knobs.items()), seed)


def carry_out(trial: Trial, config: Config) -> None:
    """Train, unless it was done; a trial that was killed goes on. UserError if the trainer fails."""
    if trial.losses(config):
        return
    flags = [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in trial.settings(config).items()
    ]
    command = [sys.executable, os.path.join(sys.path[0], "train_gpt2.py"), "--resume", *flags]
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if not trial.losses(config):
        raise UserError(f"{trial.log_dir(config)}: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    for step in train_gpt2.saved_steps(str(trial.log_dir(config))):
        train_gpt2.checkpoint_path(str(trial.log_dir(config)), step).unlink()
    print(f"{trial.log_dir(config)}: {trial.loss(config):.4f} in {time.perf_counter() - began:.0f} s", flush=True)


def carry_out_all(trials: Iterable[Trial], config: Config) -> None:
    if config.report:
        return
    trials = list(dict.fromkeys(trials))
    print(f"{len(trials)} trials, {sum(not trial.losses(config) for trial in trials)} of them to do", flush=True)
    with ThreadPoolExecutor(config.workers) as pool:
        list(pool.map(lambda trial: carry_out(trial, config), trials))


# ----------------------------------------------------------------------------------------------------------------------
# Stages


def grids(size: str, config: Config) -> tuple[list[Trial], list[Trial]]:
    """Of gpt2 and of fast, as many trials on both sides."""
    _, max_lr, muon_lr = SIZES[size]
    short = round(config.steps / config.lengths[0])
    return (
        [gpt2(size, config.steps, max_lr * factor) for factor in config.factors],
        [fast(size, short, muon_lr * factor) for factor in config.factors],
    )


def best(trials: list[Trial], config: Config) -> Trial | None:
    """The one that ends lowest, of those that are done."""
    done = [trial for trial in trials if trial.losses(config)]
    return min(done, key=lambda trial: trial.loss(config), default=None)


def tuned(size: str, config: Config) -> tuple[float, float] | None:
    """max_lr of gpt2 and muon_lr of fast; None before the grids are done."""
    chosen = [best(grid, config) for grid in grids(size, config)]
    return (dict(chosen[0].knobs)["max_lr"], dict(chosen[1].knobs)["muon_lr"]) if all(chosen) else None


def lengths(size: str, config: Config, max_lr: float, muon_lr: float) -> tuple[list[Trial], dict[float, list[Trial]]]:
    """Seeds of gpt2 at N steps; how many times fewer -> seeds of fast."""
    seeds = range(1, config.seeds + 1)
    return (
        [gpt2(size, config.steps, max_lr, seed=seed) for seed in seeds],
        {times: [fast(size, round(config.steps / times), muon_lr, seed) for seed in seeds] for times in config.lengths},
    )


def clock_path(size: str, config: Config) -> Path:
    return Path(config.out) / size / "seconds.json"


def step_seconds(size: str, config: Config, max_lr: float, muon_lr: float, rounds=12) -> None:
    """Write the median seconds of a step of gpt2 and of fast, which take turns; CPU time on a CPU, which is shared."""
    if clock_path(size, config).exists() or config.report:
        return
    torch.set_num_threads(1)
    sides = []
    for trial in (gpt2(size, config.steps, max_lr), fast(size, config.steps, muon_lr)):
        settings = trial.settings(config) | {"log_dir": str(Path(config.out) / "unused")}
        sides.append(train_gpt2.Run(train_gpt2.Config(**settings), train_gpt2.join_ranks(config.device)))
    now = time.process_time if sides[0].device.type == "cpu" else time.perf_counter
    seconds = ([], [])
    for step in range(rounds + 2):
        for side, spent in zip(sides, seconds):
            batch, began = side.batch(step), now()
            float(train_gpt2.train_step(side, batch, 1e-4)[0])  # waits for the device
            spent.append(now() - began)
    with atomic_file(clock_path(size, config)) as file:
        file.write(json.dumps([statistics.median(spent[2:]) for spent in seconds]).encode())


# ----------------------------------------------------------------------------------------------------------------------
# What it shows


def times_fewer(target: float, ends: dict[float, float]) -> tuple[float, str]:
    """How many times fewer tokens end at `target`, from {times: loss}; and a sign if it lies outside of what was run.

    Losses are joined by lines over the logarithm of the tokens.
    """
    times = sorted(ends)
    losses = [ends[one] for one in times]  # they rise
    sign = ">" if target > losses[-1] else "<" if target < losses[0] else ""
    return float(np.exp(np.interp(target, losses, np.log(times)))), sign


def spread(losses: list[float]) -> str:
    if not all(map(math.isfinite, losses)):
        return "not done"
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def table(*rows: tuple) -> list[str]:
    """Markdown of rows, the first of them the head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return ["", head, "|---" * len(rows[0]) + "|", *body]


def report(size: str, config: Config) -> list[str]:
    """Lines of Markdown."""
    batch = train_gpt2.Config(**SIZES[size][0]).total_batch_size
    rows = [("grid", "steps", "rate", "validation loss")]
    for trials, rate in zip(grids(size, config), ("max_lr", "muon_lr")):
        chosen = best(trials, config)
        for trial in trials:
            at_end = " at the grid's end" if chosen in (trials[0], trials[-1]) else ""
            remark = f", the best{at_end}" if trial == chosen else ""
            value = f"{rate} {dict(trial.knobs)[rate]:g}"
            rows.append((trial.arm, trial.steps, value, f"{trial.loss(config):.4f}{remark}"))
    text = [f"## {size}: {config.steps} steps of {batch:,} tokens", *table(*rows)]
    rates = tuned(size, config)
    if rates is None:
        return [*text, ""]
    slow, quick = lengths(size, config, *rates)
    target = [trial.loss(config) for trial in slow]
    ends = {times: [trial.loss(config) for trial in trials] for times, trials in quick.items()}
    rows = [(f"{len(slow)} seeds", "steps", "validation loss: mean (lowest to highest)", "below gpt2, no overlap")]
    rows.append(("gpt2", config.steps, spread(target), ""))
    for times, losses in ends.items():
        below = "yes" if max(losses) < min(target) else "no"
        rows.append((f"fast, {times} times fewer", quick[times][0].steps, spread(losses), below))
    text += table(*rows)
    if all(map(math.isfinite, chain(target, *ends.values()))):
        of_mean, sign = times_fewer(statistics.mean(target), {t: statistics.mean(v) for t, v in ends.items()})
        each = [times_fewer(one, {t: v[i] for t, v in ends.items()})[0] for i, one in enumerate(target)]
        seeds = f"seeds: {min(each):.2f} to {max(each):.2f}"
        text += ["", f"gpt2's loss from **{sign}{of_mean:.2f}x fewer tokens** ({seeds})."]
    if clock_path(size, config).exists():
        ours = json.loads(clock_path(size, config).read_text())
        text.append(f"A step takes {ours[0]:.3f} s with gpt2, {ours[1]:.3f} s with fast: {ours[1] / ours[0]:.3f}.")
        if all(map(math.isfinite, chain(target, *ends.values()))):
            draw(size, config, slow, list(chain(*quick.values())), ours)
    return [*text, ""]


def draw(size: str, config: Config, slow: list[Trial], quick: list[Trial], seconds: list[float]) -> None:
    """OUT/curves_SIZE.png: validation loss of whole runs, against tokens and against seconds of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    millions = train_gpt2.Config(**SIZES[size][0]).total_batch_size / 1e6
    most, least = (pick(trial.loss(config) for trial in slow + quick) for pick in (max, min))
    scales = ([millions, millions], seconds)
    panels = zip(figure.subplots(1, 2, sharey=True), ("million tokens", "seconds of training"), scales)
    for axes, name, units in panels:
        for color, unit, trials in (("tab:gray", units[0], slow), ("tab:red", units[1], quick)):
            for i, trial in enumerate(trials):
                losses, label = trial.losses(config), None if i else f"--recipe {trial.arm}"
                axes.plot([step * unit for step in losses], list(losses.values()), color=color, lw=0.8, label=label)
            for trial in trials:  # where it ended
                axes.plot(trial.steps * unit, trial.loss(config), ".", color=color, ms=5)
        axes.set(xlabel=name, ylim=(0.95 * least, 1.3 * most))
    figure.axes[0].set_ylabel("validation loss, nats a token")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"{size}: whole runs of several lengths, {config.seeds} seeds of each", fontsize="medium")
    for path in [Path(config.out) / f"curves_{size}.png", *([Path(config.picture)] if config.picture else [])]:
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix[1:] or "png", dpi=100)


def tell(config: Config) -> None:
    """Write and print the report, and draw what is whole."""
    text = "\n".join(chain(*(report(size, config) for size in config.sizes)))
    with atomic_file(Path(config.out) / "report.md") as file:
        file.write(text.encode())
    print(text, flush=True)


def main(config: Config) -> None:
    unknown = [size for size in config.sizes if size not in SIZES]
    if unknown:
        raise UserError(f"--sizes {unknown[0]} is none of {', '.join(SIZES)}")
    os.makedirs(config.out, exist_ok=True)
    if not config.data_dir and not config.report:
        config.data_dir = str(Path(config.out) / "data")
        line = [os.path.join(sys.path[0], "fineweb.py"), "--dataset", "python-docs", "--tokenizer", "bytes"]
        subprocess.run([sys.executable, *line, "--out", config.data_dir], check=True)
    for size in config.sizes:
        carry_out_all(chain(*grids(size, config)), config)
        rates = tuned(size, config)
        if rates:  # there are none yet if this is to be a report only
            slow, quick = lengths(size, config, *rates)
            carry_out_all(chain(slow, *quick.values()), config)
            step_seconds(size, config, *rates)
        tell(config)


if __name__ == "__main__":
    run(main, Config, __doc__)
