"""
What could be added to --recipe fast: one lever at a time on top of it, all arms alike in steps, tokens and seeds.

    python fineweb.py --input 'texts/*.parquet' --tokenizer bytes --out data/texts
    python bench/recipe/levers.py --rates 0.007 0.014 0.028 --arms fast    # tune fast itself
    python bench/recipe/levers.py --seeds 1 2 3 --arms fast soap           # at --rates 0.014
    python bench/recipe/levers.py --seeds 1 2 3 --report                   # what is there of these; trains nothing

A lever is either a setting or a change of train_gpt2.py and extras/muon.py within this process: nothing of it is in the
product unless it wins. Every trial also evaluates two averages of its weights: of the last tenth of its steps, and an
exponential one over as many. Trials are run directories, as in study.py; those that are done are not done again.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # as in the other benchmarks

import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

import extras.muon
import train_gpt2
from bench.recipe.study import SIZES, Trial, fast, spread, table
from extras.cli import UserError, run
from extras.files import atomic_file
from extras.muon import Muon, lay, orthogonalize

SHARE = 0.1  # of a run's steps: what is averaged, and how long the momentum warms up


@dataclass
class Config:
    data_dir: str = "data/texts"  # token shards
    out: str = "log/levers"  # run directories and report.md go here
    size: str = "3M"  # of study.py's
    batch: int = 2048  # tokens a step
    steps: int = 150  # of every arm
    rates: tuple[float, ...] = (0.014,)  # Muon's; the others' keeps fast's ratio to it
    seeds: tuple[int, ...] = (1,)
    arms: tuple[str, ...] = ()  # of the names below; empty = all
    device: str = "cpu"
    report: bool = False  # only report what is there


# ----------------------------------------------------------------------------------------------------------------------
# Levers of Muon

class Apart(Muon):
    """Muon with its update taken apart, so that a lever can change a part. On one device; it skips no update."""

    def _step_stack(self, group, skip):
        parameters, momentum, rate = group["params"], group["momentum"], group["lr"] * group["lr_ratio"]
        grad = torch.stack(lay([p.grad for p in parameters], group["parts"]))  # (k, m, n)
        tall = [p.shape[0] // group["parts"] > p.shape[1] for p in parameters for _ in range(group["parts"])]
        for parameter in parameters:
            parameter.grad = None
        state = self.state[parameters[0]]
        if not state:
            state.update(step=grad.new_zeros(()), momentum=torch.zeros_like(grad))
        state["momentum"].lerp_(grad, 1 - momentum)
        state["step"] += 1
        ahead = self.before(state, grad, grad.lerp(state["momentum"], momentum))
        update = self.after(state, orthogonalize(ahead, self.dtype), tall)
        for weight, one in zip(lay(parameters, group["parts"]), update):
            self.decay(weight, one, rate * group["weight_decay"])
            weight.add_(one, alpha=-0.2 * math.sqrt(max(one.shape)) * rate)

    def before(self, state: dict, grad: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """(k, m, n) gradient and momentum -> what is orthogonalized."""
        return ahead

    def after(self, state: dict, update: torch.Tensor, tall: list[bool]) -> torch.Tensor:
        """(k, m, n) orthogonal -> the update. tall: whether a matrix was laid on its side."""
        return update

    def decay(self, weight: torch.Tensor, update: torch.Tensor, decay: float) -> None:
        weight.mul_(1 - decay)


class Cautious(Apart):
    """Decay only where it goes the way of the update (Chen et al. 2025)."""

    def decay(self, weight, update, decay):
        weight.sub_(weight * (weight * update > 0), alpha=decay)


class NorMuon(Apart):
    """Each neuron's row divided by the running RMS of its updates; the whole keeps its norm (Li et al. 2025)."""

    def after(self, state, update, tall, beta=0.95):
        update = update.float()
        squares = update.square()
        rows = torch.where(
            torch.tensor(tall)[:, None, None],
            squares.mean(1, keepdim=True).expand_as(update),
            squares.mean(2, keepdim=True).expand_as(update),
        )
        running = state.setdefault("squares", torch.zeros_like(rows)).lerp_(rows, 1 - beta)
        scaled = update / (running.sqrt() + 1e-8)
        return scaled * (torch.linalg.matrix_norm(update) / torch.linalg.matrix_norm(scaled))[:, None, None]


