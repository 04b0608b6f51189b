"""
Plot runs: log files in, a picture and a table out.

    python plot_log.py log/                                    # writes log/curves.png
    python plot_log.py log/a log/b log/c --out compare.svg     # several runs over one another
    python plot_log.py log/ --x hours --watch                  # redraw a live run every few seconds
    python plot_log.py --model log/ckpt_019073.pt              # what is inside a checkpoint

A log is lines of `step stream value`, of which the last value of a step wins, and lines that begin with `#`: the run's
config, its data and its restarts, each a word and a JSON object. build-nanogpt's log files, which have no `#` lines,
are read as they are. Nothing but files is read: neither the trainer nor a GPU is needed.

Contents: Config · Logs · Summary · Picture · Panels · Inside a checkpoint · Commands
"""

import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from extras import reference
from extras.cli import UserError, run
from extras.files import atomic_file
from extras.reference import GPT2_HELLASWAG, GPT2_LOSS, GPT3_HELLASWAG, REFERENCE_CURVE, TOKENS_PER_STEP, reference_loss


@dataclass
class Config:
    """All settings; each is a flag of the same name, and the run directories stand without one."""

    run_dirs: tyro.conf.Positional[list[str]] = field(default_factory=lambda: ["log"])  # run directories, or log files
    out: str = ""  # where to, .png, .svg or .pdf; curves.png beside the first log if not given
    x: Literal["steps", "tokens", "hours"] = "steps"  # horizontal axis; hours are of training, without evaluations
    watch: bool = False  # redraw whenever a log has grown, until every run is done or Ctrl-C
    model: str = ""  # draw a model instead, of whatever sample.py reads: position embeddings and attention
    prompt: str = "The cat that the dogs chased was tired because it had been running all day"
    """text whose attention is drawn"""


FORMATS = (".png", ".svg", ".pdf")
WATCH_SECONDS = 3
HELLASWAG_EXAMPLES = 10_042
LARGEST = 1e30  # of a value: a larger one is treated as infinite, for matplotlib's arithmetic would overflow


# ----------------------------------------------------------------------------------------------------------------------
# Logs


