"""
Draw runs: log files in, a picture and a table out.

    python plot_log.py log/                                    # writes log/curves.png
    python plot_log.py log/a log/b log/c --out compare.svg     # several runs over one another
    python plot_log.py log/ --x hours --watch                  # redraw a live run every few seconds
    python plot_log.py --model log/ckpt_019073.pt              # what is inside a checkpoint

A log is lines of `step stream value`, of which the last value of a step wins, and lines that begin with `#`: the run's
config, its data and its restarts, each a word and a JSON object. build-nanogpt's log files, which have no `#` lines,
are read as they are. Nothing but files is read: neither the trainer nor a GPU is needed.

Contents: Config · Logs · Summary · Picture · Panels · Inside a checkpoint · Commands
"""

import io
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
    model: str = ""  # draw a checkpoint instead (a directory: its newest one): position embeddings and attention
    prompt: str = "The cat that the dogs chased was tired because it had been running all day"
    """text whose attention is drawn"""


FORMATS = ("png", "svg", "pdf")
WATCH_SECONDS = 3
HELLASWAG_EXAMPLES = 10_042


# ----------------------------------------------------------------------------------------------------------------------
# Logs


@dataclass
class Run:
    """What one log file says. streams[name] is (steps, values), steps ascending; a value that is not finite is NaN."""

    name: str
    path: Path
    streams: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    comments: dict[str, dict] = field(default_factory=dict)  # the last of each kind: config, model, data, done, ...
    restarts: list[int] = field(default_factory=list)
    unreadable: int = 0  # lines that are neither

    def __getitem__(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a stream, NaNs included; empty arrays if the log has none of it."""
        return self.streams.get(stream, (np.empty(0), np.empty(0)))

    def finite(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        steps, values = self[stream]
        return steps[np.isfinite(values)], values[np.isfinite(values)]

    @property
    def config(self) -> dict:
        return self.comments.get("config", {})

    @property
    def tokens_per_step(self) -> int:
        return int(self.config.get("total_batch_size") or TOKENS_PER_STEP)

    @property
    def last_step(self) -> int:
        return int(max((steps[-1] for steps, _ in self.streams.values()), default=0))


def find_logs(run_dirs: list[str]) -> list[tuple[str, Path]]:
    """(name, log file) of each run directory or log file. Names are told apart by as much of the path as it takes."""
    paths = [Path(run_dir) for run_dir in run_dirs]
    paths = [path if path.is_file() or path.suffix in (".txt", ".log") else path / "log.txt" for path in paths]
    resolved = [path.resolve() for path in paths]
    full = [path.parent.parts if path.name == "log.txt" else path.with_suffix("").parts for path in resolved]
    depth = 1
    while depth < max(map(len, full), default=1) and len({parts[-depth:] for parts in full}) < len(set(full)):
        depth += 1
    return [("/".join(parts[-depth:]), path) for parts, path in zip(full, paths)]


def check_exists(path: Path) -> None:
    """Raise UserError, with the run directories nearby, if there is no such log."""
    if path.is_file():
        return
    nearby = sorted(str(log.parent) for log in path.parent.glob("*/log.txt")) if path.parent.is_dir() else []
    hint = f"; there is one in {', '.join(nearby[:5])}" if nearby else "; give the --log_dir of a run, or a log file"
    raise UserError(f"no log file {str(path)!r}{hint}")


def read_log(path: Path, name: str) -> Run:
    """Read a log that may be live, resumed, torn by a crash, or build-nanogpt's. Lines that make no sense are counted.

    The last value of a step wins. `# restart {"step": n}` takes back what stood after step n, to be done again.
    """
    result = Run(name, path)
    values: dict[str, dict[int, float]] = {}
    # A last line without its newline is still being written: "3.2" may become "3.2516", so it doesn't count.
    try:
        whole, _, _ = path.read_bytes().decode("utf-8-sig", errors="replace").rpartition("\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; give another log") from error
    for line in whole.split("\n"):
        data, hash_sign, comment = line.partition("#")
        if hash_sign:
            kind, payload = parse_comment(comment)
            if kind == "restart":
                step = int(payload.get("step", 0))
                result.restarts.append(step)
                result.comments.pop("done", None)
                values = {stream: {s: v for s, v in of.items() if s <= step} for stream, of in values.items()}
            elif kind:
                result.comments[kind] = payload
            data = ""  # what a crash cut short has no newline either, and the comment of the restart follows on it
        parsed = parse_line(data)
        if parsed:
            step, stream, value = parsed
            values.setdefault(stream, {})[step] = value
        elif data.strip():
            result.unreadable += 1
    for stream, of in values.items():
        if of:
            steps = np.array(sorted(of))
            result.streams[stream] = steps, np.array([of[step] for step in steps.tolist()])
    return result


LINE = re.compile(r"\s*([0-9]{1,12})\s+([A-Za-z_]\w*)\s+(\S+)\s*")


def parse_line(line: str) -> tuple[int, str, float] | None:
    """`step stream value`, or None. inf becomes NaN: neither can be drawn."""
    match = LINE.fullmatch(line)
    try:
        value = float(match[3]) if match else None
    except ValueError:
        return None
    return match and (int(match[1]), match[2], value if math.isfinite(value) else math.nan)


def parse_comment(text: str) -> tuple[str, dict]:
    """` config {"a": 1}` -> ("config", {"a": 1}); ("", {}) for a comment of another form."""
    kind, _, payload = text.strip().partition(" ")
    try:
        value = json.loads(payload)
    except ValueError:
        return "", {}
    return (kind, value) if isinstance(value, dict) else ("", {})


def positions(of: Run, steps: np.ndarray, axis: str) -> np.ndarray:
    """Where `steps` stand on the horizontal axis: steps, tokens, hours or minutes of training before that step."""
    if axis == "steps":
        return steps
    if axis == "tokens":
        return steps * of.tokens_per_step
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
    count, half, i = len(values), half_window(values), np.arange(len(values))
    back = np.minimum(half, i)
    lo, hi = i - back, np.minimum(i + back, count - 1) + 1
    known = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(known, values, 0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    inside = counts[hi] - counts[lo]
    return np.where(known, (sums[hi] - sums[lo]) / np.maximum(inside, 1), math.nan)


def rolling_median(values: np.ndarray) -> np.ndarray:
    """As `smooth`, for streams whose spikes say nothing of their level; at 1,000 places, joined; (n,) -> (n,)."""
    half, i = half_window(values), np.arange(len(values))
    places = np.unique(np.linspace(0, max(len(values) - 1, 0), min(len(values), 1_000)).astype(int))
    return np.interp(i, places, [np.median(values[max(0, at - half) : at + half + 1]) for at in places])


def half_window(values: np.ndarray) -> int:
    return max(2, len(values) // 100)


def standard_errors(of: Run) -> np.ndarray:
    """Of each finite HellaSwag accuracy: as the log says, else that of a share of all examples, or of --hella_limit."""
    examples = of.config.get("hella_limit") or HELLASWAG_EXAMPLES
    steps, accuracy = of.finite("hella")
    logged = dict(zip(*map(np.ndarray.tolist, of.finite("hella_se"))))
    binomial = np.sqrt(np.clip(accuracy * (1 - accuracy), 0, None) / examples)
    return np.array([logged.get(step, se) for step, se in zip(steps.tolist(), binomial)])


def tokens_per_second(of: Run, ms: np.ndarray) -> np.ndarray:
    return of.tokens_per_step / (np.maximum(ms, 1e-6) / 1000)


def source_name(of: Run) -> str:
    """Of the text: a data set, or "file " and the first of the user's own files; "" if the log doesn't say."""
    source = of.comments.get("data", {}).get("source") or ""
    if not isinstance(source, dict):
        return str(source)
    return str(source.get("dataset") or "".join(f"file {name}" for name, *_ in source.get("files", [])[:1]))


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


COLUMNS = ("run", "step", "tokens", "train", "val", "best val", "bpb", "HellaSwag", "tokens/s", "time")


def summary(of: Run) -> dict[str, str]:
    """One row of the table: where the run is, as text; a column it has nothing for is "-"."""
    row = dict.fromkeys(COLUMNS, "-")
    row["run"] = of.name
    row["step"] = f"{of.last_step:,}" + (f" of {of.config['max_steps']:,}" if of.config.get("max_steps") else "")
    row["tokens"] = short(of.last_step * of.tokens_per_step)
    steps, train = of.finite("train")
    if len(train):
        row["train"] = f"{smooth(train)[-1]:.4f}"
    steps, val = of.finite("val")
    if len(val):
        row["val"] = f"{val[-1]:.4f}"
        row["best val"] = f"{val.min():.4f} at {steps[val.argmin()]:,}"
    if len(of.finite("bpb")[1]):
        row["bpb"] = f"{of.finite('bpb')[1][-1]:.4f}"
    if len(of.finite("hella")[1]):
        row["HellaSwag"] = f"{of.finite('hella')[1][-1]:.4f} +- {standard_errors(of)[-1]:.4f}"
    steps, ms = of.finite("ms")
    if len(ms):
        row["tokens/s"] = short(tokens_per_second(of, np.median(ms)))
        minutes = positions(of, steps[-1:] + 1, "minutes")[0]
        row["time"] = f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.1f} min"
    return row


def remarks(of: Run) -> list[str]:
    """What the table doesn't say: assumptions, restarts, and what could not be drawn."""
    said = []
    if "total_batch_size" not in of.config:
        said.append(f"no # config line, so {TOKENS_PER_STEP:,} tokens a step are assumed")
    if of.restarts:
        said.append(f"resumed at step {', '.join(f'{step:,}' for step in of.restarts)}")
    for stream, (steps, values) in of.streams.items():
        bad = ~np.isfinite(values)
        if bad.any():
            said.append(f"{stream} is NaN or infinite at {bad.sum():,} steps, first at {steps[bad.argmax()]:,}")
    if of.unreadable:
        said.append(f"{of.unreadable:,} unreadable lines left out")
    return [f"{of.name}: {remark}" for remark in said]


def table(runs: list[Run]) -> str:
    """A row a run, the columns that any has something for, then the remarks."""
    rows = [summary(of) for of in runs]
    columns = [column for column in rows[0] if any(row[column] != "-" for row in rows)]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = ["  ".join(text.ljust(widths[c]) if c == "run" else text.rjust(widths[c]) for c, text in row)
             for row in [[(c, c) for c in columns], *([(c, row[c]) for c in columns] for row in rows)]]
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


@dataclass
class Look:
    """How a run is drawn. `name` is "" where there is only one: the lines are then called by what they show."""

    name: str
    color: str
    marks: str  # color of its evaluations
    dashes: str


def looks(runs: list[Run]) -> list[Look]:
    """A color a run, and evaluations in another if there is only one run; dashes tell more than seven apart.

    matplotlib leaves names that begin with "_" out of a legend; a blank before it helps.
    """
    if len(runs) == 1:
        return [Look("", COLORS[0], COLORS[1], "-")]
    styles, seven = ("-", "--", ":", "-."), len(COLORS)
    names = [middle_out(f" {of.name}" if of.name.startswith("_") else of.name, 40) for of in runs]
    return [Look(name, COLORS[i % seven], COLORS[i % seven], styles[i // seven % len(styles)])
            for i, name in enumerate(names)]


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
            dress_x(ax, axis, ticks={1: 8, 2: 5, 3: 4}[count])
        for ax in axes[-rows[-1] :]:
            ax.set_xlabel(axis if axis in ("steps", "tokens") else f"{axis} of training")
        header = head(figure, runs, axes)
        height = header + 3.1 + 1.85 * (len(rows) - 1)
        figure.set_size_inches(WIDTH, height)
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - header / height), w_pad=0.1, h_pad=0.08, wspace=0.02)
    return figure


def span(runs: list[Run], axis: str) -> float:
    return float(max(positions(of, np.array([of.last_step]), axis)[0] for of in runs))


def dress_x(ax, axis: str, ticks: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=axis == "steps"))
    ax.xaxis.set_major_formatter(FuncFormatter({
        "steps": lambda x, _: f"{x:,.0f}", "tokens": lambda x, _: short(x)}.get(axis, lambda x, _: f"{x:g}")))