class Soap(Apart):
    """Adam's division in the eigenbasis of the gradients' covariance (Vyas et al. 2024), of the short side; then Muon.

    The basis is renewed every `every` steps.
    """

    def before(self, state, grad, ahead, beta=0.95, every=5):
        if "covariance" not in state:
            state.update(covariance=grad @ grad.mT, squares=torch.zeros_like(grad))
        step = int(state["step"])
        state["covariance"].lerp_(grad @ grad.mT, 1 - beta)
        if (step - 1) % every == 0:
            state["basis"] = torch.linalg.eigh(state["covariance"])[1]  # (k, m, m)
        basis = state["basis"]
        squares = state["squares"].lerp_((basis.mT @ grad).square(), 1 - beta) / (1 - beta**step)
        return basis @ ((basis.mT @ ahead) / (squares.sqrt() + 1e-12))


class AdamFirst(Apart):
    """As Soap, in the basis that is there: the momentum divided by the running RMS of the gradient, then Muon."""

    def before(self, state, grad, ahead, beta=0.95):
        squares = state.setdefault("squares", torch.zeros_like(grad)).lerp_(grad.square(), 1 - beta)
        return ahead / ((squares / (1 - beta ** int(state["step"]))).sqrt() + 1e-12)


def optimizer(kind: type[Muon]):
    return patch.object(extras.muon, "Muon", kind)


# ----------------------------------------------------------------------------------------------------------------------
# Levers of the loop

def held(share: float, end: float = 0.0):
    """The rate stays at its peak until `share` of the steps, then falls linearly to `end` times the peak."""
    def lr_at(step, config):
        warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
        left = min(1.0, (config.max_steps - step) / ((1 - share) * config.max_steps))
        return config.max_lr * min(warm, end + (1 - end) * left)

    return patch.object(train_gpt2, "lr_at", lr_at)


def each_step(change: Callable[[dict, float], None]):
    """`change` Muon's groups before every step, given the part of the run that is done."""
    train_step, done = train_gpt2.train_step, [0]

    def changed(run, batch, lr):
        for group in run.optimizer.param_groups:
            if "parts" in group:
                change(group, done[0] / run.config.max_steps)
        done[0] += 1
        return train_step(run, batch, lr)

    return patch.object(train_gpt2, "train_step", changed)


def decays(amount: float):
    """Weight decay of Muon's matrices alone."""
    return each_step(lambda group, done: group.update(weight_decay=amount))


def momentum_warmup(start: float = 0.85, end: float = 0.95):
    return each_step(lambda group, done: group.update(momentum=start + (end - start) * min(1.0, done / SHARE)))


def growing_batch():
    """Half the batch for the first half of the steps, one and a half for the second: as many steps, as many tokens."""
    def batch(self, step):
        count, half = self.samples_a_step, self.config.max_steps // 2
        first = step * count // 2 if step < half else half * count // 2 + (step - half) * 3 * count // 2
        now = count // 2 if step < half else 3 * count // 2
        return train_gpt2.batch_of_step(self.train, self.origin + first, now, self.micro_batch, self.ranks)

    return patch.object(train_gpt2.Run, "batch", batch)


@contextlib.contextmanager
def both(*changes):
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


LEVERS = {  # name -> settings, and a change for as long as a trial takes
    "fast": ({}, nullcontext),
    "apart": ({}, lambda: optimizer(Apart)),  # must end where fast ends: nothing is changed
    "hold": ({}, lambda: held(0.3)),  # the rate is held for 30%
    "hold, average": ({}, lambda: held(0.3, 0.2)),  # down to a fifth: the average is to do the rest
    "decay x3.5": ({}, lambda: decays(0.35)),  # at fast's own rate 1.25e-3 instead of 3.6e-4 a step; at 0.014, 4.9e-3
    "decay x25": ({}, lambda: decays(2.5)),  # as much over so short a run as over a real one
    "no clipping": ({"grad_clip": 0.0}, nullcontext),
    "cautious decay": ({}, lambda: optimizer(Cautious)),
    "cautious decay x25": ({}, lambda: both(optimizer(Cautious), decays(2.5))),
    "momentum warm-up": ({}, momentum_warmup),
    "momentum 0.9": ({"muon_momentum": 0.9}, nullcontext),  # what the warm-up must beat
    "growing batch": ({"micro_batch": 8}, growing_batch),
    "normuon": ({}, lambda: optimizer(NorMuon)),
    "soap": ({}, lambda: optimizer(Soap)),
    "adam first": ({}, lambda: optimizer(AdamFirst)),  # what the basis must beat
}


# ----------------------------------------------------------------------------------------------------------------------
# Averages of the weights