@dataclass
class Run:
    """What one log file says. streams[name] is (steps, values), steps ascending; a value that can't be drawn is NaN."""

    name: str
    path: Path
    streams: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    comments: dict[str, dict] = field(default_factory=dict)  # the last of each kind: config, model, data, done, ...
    restarts: list[int] = field(default_factory=list)
    unreadable: int = 0  # lines that are neither values nor comments

    def __getitem__(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a stream, NaNs included; empty arrays if the log has none of it."""
        return self.streams.get(stream, (np.empty(0), np.empty(0)))

    def finite(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        steps, values = self[stream]
        return steps[np.isfinite(values)], values[np.isfinite(values)]

    @property
    def config(self) -> dict:
        return self.comments.get("config", {})

    def number(self, setting: str) -> float:
        """A setting that is a positive number; 0 if the log doesn't have it or has something else."""
        value = self.config.get(setting)
        return value if type(value) in (int, float) and 0 < value < 1e15 else 0

    @property
    def tokens_per_step(self) -> int:
        return int(self.number("total_batch_size")) or TOKENS_PER_STEP

    @property
    def last_step(self) -> int:
        return int(max((steps[-1] for steps, _ in self.streams.values()), default=0))


def find_logs(run_dirs: list[str]) -> list[tuple[str, Path]]:
    """(name, log file) of each run directory or log file, named by as much of the path as tells them apart."""
    paths = [Path(run_dir) for run_dir in run_dirs]
    paths = [path if os.path.isfile(path) or path.suffix in (".txt", ".log") else path / "log.txt" for path in paths]
    full = [(path.parent if path.name == "log.txt" else path.with_suffix("")).absolute().parts for path in paths]
    depth = 1
    while depth < max(map(len, full), default=1) and len({parts[-depth:] for parts in full}) < len(set(full)):
        depth += 1
    return [("/".join(parts[-depth:]), path) for parts, path in zip(full, paths)]


def read_log(path: Path, name: str) -> Run:
    """Read a log that may be live, resumed, torn by a crash, edited, or build-nanogpt's. Other lines are counted.

    The last value of a step wins. `# restart {"step": n}` takes back what stood after step n, to be done again.
    """
    if not os.path.isfile(path):
        nearby = sorted(str(log.parent) for log in path.parent.glob("*/log.txt")) if os.path.isdir(path.parent) else []
        hint = f"there is one in {', '.join(nearby[:5])}" if nearby else "give the --log_dir of a run, or a log file"
        raise UserError(f"no log file {str(path)!r}; {hint}")
    run, values = Run(name, path), {}  # values: stream -> step -> value
    # A last line without its newline is still being written: "3.2" may become "3.2516", so it doesn't count.
    try:
        text, _, _ = path.read_bytes().decode("utf-8-sig", errors="replace").rpartition("\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; give another log") from error
    for line in text.split("\n"):
        data, hash_sign, comment = line.partition("#")
        if hash_sign:
            kind, payload = parse_comment(comment)
            if kind == "restart" and type(step := payload.get("step")) is int and 0 <= step < 10**12:
                run.restarts.append(step)
                run.comments.pop("done", None)
                values = {stream: {s: v for s, v in of.items() if s <= step} for stream, of in values.items()}
            elif kind == "restart":
                run.unreadable += 1
            elif kind:
                run.comments[kind] = payload
            data = ""  # a line that a crash cut short has no newline, so the comment of the restart follows on it
        if match := LINE.fullmatch(data):
            value = float(match[3])
            values.setdefault(match[2], {})[int(match[1])] = value if abs(value) <= LARGEST else math.nan
        elif data.strip():
            run.unreadable += 1
    for stream, of in values.items():
        if of:
            steps = np.array(sorted(of))
            run.streams[stream] = steps, np.array([of[step] for step in steps.tolist()])
    return run


NUMBER = r"[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|inf|nan)"
LINE = re.compile(rf"\s*(\d{{1,12}})\s+([A-Za-z_]\w*)\s+({NUMBER})\s*", re.ASCII)  # step stream value


def parse_comment(text: str) -> tuple[str, dict]:
    """` config {"a": 1}` -> ("config", {"a": 1}); ("", {}) for a comment of another form."""
    kind, _, payload = text.strip().partition(" ")
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return "", {}
    return (kind, value) if isinstance(value, dict) else ("", {})


def positions(of: Run, steps: np.ndarray, axis: str) -> np.ndarray:
    """Where `steps` stand on the horizontal axis: steps, tokens, hours or minutes of training before that step."""
    if axis == "steps":
        return steps
    if axis == "tokens":
        return steps * float(of.tokens_per_step)
    timed, ms = of.finite("ms")
    hours = np.cumsum(np.diff(timed, prepend=-1) * ms) / 3.6e6  # a step without its own time took as long as the next
    return np.interp(steps, [0, *(timed + 1)], [0, *hours]) * (60 if axis == "minutes" else 1)


# ----------------------------------------------------------------------------------------------------------------------
# Summary


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of up to `half_window` neighbours on either side, NaNs left out; (n,) -> (n,).

    At the start the window is kept symmetrical, so that the steep fall there is not smeared; at the end it reaches back
    only, so that the last point is a mean too.
    """
    i, known = np.arange(len(values)), np.isfinite(values)
    back = np.minimum(half_window(values), i)
    lo, hi = i - back, np.minimum(i + back, len(values) - 1) + 1
    sums, counts = (np.append(0, np.cumsum(x)) for x in (np.where(known, values, 0), known))
    return np.where(known, (sums[hi] - sums[lo]) / np.maximum(counts[hi] - counts[lo], 1), math.nan)


def rolling_median(values: np.ndarray) -> np.ndarray:
    """As `smooth`, for streams whose spikes say nothing of their level; at 1,000 places, joined; (n,) -> (n,)."""
    half = half_window(values)
    places = np.unique(np.linspace(0, max(len(values) - 1, 0), min(len(values), 1_000)).astype(int))
    medians = [np.median(values[max(0, at - half) : at + half + 1]) for at in places]
    return np.interp(np.arange(len(values)), places, medians)


def half_window(values: np.ndarray) -> int:
    return max(2, len(values) // 100)


def standard_errors(of: Run) -> np.ndarray:
    """Of each finite HellaSwag accuracy: as the log says, else that of a share of all examples, or of --hella_limit."""
    steps, accuracy = of.finite("hella")
    logged = dict(zip(*map(np.ndarray.tolist, of.finite("hella_se"))))
    p = np.clip(accuracy, 0, 1)
    binomial = np.sqrt(p * (1 - p) / (of.number("hella_limit") or HELLASWAG_EXAMPLES))
    return np.abs([logged.get(step, se) for step, se in zip(steps.tolist(), binomial)])


def tokens_per_second(of: Run, ms: np.ndarray) -> np.ndarray:
    return of.tokens_per_step / (np.maximum(ms, 1e-6) / 1000)


def source_name(of: Run) -> str:
    """Of the text: a data set, or the first of the user's own files and how many more; "" if the log doesn't say."""
    source = of.comments.get("data", {}).get("source") or ""
    if not isinstance(source, dict):
        return str(source)
    files = source.get("files") if isinstance(source.get("files"), list) else []
    names = [str(file[0] if isinstance(file, list) and file else file) for file in files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return str(source.get("dataset") or (f"file {names[0]}{more}" if names else ""))


def on_fineweb_edu(of: Run) -> bool:
    """Is the validation loss comparable with GPT-2's? A log without configuration is build-nanogpt's: yes."""
    data = of.comments.get("data", {})
    return "config" not in of.comments or reference.on_fineweb_edu(data.get("source"), data.get("tokenizer"))


def follows_recipe(of: Run) -> bool:
    """Is the run the one that REFERENCE_CURVE belongs to?"""
    return on_fineweb_edu(of) and reference.follows_recipe({**of.config, **of.comments.get("model", {})})


def short(number: float) -> str:
    """524288 -> "524k", 9.96e9 -> "9.96B": three digits at most."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            digits = 2 if abs(number) < 9.995 * size else 1 if abs(number) < 99.95 * size else 0
            text = f"{number / size:.{digits}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + unit
    return f"{number:.3g}"


def summary(of: Run) -> dict[str, str]:
    """One row of the table, column -> text; a column it has nothing for is "-"."""
    steps = f" of {of.number('max_steps'):,}" if of.number("max_steps") else ""
    row = {"run": of.name, "step": f"{of.last_step:,}{steps}", "tokens": short(of.last_step * of.tokens_per_step)}
    row |= dict.fromkeys(("train", "val", "best val", "bpb", "HellaSwag", "tokens/s", "time"), "-")
    last = {stream: of.finite(stream)[1][-1] for stream in of.streams if len(of.finite(stream)[1])}
    if "train" in last:
        row["train"] = f"{smooth(of.finite('train')[1])[-1]:.4f}"
    if "val" in last:
        steps, val = of.finite("val")
        row |= {"val": f"{last['val']:.4f}", "best val": f"{val.min():.4f} at {steps[val.argmin()]:,}"}
    if "bpb" in last:
        row["bpb"] = f"{last['bpb']:.4f}"
    if "hella" in last:
        row["HellaSwag"] = f"{last['hella']:.4f} +- {standard_errors(of)[-1]:.4f}"
    if "ms" in last:
        steps, ms = of.finite("ms")
        minutes = positions(of, steps[-1:] + 1, "minutes")[0]
        row["tokens/s"] = short(tokens_per_second(of, np.median(ms)))
        row["time"] = f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.1f} min"
    return row