def head(figure, runs: list[Run], axes) -> float:
    """Title, the line under it and the one legend, which has as many columns as fit; returns their height in inches."""
    from_top = write_title(figure, runs[0].name if len(runs) == 1 else f"{len(runs)} runs", describe(runs))
    handles, names = {}, {look.name for look in looks(runs)}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    handles = dict(sorted(handles.items(), key=lambda item: item[0] not in names))  # the runs before all else
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles.values(), handles, ncols=columns, loc="upper left", columnspacing=1.6,
                               bbox_to_anchor=(0.15, -0.68), bbox_transform=from_top)
        legend.set_in_layout(False)
        extent = legend.get_window_extent()
        if columns == 1 or extent.width / DPI <= WIDTH - 0.3:
            return 0.68 + extent.height / DPI + 0.14
        legend.remove()
    return 0.68


def write_title(figure, title: str, subtitle: str):
    """Two lines at the top; returns the transform from (right, up) of the top left corner in inches, which keeps the
    header in its place when the figure's height changes."""
    from matplotlib.transforms import ScaledTranslation

    from_top = figure.dpi_scale_trans + ScaledTranslation(0, 1, figure.transFigure)
    place = {"transform": from_top, "in_layout": False}
    figure.text(0.15, -0.32, middle_out(title, 60), fontsize=13, fontweight="bold", **place)
    figure.text(0.15, -0.54, subtitle, color=GREY, **place)
    return from_top