@contextlib.contextmanager
def averages():
    """While a trial runs: every validation also shows the loss of both averages, `latest` and `ema`."""
    train_step, validate, kept = train_gpt2.train_step, train_gpt2.validate, {}

    def weights(run):
        return [p.detach() for p in run.raw_model.parameters()]

    def averaged_step(run, batch, lr):
        result, steps = train_step(run, batch, lr), run.config.max_steps
        span = max(2, round(SHARE * steps))
        kept["step"] = kept.get("step", 0) + 1
        now = weights(run)
        if "ema" not in kept:
            kept["ema"] = [w.clone() for w in now]
        torch._foreach_lerp_(kept["ema"], now, 1 / min(kept["step"], span / 2))
        if (number := kept["step"] - (steps - span)) == 1:
            kept["latest"] = [w.clone() for w in now]
        elif number > 1:
            torch._foreach_lerp_(kept["latest"], now, 1 / number)
        return result

    def validate_all(run, stop):
        values, raw = validate(run, stop), [w.clone() for w in weights(run)]
        for name in kept.keys() & {"ema", "latest"}:
            torch._foreach_copy_(weights(run), kept[name])
            values[name] = validate(run, stop)["val"]
        torch._foreach_copy_(weights(run), raw)
        return values

    with (
        patch.object(train_gpt2, "train_step", averaged_step),
        patch.dict(train_gpt2.EVALUATIONS, val=("val_every", validate_all)),
    ):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Trials

def trial(arm: str, rate: float, seed: int, config: Config) -> Trial:
    settings, _ = LEVERS[arm]
    common = {"total_batch_size": config.batch, "val_every": 10**6, "val_tokens": 32768, "save_every": 0}
    knobs = dict(fast(config.size, config.steps, rate).knobs) | common | settings
    return Trial(config.size, arm.replace(" ", "_"), config.steps, tuple(knobs.items()), seed)


def ends(one: Trial, config: Config) -> dict[str, float]:
    """Last loss of each stream; {} if the trial is not done."""
    if not one.losses(config):
        return {}
    lines = (one.log_dir(config) / "log.txt").read_text(encoding="utf-8").splitlines()
    done = next(line for line in reversed(lines) if line.startswith("# done "))
    return json.loads(done.removeprefix("# done "))


def carry_out(arm: str, one: Trial, config: Config) -> None:
    """Train, unless it was done. A trial that was killed begins anew: a checkpoint does not hold a lever's state."""
    if one.losses(config):
        return
    shutil.rmtree(one.log_dir(config), ignore_errors=True)
    began = time.process_time()
    with averages(), LEVERS[arm][1](), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train_gpt2.main(train_gpt2.Config(**one.settings(config)))
    for path in one.log_dir(config).glob("*.pt"):
        path.unlink()
    values = {name: round(value, 4) for name, value in ends(one, config).items() if name in ("val", "latest", "ema")}
    print(f"{one.log_dir(config)}: {values} in {time.process_time() - began:.0f} CPU s", flush=True)


def report(config: Config) -> str:
    """Markdown: losses of every arm that is there, and how far each seed is from fast's, at fast's best rate."""
    rates = sorted(config.rates)
    at = {rate: ends(trial("fast", rate, 1, config), config).get("val", math.inf) for rate in rates}
    best = min(at, key=at.get)
    base = {seed: ends(trial("fast", best, seed, config), config).get("val") for seed in config.seeds}
    rows = [("arm", "muon_lr", "seeds", "validation loss: mean (lowest to highest)", "minus fast, seed by seed")]
    for arm, rate, stream in product(LEVERS, rates, ("val", "latest", "ema")):
        losses = {seed: ends(trial(arm, rate, seed, config), config).get(stream) for seed in config.seeds}
        losses = {seed: loss for seed, loss in losses.items() if loss is not None and base[seed] is not None}
        if losses:
            differences = [loss - base[seed] for seed, loss in losses.items()]
            each = ", ".join(f"{d:+.4f}" for d in differences)
            name = arm if stream == "val" else f"{arm}, {stream}"
            cells = (name, f"{rate:g}", len(losses), spread(list(losses.values())), each)
            rows.append((*cells, f"{statistics.mean(differences):+.4f}"))
    rows[0] += ("mean",)
    head = f"## {config.size}: {config.steps} steps of {config.batch:,} tokens, fast's best muon_lr {best:g}"
    return "\n".join([head, *table(*rows), ""])


def main(config: Config) -> None:
    unknown = [arm for arm in config.arms if arm not in LEVERS]
    if unknown:
        raise UserError(f"--arms {unknown[0]} is none of {', '.join(LEVERS)}")
    if config.size not in SIZES:
        raise UserError(f"--size {config.size} is none of {', '.join(SIZES)}")
    torch.set_num_threads(1)
    if not config.report:
        for seed, rate, arm in product(config.seeds, config.rates, config.arms or LEVERS):
            carry_out(arm, trial(arm, rate, seed, config), config)
    text = report(config)
    os.makedirs(config.out, exist_ok=True)
    with atomic_file(Path(config.out) / f"report_{config.size}.md") as file:
        file.write(text.encode())
    print(text, flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