def remarks(of: Run) -> list[str]:
    """What the table doesn't say: assumptions, restarts, and what could not be drawn."""
    found = []
    if not of.number("total_batch_size"):
        found.append(f"its config line gives no batch size, so {TOKENS_PER_STEP:,} tokens a step are assumed")
    if of.restarts:
        found.append(f"resumed at step {', '.join(f'{step:,}' for step in of.restarts)}")
    for stream, (steps, values) in of.streams.items():
        bad = ~np.isfinite(values)
        if bad.any():
            where = f"{bad.sum():,} steps, first at {steps[bad.argmax()]:,}"
            found.append(f"{stream} is NaN, infinite or over 1e30 at {where}")
    if of.unreadable:
        found.append(f"{of.unreadable:,} unreadable lines left out")
    return [f"{of.name}: {remark}" for remark in found]


def table(runs: list[Run]) -> str:
    """A row a run, the columns that any has something for, then the remarks."""
    rows = [summary(of) for of in runs]
    columns = [[name, *(row[name] for row in rows)] for name in rows[0] if any(row[name] != "-" for row in rows)]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in zip(*columns)]
    return "\n".join([*lines, *(remark for of in runs for remark in remarks(of))])


# ----------------------------------------------------------------------------------------------------------------------
# Picture

WIDTH = 9.0  # inches, at DPI dots: 1800 pixels, shown at 900 in a README
DPI = 200
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.titlepad": 7, "axes.titleweight": "bold", "text.color": INK, "axes.titlecolor": INK,
    "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": PALE,
    "grid.linewidth": 0.7, "xtick.color": GREY, "ytick.color": GREY, "xtick.major.size": 3, "ytick.major.size": 0,
    "axes.labelcolor": GREY, "axes.labelsize": 8.5, "legend.frameon": False, "legend.fontsize": 8.5,
    "legend.handlelength": 1.8, "legend.borderpad": 0, "legend.borderaxespad": 0, "svg.hashsalt": "plot_log",
    "text.parse_math": False,  # a $ in a name is a $
}