def describe(runs: list[Run]) -> str:
    """The line under the title: what all runs share of model, data and batch; and how far a single one is."""
    facts = []
    for of in runs:
        model = {**of.config, **of.comments.get("model", {})}
        whole = all(model.get(key) for key in ("n_layer", "n_head", "n_embd"))
        assumed = "" if "total_batch_size" in of.config else " (assumed)"
        facts.append([
            f"{model['n_layer']} layers, {model['n_head']} heads, {model['n_embd']} channels" if whole else "",
            middle_out(source_name(of), 38),
            f"{of.tokens_per_step:,} tokens a step{assumed}",
            f"step {summary(of)['step']}" if len(runs) == 1 else "",
        ])
    shared = [of_all[0] for of_all in zip(*facts) if of_all[0] and len(set(of_all)) == 1]
    return "   ·   ".join(shared) or "models, data and batches differ"


def middle_out(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"


def save(figure, path: Path) -> None:
    """Write the picture whole or not at all: a viewer that follows it never sees half of one.

    A PNG gets 128 colors, those of rare marks among them, and less than a third of the bytes.
    """
    import matplotlib
    from PIL import Image

    kind = path.suffix[1:].lower()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file, matplotlib.rc_context(STYLE):
            if kind == "png":
                figure.savefig(buffer := io.BytesIO(), format="png")
                image = Image.open(buffer).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE)
                image.save(file, format="png", optimize=True)
            else:  # no date in it: the same log gives the same bytes
                figure.savefig(file, format=kind, metadata={"Date" if kind == "svg" else "CreationDate": None})
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
        name_line(ax, GPT2_LOSS, f"GPT-2 124M\n{GPT2_LOSS}")
    margin = 0.06 * (high - low) or 0.1
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


def name_line(ax, y: float, text: str, va: str = "center") -> None:
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
        name_line(ax, GPT2_HELLASWAG, f"GPT-2 124M\n{GPT2_HELLASWAG}")
        name_line(ax, GPT3_HELLASWAG, f"GPT-3 124M\n{GPT3_HELLASWAG}", va="bottom")
    if max(of.finite("hella")[1].max(initial=0) for of in runs) < 0.4:  # above, it's far away, and its name in the way
        name_line(ax, 0.25, "chance 0.25")


def draw_lr(ax, styled, axis: str) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.set_title("Learning rate")
    for of, look in styled:
        steps, rate = of.finite("lr")
        ax.plot(positions(of, steps, axis), rate, color=look.color, linestyle=look.dashes, linewidth=1.5,
                marker="o" if len(rate) < 3 else None, markersize=3)
    ax.set_ylim(bottom=0)
    spell = lambda y, _: f"{y:.1e}".replace(".0e", "e").replace("e-0", "e-") if y else "0"  # noqa: E731
    ax.yaxis.set_major_formatter(FuncFormatter(spell))


def draw_norm(ax, styled, axis: str) -> None:
    """Gradient norm before clipping; the first steps' spikes are let out of the frame."""
    ax.set_title("Gradient norm")
    tops = []
    for of, look in styled:
        steps, norm = of.finite("norm")
        if len(norm):
            draw_trace(ax, look, positions(of, steps, axis), norm, rolling_median(norm))
            tops.append(np.quantile(norm, 0.99))
    clips = {of.config.get("grad_clip") for of, _ in styled} - {None, 0}
    high = max(tops)
    if len(clips) == 1 and 0 < min(clips) < 3 * high:
        clip = clips.pop()
        high = max(high, clip)
        name_line(ax, clip, f"clipped\nto {clip:g}")
    ax.set_ylim(0, 1.12 * high or 1)


def draw_throughput(ax, styled, axis: str) -> None:
    from matplotlib.ticker import FuncFormatter

    ax.set_title("Tokens per second")
    tops = []
    for of, look in styled:
        steps, ms = of.finite("ms")
        if len(ms):
            raw = tokens_per_second(of, ms)
            draw_trace(ax, look, positions(of, steps, axis), raw, rolling_median(raw))
            tops.append(np.quantile(raw, 0.99))
    ax.set_ylim(0, 1.15 * max(tops))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))