class Look(NamedTuple):
    """How a run is drawn. `name` is "" where there is only one: the lines are then called by what they show."""

    name: str
    color: str
    marks: str  # color of its evaluations
    dashes: str


def looks(runs: list[Run]) -> list[Look]:
    """A color a run, and evaluations in another if there is only one run; dashes tell more than seven apart."""
    if len(runs) == 1:
        return [Look("", COLORS[0], COLORS[1], "-")]
    names = [shortened(of.name, 40) for of in runs]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides names like _run
    dashes = ("-", "--", ":", "-.")
    return [Look(name, COLORS[i % 7], COLORS[i % 7], dashes[i // 7 % 4]) for i, name in enumerate(names)]


def draw_runs(runs: list[Run], axis: str):
    """A matplotlib Figure: the losses across the top, below them a panel for each other stream that any run has."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [draw for stream, draw in PANELS.items() if any(len(of.finite(stream)[0]) for of in runs)]
    rows = [1, *{0: [], 1: [1], 2: [2], 3: [1, 2] if draw_hella in panels else [3], 4: [2, 2]}[len(panels)]]
    if axis == "hours" and span(runs, axis) < 2:
        axis = "minutes"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 20), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), 6, height_ratios=[1.75] + [1] * (len(rows) - 1))
        axes = [figure.add_subplot(grid[row, i * 6 // count : (i + 1) * 6 // count])
                for row, count in enumerate(rows) for i in range(count)]
        styled = list(zip(runs, looks(runs)))
        for ax, draw in zip(axes, [draw_loss, *panels]):
            draw(ax, styled, axis)
        right = span(runs, axis) or 1
        for ax, count in zip(axes, [across for across in rows for _ in range(across)]):
            ax.set_xlim(-0.005 * right, 1.005 * right)
            format_x(ax, axis, ticks={1: 8, 2: 5, 3: 4}[count])
        for ax in axes[-rows[-1] :]:
            ax.set_xlabel(axis if axis in ("steps", "tokens") else f"{axis} of training")
        header = add_header(figure, runs, axes)
        height = header + 3.1 + 1.85 * (len(rows) - 1)
        figure.set_size_inches(WIDTH, height)
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - header / height), w_pad=0.1, h_pad=0.08, wspace=0.02)
    return figure


def span(runs: list[Run], axis: str) -> float:
    return float(max(positions(of, np.array([of.last_step]), axis)[0] for of in runs))


def format_x(ax, axis: str, ticks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=axis == "steps"))
    ax.xaxis.set_major_formatter({"steps": lambda x, _: f"{x:,.0f}", "tokens": lambda x, _: short(x)}.get(
        axis, lambda x, _: f"{x:g}"))


def add_header(figure, runs: list[Run], axes) -> float:
    """Title, the line under it and the one legend, which has as many columns as fit; returns their height in inches."""
    from_top = write_title(figure, runs[0].name if len(runs) == 1 else f"{len(runs)} runs", describe(runs))
    handles, names = {}, {look.name for look in looks(runs)}
    for ax in axes:
        handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels())} | handles
    handles = dict(sorted(handles.items(), key=lambda item: item[0] not in names))  # the runs before all else
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles.values(), handles, ncols=columns, loc="upper left", columnspacing=1.6,
                               bbox_to_anchor=(0.15, -0.68), bbox_transform=from_top)
        legend.set_in_layout(False)
        extent = legend.get_window_extent()
        if columns == 1 or extent.width / DPI <= WIDTH - 0.3:
            return 0.68 + extent.height / DPI + 0.14
        legend.remove()


def write_title(figure, title: str, subtitle: str):
    """Two lines at the top; returns the transform from inches right and up of the top left corner."""
    from matplotlib.transforms import ScaledTranslation

    from_top = figure.dpi_scale_trans + ScaledTranslation(0, 1, figure.transFigure)
    place = {"transform": from_top, "in_layout": False}
    figure.text(0.15, -0.32, shortened(title, 60), fontsize=13, fontweight="bold", **place)
    figure.text(0.15, -0.54, subtitle, color=GREY, **place)
    return from_top


def describe(runs: list[Run]) -> str:
    """The line under the title: what all runs share of model, data and batch; and how far a single one is."""
    facts = []
    for of in runs:
        model = {"n_layer": 0, "n_head": 0, "n_embd": 0, **of.config, **of.comments.get("model", {})}
        sizes = "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**model)
        assumed = "" if of.number("total_batch_size") else " (assumed)"
        step = f"step {summary(of)['step']}" if len(runs) == 1 else ""
        facts.append(["" if sizes.startswith("0 ") else shortened(sizes, 60), shortened(source_name(of), 38),
                      f"{of.tokens_per_step:,} tokens a step{assumed}", step])  # fmt: skip
    shared = [values[0] for values in zip(*facts) if values[0] and len(set(values)) == 1]
    return "   ·   ".join(shared) or "models, data and batches differ"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"


def save(figure, path: Path) -> None:
    """Write the picture whole or not at all: a viewer that follows it never sees half of one."""
    import matplotlib

    kind = path.suffix[1:].lower()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)  # the same log gives the same bytes
    try:
        with atomic_file(path) as file, matplotlib.rc_context(STYLE):
            figure.savefig(file, format=kind, metadata=metadata)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}; choose another --out") from error


# ----------------------------------------------------------------------------------------------------------------------
# Panels: each takes (ax, [(run, look), ...], axis)


def draw_loss(ax, styled, axis: str) -> None:
    """Training loss, raw and smoothed, validation, what to compare with, restarts, and where it was not finite."""
    runs = [of for of, _ in styled]
    ax.set_title("Loss, nats per token")
    for of, look in styled:
        steps, train = of["train"]
        draw_trace(ax, look, positions(of, steps, axis), train, smooth(train))
        at, val = of.finite("val")
        marks = {"marker": "o", "markersize": 3.8, "markeredgewidth": 0.5, "markeredgecolor": "white"}
        # Joined only where no training curve shows the way: chords between a few points would cut its bends.
        ax.plot(positions(of, at, axis), val, color=look.marks, linestyle="none" if len(train) else look.dashes,
                zorder=4, label=None if look.name else "validation", **marks)
        if look.name and len(train):
            ax.plot([], [], color=INK, alpha=0.28, linewidth=0.7, label="each step")
        if look.name and len(val):
            ax.plot([], [], color=INK, linestyle="none", label="validation", **marks)
        bad = steps[~np.isfinite(train)]
        ax.plot(positions(of, bad, axis), np.full(len(bad), 0.97), transform=ax.get_xaxis_transform(), color=look.color,
                linestyle="none", marker="x", markersize=4, label="NaN or infinite" if len(bad) else None)
        for step in of.restarts:
            ax.axvline(positions(of, np.array([step]), axis)[0], color=look.color, linestyle=(0, (1, 2)), linewidth=1,
                       zorder=1.5, label="resumed")
    low, high, top = loss_limits(runs)
    comparable = all(map(on_fineweb_edu, runs)) and any(len(of.finite("val")[0]) for of in runs)
    if comparable and any(map(follows_recipe, runs)) and axis in ("steps", "tokens"):
        draw_reference(ax, axis, max(of.last_step for of in runs))
    if comparable and high > GPT2_LOSS:
        low = min(low, GPT2_LOSS)
        reference_line(ax, GPT2_LOSS, f"GPT-2 124M\n{GPT2_LOSS}")
    margin = max(0.06 * (high - low), 1e-3 * abs(high)) or 0.1
    ax.set_ylim(low - margin, high + margin)
    if top > high + margin:
        ax.set_title(f"from {top:.2f} at the start, above the frame", loc="right", fontsize=8.5, color=GREY,
                     fontweight="normal")


def loss_limits(runs: list[Run]) -> tuple[float, float, float]:
    """(low, high, top): the frame, and where the highest curve begins.

    A long run falls most of its way in the first hundredths of it; the frame then begins where 5% of the run are done,
    or what users look at, the last tenths of a nat, would be a flat line at the bottom.
    """
    lows, highs, tops, early = [], [], [], []
    for of in runs:
        for stream in ("train", "val"):
            steps, values = of.finite(stream)
            if not len(values):
                continue
            smoothed = smooth(values) if stream == "train" else values
            late = smoothed[steps >= 0.05 * of.last_step]
            lows.append(min(values.min() if stream == "val" else np.quantile(values, 0.002), smoothed.min()))
            tops.append(values[0])
            highs.append(values.max() if stream == "val" else max(smoothed.max(), values[0]))
            early.append(late.max() if len(late) else values.max())
    low, high = min(lows), max(early)
    return (low, high, max(tops)) if high - low < 0.5 * (max(highs) - low) else (low, max(highs), max(tops))


def draw_reference(ax, axis: str, last_step: int) -> None:
    """The published points of the recipe, and a line between them."""
    scale = TOKENS_PER_STEP if axis == "tokens" else 1
    steps = np.unique(np.linspace(0, min(max(REFERENCE_CURVE), max(last_step, 1)), 600))
    ax.plot(steps * scale, reference_loss(steps), color=INK, linestyle=(0, (4, 2)), linewidth=1, zorder=3,
            label="reference (GPT-2 124M recipe on FineWeb-Edu)")
    points = np.array([step for step in REFERENCE_CURVE if step <= last_step])
    ax.plot(points * scale, reference_loss(points), color=INK, linestyle="none", marker="D", markersize=2.6, zorder=3)


def reference_line(ax, y: float, text: str, va: str = "center") -> None:
    """A horizontal line to compare with, and its name in the margin, where no curve is."""
    ax.axhline(y, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.2)), zorder=1.5)
    ax.annotate(text, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points", va=va,
                fontsize=7.5, color=GREY, annotation_clip=False)


def draw_trace(ax, look: Look, x: np.ndarray, raw: np.ndarray, smoothed: np.ndarray) -> None:
    """A stream of every step: raw and faint, and smoothed over it. Raw is rasterized: SVGs stay small."""
    if len(x):
        ax.plot(x, raw, color=look.color, alpha=0.16 if look.name else 0.28, linewidth=0.7, zorder=2,
                label=None if look.name else "each step", rasterized=len(x) > 5_000)
        label = look.name or f"smoothed over {2 * half_window(raw) + 1} steps"
        ax.plot(x, smoothed, color=look.color, linestyle=look.dashes, linewidth=1.5, zorder=3.5, label=label,
                marker="o" if len(x) < 3 else None, markersize=3)


def draw_hella(ax, styled, axis: str) -> None:
    ax.set_title("HellaSwag acc_norm ± s.e.")
    ax.margins(y=0.12)  # or the name of the lowest line would reach down to the ticks of the axis
    runs = [of for of, _ in styled]
    for of, look in styled:
        steps, accuracy = of.finite("hella")
        ax.errorbar(positions(of, steps, axis), accuracy, yerr=standard_errors(of), color=look.marks, markersize=2.6,
                    linestyle=look.dashes, linewidth=1.2, elinewidth=0.7, capsize=1.6, capthick=0.7, marker="o")
    if all(map(on_fineweb_edu, runs)):
        reference_line(ax, GPT2_HELLASWAG, f"GPT-2 124M\n{GPT2_HELLASWAG}")
        reference_line(ax, GPT3_HELLASWAG, f"GPT-3 124M\n{GPT3_HELLASWAG}", va="bottom")
    if max(of.finite("hella")[1].max(initial=0) for of in runs) < 0.4:  # above, it's far away, and its name in the way
        reference_line(ax, 0.25, "chance 0.25")


def draw_lr(ax, styled, axis: str) -> None:
    ax.set_title("Learning rate")
    for of, look in styled:
        steps, rate = of.finite("lr")
        ax.plot(positions(of, steps, axis), rate, color=look.color, linestyle=look.dashes, linewidth=1.5,
                marker="o" if len(rate) < 3 else None, markersize=3)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.1e}".replace(".0e", "e").replace("e-0", "e-") if y else "0")


def draw_norm(ax, styled, axis: str) -> None:
    """Gradient norm before clipping; the first steps' spikes are let out of the frame."""
    ax.set_title("Gradient norm")
    high = draw_spiky(ax, styled, axis, "norm", lambda of, norm: norm)
    clips = {of.number("grad_clip") for of, _ in styled} - {0}
    if len(clips) == 1 and min(clips) < 3 * high:
        high = max(high, *clips)
        reference_line(ax, min(clips), f"clipped\nto {min(clips):g}")
    ax.set_ylim(0, 1.12 * high or 1)


def draw_throughput(ax, styled, axis: str) -> None:
    ax.set_title("Tokens per second")
    ax.set_ylim(0, 1.15 * draw_spiky(ax, styled, axis, "ms", tokens_per_second) or 1)
    ax.yaxis.set_major_formatter(lambda y, _: short(y))


def draw_spiky(ax, styled, axis: str, stream: str, convert: Callable) -> float:
    """A stream with a rolling median over it; returns the 99th percentile, so that spikes don't set the frame."""
    tops = []
    for of, look in styled:
        steps, values = of.finite(stream)
        if len(values):
            values = convert(of, values)
            draw_trace(ax, look, positions(of, steps, axis), values, rolling_median(values))
            tops.append(np.quantile(values, 0.99))
    return float(max(tops))


PANELS: dict[str, Callable] = {"hella": draw_hella, "lr": draw_lr, "norm": draw_norm, "ms": draw_throughput}


# ----------------------------------------------------------------------------------------------------------------------
# Inside a checkpoint: L layers, nh heads, T positions

MAX_PROMPT = 32  # tokens: more can't be labelled legibly
MAX_LAYERS = 12  # more are thinned out evenly


def attention_maps(shape: dict, state: dict, ids: list[int]) -> np.ndarray:
    """Attention probabilities of a prompt, (L, nh, T, T): row = the position that looks, column = where."""
    import torch

    from extras.pretrained import to_transformers

    model = to_transformers(shape, state)
    model.set_attn_implementation("eager")  # fused attention never shows these numbers
    with torch.no_grad():
        return torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).numpy()


def tokenize_prompt(prompt: str, n_tokens: int, block_size: int) -> tuple[list[int], list[str]]:
    """Ids and their spelling, cut to what the model can see."""
    from extras.tokenizer import encode_prompt, load_tokenizer, printable, tokenizer_name

    name = tokenizer_name(n_tokens)
    if name is None:
        raise UserError(f"the model has {n_tokens} tokens, and it is not known which; a prompt needs GPT-2's or bytes")
    tokenizer = load_tokenizer(name)
    ids = encode_prompt(tokenizer, prompt)[0][: min(block_size, MAX_PROMPT)]
    return ids, [printable(tokenizer.decode([i])).replace("\n", "\\n") for i in ids]


def draw_model(shape: dict, state: dict, title: str, prompt: str):
    """A Figure of a model: position embeddings' similarity, attention on average, and that of every head."""
    import matplotlib
    from matplotlib.figure import Figure

    ids, words = tokenize_prompt(prompt, shape["n_tokens"], shape["block_size"])
    maps = attention_maps(shape, state, ids)
    layers = np.unique(np.linspace(0, len(maps) - 1, min(len(maps), MAX_LAYERS)).round().astype(int))
    cell = min(0.9, (WIDTH - 1.6) / maps.shape[1])
    height = 0.9 + 4.3 + 0.75 + max(cell * len(layers), 0.6)
    wpe = state["transformer.wpe.weight"].detach().float().numpy()
    unit = wpe / np.maximum(np.linalg.norm(wpe, axis=-1, keepdims=True), 1e-12)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.66 / height), w_pad=0.1, h_pad=0.08)
        write_title(figure, title, "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**shape))
        grid = figure.add_gridspec(2, 2, height_ratios=[4.3, 0.35 + max(cell * len(layers), 0.6)])
        ax = figure.add_subplot(grid[0, 0])  # an untrained model shows one bright line, a trained one bands around it
        heatmap(ax, "Position embeddings, cosine similarity", unit @ unit.T, "position", "position", bar=True)
        ax = figure.add_subplot(grid[0, 1])
        seen = np.where(np.tri(len(ids), dtype=bool), maps, math.nan)  # the future is left white
        heatmap(ax, "Attention, mean of all layers and heads", seen.mean((0, 1)), "key", "query", bar=True, gamma=0.5)
        size = min(8.5, 150 / len(words))
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=size)
        ax.set_yticks(range(len(words)), words, fontsize=size)
        draw_heads(figure.add_subplot(grid[1, :]), seen[layers], layers)
    return figure