PANELS: dict[str, Callable] = {"hella": draw_hella, "lr": draw_lr, "norm": draw_norm, "ms": draw_throughput}


# ----------------------------------------------------------------------------------------------------------------------
# Inside a checkpoint: L layers, nh heads, T positions, C channels


def find_checkpoint(path: Path) -> Path:
    """The file itself, or a run directory's newest checkpoint. Raises UserError if there is none."""
    found = sorted(path.glob("ckpt_*.pt"))[-1:] if path.is_dir() else [path] * path.is_file()
    if not found:
        raise UserError(f"no checkpoint at {path}; give a ckpt_*.pt, or a run directory that has one")
    return found[0]


def load_checkpoint(path: Path) -> dict:
    """The checkpoint, memory-mapped, nothing in it executed. Raises UserError if it is foreign or cut short."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = {"model", "model_config", "step"} - state.keys()
    except Exception as error:  # torch, pickle and zipfile each have their own for a file that is not what it should be
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}: {reason}); give another") from error
    if missing:
        raise UserError(f"{path} is not a checkpoint of train_gpt2.py: it has no {', '.join(sorted(missing))}")
    return state


def position_similarity(weights: dict) -> np.ndarray:
    """Cosine of every two position embeddings, (T, T)."""
    wpe = weights["transformer.wpe.weight"].float()
    unit = wpe / wpe.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.T).numpy()


def attention_maps(weights: dict, n_head: int, ids: list[int]) -> np.ndarray:
    """Attention probabilities of a prompt, (L, nh, T, T): row = the position that looks, column = where.

    A forward pass written out on GPT-2's weights in float32, since fused attention never shows these numbers.
    """
    import torch
    from torch.nn import functional as F

    w = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"].float(), w[f"{name}.bias"].float(), 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"].float(), w[f"{name}.bias"].float())

    T, maps = len(ids), []
    x = w["wpe.weight"][:T].float() + w["wte.weight"][ids].float()  # (T, C)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(sum(name.endswith(".attn.c_attn.weight") for name in w)):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = qkv.view(T, 3, n_head, -1).permute(1, 2, 0, 3)  # (nh, T, hs) each
        scores = (q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])
        attention = scores.masked_fill(future, -math.inf).softmax(-1)  # (nh, T, T)
        maps.append(attention)
        x = x + linear((attention @ v).transpose(0, 1).reshape(T, -1), f"h.{i}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return torch.stack(maps).numpy()


def tokenize_prompt(prompt: str, vocab_size: int, block_size: int) -> tuple[list[int], list[str]]:
    """Ids and their spelling, cut to what the model can see. A vocabulary too small for GPT-2's is that of bytes."""
    from extras.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("gpt2" if vocab_size >= 50257 else "bytes")
    ids = tokenizer.encode(prompt)[: min(block_size, MAX_PROMPT)]
    if not ids:
        raise UserError("--prompt is empty: there is nothing to attend to")
    return ids, [tokenizer.decode([i]).replace("\n", "\\n") for i in ids]


MAX_PROMPT = 32  # tokens: more can't be labelled legibly
MAX_LAYERS = 12  # more are thinned out evenly


def draw_model(state: dict, title: str, prompt: str):
    """A Figure of a checkpoint: position embeddings' similarity, attention on average, and that of every head."""
    import matplotlib
    from matplotlib.figure import Figure

    weights, model_config = state["model"], state["model_config"]
    ids, words = tokenize_prompt(prompt, model_config["vocab_size"], model_config["block_size"])
    maps = attention_maps(weights, model_config["n_head"], ids)
    layers = np.unique(np.linspace(0, len(maps) - 1, min(len(maps), MAX_LAYERS)).round().astype(int))
    cell = min(0.9, (WIDTH - 1.6) / maps.shape[1])
    height = 0.9 + 4.3 + 0.75 + max(cell * len(layers), 0.6)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.66 / height), w_pad=0.1, h_pad=0.08)
        size = "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**model_config)
        write_title(figure, title, f"{size}   ·   step {state['step']:,}")
        grid = figure.add_gridspec(2, 2, height_ratios=[4.3, 0.35 + max(cell * len(layers), 0.6)])
        draw_similarity(figure, figure.add_subplot(grid[0, 0]), position_similarity(weights))
        draw_attention(figure, figure.add_subplot(grid[0, 1]), maps.mean((0, 1)), words)
        draw_heads(figure.add_subplot(grid[1, :]), maps, layers)
    return figure


def draw_similarity(figure, ax, similarity: np.ndarray) -> None:
    """(T, T) cosines; an untrained model shows one bright line, a trained one smooth bands around it."""
    ax.set_title("Position embeddings, cosine similarity")
    shown = "nearest" if len(similarity) <= 512 else "auto"  # small ones crisp, large ones averaged
    low = min(0, float(similarity.min()))
    image = ax.imshow(similarity, cmap="cividis", vmin=low, vmax=1, interpolation=shown)
    ax.set_xlabel("position")
    ax.set_ylabel("position")
    figure.colorbar(image, ax=ax, orientation="horizontal", shrink=0.7, aspect=40, pad=0.02).outline.set_visible(False)


def draw_attention(figure, ax, attention: np.ndarray, words: list[str]) -> None:
    """(T, T) probabilities, labelled with the prompt; what lies in the future is left white."""
    from matplotlib.colors import PowerNorm

    ax.set_title("Attention, mean of all layers and heads")
    seen = np.where(np.tri(len(words), dtype=bool), attention, math.nan)
    image = ax.imshow(seen, cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    size = min(8.5, 150 / len(words))
    ax.set_xticks(range(len(words)), words, rotation=90, fontsize=size)
    ax.set_yticks(range(len(words)), words, fontsize=size)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    figure.colorbar(image, ax=ax, orientation="horizontal", shrink=0.7, aspect=40, pad=0.02).outline.set_visible(False)


def draw_heads(ax, maps: np.ndarray, layers: np.ndarray) -> None:
    """A small map for each head, a row a layer, as one image with blank seams; (L, nh, T, T)."""
    from matplotlib.colors import PowerNorm

    chosen = maps[layers]
    rows, heads, T, _ = chosen.shape
    seam = max(1, T // 10)
    seen = np.where(np.tri(T, dtype=bool), chosen, math.nan)
    mosaic = np.pad(seen, [(0, 0), (0, 0), (0, seam), (0, seam)], constant_values=math.nan)
    mosaic = mosaic.transpose(0, 2, 1, 3).reshape(rows * (T + seam), heads * (T + seam))
    ax.set_title("Attention of each head")
    ax.imshow(mosaic, cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    centre = (T - 1) / 2
    ax.set_xticks(centre + np.arange(heads) * (T + seam), range(heads))
    ax.set_yticks(centre + np.arange(rows) * (T + seam), layers)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def load_runs(logs: list[tuple[str, Path]], axis: str) -> list[Run]:
    """The runs that have something to draw. Raises UserError if none has, or if `axis` asks for what a log lacks."""
    for _, path in logs:
        check_exists(path)
    runs = [read_log(path, name) for name, path in logs]
    drawable = [of for of in runs if len(of.finite("train")[0]) or len(of.finite("val")[0])]
    if not drawable:
        counts = [f"{of.path} ({sum(len(steps) for steps, _ in of.streams.values()):,} values)" for of in runs]
        raise UserError(f"nothing to draw in {', '.join(counts)}: no finite value of train or val; "
                        "a log has lines of `step stream value`, such as `0 train 10.95`")
    for of in drawable:
        if axis == "hours" and not len(of.finite("ms")[0]):
            raise UserError(f"{of.path} has no `ms` lines to tell hours by; use --x steps or --x tokens")
    for of in runs:
        if of not in drawable:
            print(f"{of.name}: nothing to draw in {of.path}")
    return drawable


def draw_curves(logs: list[tuple[str, Path]], axis: str, out: Path) -> list[Run]:
    """Read the logs, write the picture, print the table."""
    runs = load_runs(logs, axis)
    save(draw_runs(runs, axis), out)
    print(table(runs), f"wrote {out}", sep="\n", flush=True)
    return runs


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


def check_format(out: Path) -> Path:
    if out.suffix[1:].lower() not in FORMATS:
        raise UserError(f"--out {str(out)!r} must end in {', '.join('.' + kind for kind in FORMATS)}")
    return out


def main(config: Config) -> None:
    if config.model:
        path = find_checkpoint(Path(config.model))
        out = check_format(Path(config.out) if config.out else path.with_suffix(".png"))
        save(draw_model(load_checkpoint(path), f"{path.resolve().parent.name}/{path.name}", config.prompt), out)
        print(f"wrote {out}")
        return
    logs = find_logs(config.run_dirs)
    out = check_format(Path(config.out) if config.out else logs[0][1].parent / "curves.png")
    (watch if config.watch else draw_curves)(logs, config.x, out)


if __name__ == "__main__":
    run(main, Config, __doc__)