def heatmap(ax, title: str, values: np.ndarray, xlabel: str, ylabel: str, bar=False, gamma=1.0) -> None:
    from matplotlib.colors import PowerNorm

    ax.set_title(title)
    low, shown = min(0, float(np.nanmin(values))), "nearest" if len(values) <= 512 else "auto"
    image = ax.imshow(values, cmap="cividis", norm=PowerNorm(gamma, low, 1), interpolation=shown)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if bar:
        place = {"orientation": "horizontal", "shrink": 0.7, "aspect": 40, "pad": 0.02}
        ax.get_figure().colorbar(image, ax=ax, **place).outline.set_visible(False)


def draw_heads(ax, maps: np.ndarray, layers: np.ndarray) -> None:
    """A small map for each head, a row a layer, as one image with blank seams; (L, nh, T, T)."""
    rows, heads, T, _ = maps.shape
    seam = max(1, T // 10)
    mosaic = np.pad(maps, [(0, 0), (0, 0), (0, seam), (0, seam)], constant_values=math.nan)
    mosaic = mosaic.transpose(0, 2, 1, 3).reshape(rows * (T + seam), heads * (T + seam))
    heatmap(ax, "Attention of each head", mosaic, "head", "layer", gamma=0.5)
    ax.set_xticks((T - 1) / 2 + np.arange(heads) * (T + seam), range(heads))
    ax.set_yticks((T - 1) / 2 + np.arange(rows) * (T + seam), layers)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def draw_curves(logs: list[tuple[str, Path]], axis: str, out: Path) -> list[Run]:
    """Read the logs, print the table, write the picture of those that have something to draw."""
    runs = [read_log(path, name) for name, path in logs]
    drawable = [of for of in runs if len(of.finite("train")[0]) or len(of.finite("val")[0])]
    if not drawable:
        counts = [f"{of.path} ({sum(len(steps) for steps, _ in of.streams.values()):,} values)" for of in runs]
        raise UserError(f"nothing to draw in {', '.join(counts)}: no finite value of train or val; "
                        "a log has lines of `step stream value`, such as `0 train 10.95`")
    for of in runs:
        if of not in drawable:
            print(f"{of.name}: nothing to draw in {of.path}")
        elif axis == "hours" and not len(of.finite("ms")[0]):
            raise UserError(f"{of.path} has no `ms` lines to tell hours by; use --x steps or --x tokens")
    print(table(drawable), flush=True)
    save(draw_runs(drawable, axis), out)
    print(f"wrote {out}", flush=True)
    return drawable


def watch(logs: list[tuple[str, Path]], axis: str, out: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Redraw whenever a log has changed, until every run says that it is done. Logs may not be there yet."""
    drawn = None
    while True:
        sizes = [path.stat().st_size if path.is_file() else 0 for _, path in logs]
        if sizes != drawn:
            drawn = sizes
            try:
                runs = draw_curves(logs, axis, out)
                if len(runs) == len(logs) and all("done" in of.comments for of in runs):
                    return
            except UserError as error:
                print(f"waiting: {error}", flush=True)
        sleep(WATCH_SECONDS)


def check_out(out: Path) -> None:
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {str(out)!r} must end in {', '.join(FORMATS)}")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"can't write {out}: name a file in a directory that is there and may be written to with --out")


def main(config: Config) -> None:
    logs, source, out = find_logs(config.run_dirs), config.model, Path(config.out)
    if not source:
        if not config.out and not config.watch:
            read_log(logs[0][1], "")  # that there is no log is said before that nothing can be written there
        out = out if config.out else logs[0][1].parent / "curves.png"
        check_out(out)
        (watch if config.watch else draw_curves)(logs, config.x, out)
        return
    from extras.checkpoints import find_checkpoint, load_any

    path = find_checkpoint(source) or Path(source if os.path.exists(source) else os.path.basename(source), "model")
    path = path if path.parent.is_dir() else path.parent  # of a hub name, the picture is put here
    out = out if config.out else path.with_suffix(".png")
    check_out(out)
    save(draw_model(*load_any(source), "/".join(path.absolute().parts[-2:]), config.prompt), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main, Config, __doc__)
