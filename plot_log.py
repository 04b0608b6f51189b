"""
Plot runs: log files in, a table and a picture or a page out.

    python plot_log.py log/                                    # writes log/curves.png
    python plot_log.py log/a log/b log/c --out compare.svg     # several runs over one another
    python plot_log.py log/ --out run.html                     # curves that zoom, samples, configuration: one file
    python plot_log.py log/ --x hours --watch                  # redraw a live run every few seconds
    python plot_log.py --model log/ckpt_019073.pt              # what is inside a checkpoint

A log is lines of `step stream value`, of which the last value of a step wins, and lines that begin with `#`: the run's
config, its data, its samples and its restarts, each a word and a JSON object. build-nanogpt's log files, which have no
`#` lines, are read as they are. Nothing but files is read: neither the trainer nor a GPU is needed.

Contents: Config · Logs · Summary · Picture · Page · Inside a checkpoint · Commands
"""

import html
import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from extras import reference
from extras.cli import UserError, run, user_error
from extras.files import atomic_file
from extras.reference import GPT2_HELLASWAG, GPT2_LOSS, GPT3_HELLASWAG, REFERENCE_CURVE, TOKENS_PER_STEP, reference_loss


@dataclass
class Config:
    """All settings; each is a flag of the same name, and the run directories stand without one."""

    run_dirs: tyro.conf.Positional[list[str]] = field(default_factory=lambda: ["log"])  # run directories, or log files
    out: str = ""  # where to: .html for a page, else .png, .svg or .pdf; curves.png beside the first log if not given
    x: Literal["steps", "tokens", "hours"] = "steps"  # horizontal axis; hours are of training, without evaluations
    watch: bool = False  # redraw whenever a log has grown, until every run is done or Ctrl-C
    model: str = ""  # draw a model instead (anything sample.py reads): position embeddings and attention
    prompt: str = "The cat that the dogs chased was tired because it had been running all day"
    """text whose attention is drawn"""


LARGEST = 1e30  # of a value: a larger one is treated as infinite, for matplotlib's arithmetic would overflow


# ----------------------------------------------------------------------------------------------------------------------
# Logs


@dataclass
class Run:
    """What one log file says. A value that can't be drawn is NaN."""

    name: str
    path: Path
    streams: dict[str, dict[int, float]] = field(default_factory=dict)  # stream -> step -> value
    comments: defaultdict[str, dict] = field(default_factory=lambda: defaultdict(dict))  # the last of each kind
    samples: dict[int, list[str]] = field(default_factory=dict)  # step -> texts
    restarts: list[int] = field(default_factory=list)
    unreadable: int = 0  # lines that are neither values nor comments

    def finite(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, ascending, and values of a stream where they are finite; empty arrays if the log has none of it."""
        found = sorted((step, v) for step, v in self.streams.get(stream, {}).items() if math.isfinite(v))
        return np.array([step for step, _ in found], dtype=np.int64), np.array([v for _, v in found], dtype=float)

    def bad(self, stream: str) -> list[int]:
        """The steps where it is not finite."""
        return sorted(step for step, value in self.streams.get(stream, {}).items() if not math.isfinite(value))

    def number(self, setting: str) -> float:
        """A setting that is a positive number; 0 if the log doesn't have it or has something else."""
        value = self.comments["config"].get(setting)
        return value if type(value) in (int, float) and 0 < value < 1e15 else 0

    @property
    def tokens_per_step(self) -> int:
        return int(self.number("total_batch_size")) or TOKENS_PER_STEP

    @property
    def last_step(self) -> int:
        return max((max(of) for of in self.streams.values()), default=0)


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
    # A last line without its newline is still being written: "3.2" may become "3.2516", so it doesn't count.
    with user_error(f"can't read {path}", OSError):
        text, _, _ = path.read_bytes().decode("utf-8-sig", errors="replace").rpartition("\n")
    run = Run(name, path)
    for line in text.split("\n"):
        data, hash_sign, comment = line.partition("#")
        if hash_sign:
            kind, payload = parse_comment(comment)
            step = payload.get("step")
            is_step = type(step) is int and 0 <= step < 10**12
            if kind == "restart" and is_step:
                run.restarts.append(step)
                run.comments.pop("done", None)
                for later in (*run.streams.values(), run.samples):
                    for s in [s for s in later if s > step]:
                        del later[s]
            elif kind == "samples" and is_step and isinstance(payload.get("texts"), list):
                run.samples[step] = [str(text) for text in payload["texts"]]
            elif kind in ("restart", "samples"):
                run.unreadable += 1
            elif kind:
                run.comments[kind] = payload
            data = ""  # a line that a crash cut short has no newline, so the comment of the restart follows on it
        if match := LINE.fullmatch(data):
            value = float(match[3])
            run.streams.setdefault(match[2], {})[int(match[1])] = value if abs(value) <= LARGEST else math.nan
        elif data.strip():
            run.unreadable += 1
    run.streams = {stream: of for stream, of in run.streams.items() if of}
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


# ----------------------------------------------------------------------------------------------------------------------
# Summary


def positions(of: Run, steps: np.ndarray, axis: str) -> np.ndarray:
    """Where `steps` stand on the horizontal axis: steps, tokens, or hours of training before that step."""
    if axis == "steps":
        return steps
    if axis == "tokens":
        return steps * float(of.tokens_per_step)
    timed, ms = of.finite("ms")  # a step without its own time took as long as the next
    hours = np.cumsum(np.diff(timed, prepend=-1) * np.maximum(ms, 0)) / 3.6e6
    return np.interp(steps, [0, *(timed + 1)], [0, *hours])


def smooth(values: np.ndarray) -> np.ndarray:
    """At each place the mean of the middle half of the 2% of values around it, which spikes don't move; (n,) -> (n,).

    At the start that window is kept symmetrical, so that the steep fall there is not smeared; at the end it reaches
    back only, so that the last point is a mean too. Computed at 1,000 places, and joined. n > 0.
    """
    half = max(2, len(values) // 100)
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), 1_000)).astype(int))
    windows = [np.sort(values[i - min(i, half) : i + min(i, half) + 1]) for i in places]
    means = [window[len(window) // 4 : len(window) - len(window) // 4].mean() for window in windows]
    return np.interp(np.arange(len(values)), places, means)


def standard_errors(of: Run) -> np.ndarray:
    """Of each finite HellaSwag accuracy: as the log says, else that of a share of all examples, or of --hella_limit."""
    steps, accuracy = of.finite("hella")
    p, logged = np.clip(accuracy, 0, 1), dict(zip(*of.finite("hella_se")))
    binomial = np.sqrt(p * (1 - p) / (of.number("hella_limit") or 10_042))
    return np.abs([logged.get(step, se) for step, se in zip(steps, binomial)])


def tokens_per_second(of: Run, ms: np.ndarray) -> np.ndarray:
    return of.tokens_per_step / (np.maximum(ms, 1e-6) / 1000)


def on_fineweb_edu(of: Run) -> bool:
    """Is the validation loss comparable with GPT-2's? A log without configuration is build-nanogpt's: yes."""
    data = of.comments["data"]
    return not of.comments["config"] or reference.on_fineweb_edu(data.get("source"), data.get("tokenizer"))


def source_name(of: Run) -> str:
    """Of the text: a data set, or the first of the user's own files and how many more; "" if the log doesn't say."""
    source = of.comments["data"].get("source") or ""
    if not isinstance(source, dict):
        return str(source)
    files = source.get("files") if isinstance(source.get("files"), list) else []
    names = [str(file[0] if isinstance(file, list) and file else file) for file in files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return str(source.get("dataset") or (f"file {names[0]}{more}" if names else ""))


def describe(runs: list[Run]) -> tuple[str, str]:
    """A title, and what all runs share of model, data and batch, and how far they are."""
    facts = []
    for of in runs:
        model = {"n_layer": 0, "n_head": 0, "n_embd": 0, **of.comments["config"], **of.comments["model"]}
        sizes = "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**model)
        assumed = "" if of.number("total_batch_size") else " (assumed)"
        facts.append(["" if sizes.startswith("0 ") else shortened(sizes, 60), shortened(source_name(of), 38),
                      f"{of.tokens_per_step:,} tokens a step{assumed}", f"step {summary(of)['step']}"])  # fmt: skip
    shared = [values[0] for values in zip(*facts) if values[0] and len(set(values)) == 1]
    text = "   ·   ".join(shared) or "models, data and batches differ"
    if len(runs) == 1:
        return runs[0].name, text
    return f"{len(runs)} runs", f"{text}\npale: each step   ·   dots: evaluations"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"


def short(number: float) -> str:
    """524288 -> "524k", 9.96e9 -> "9.96B": three digits at most."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


TITLES = {  # of the streams with a panel, besides the losses and a fork's
    "hella": "HellaSwag acc_norm ± s.e.", "lr": "Learning rate", "norm": "Gradient norm", "ms": "Tokens per second",
}  # fmt: skip
COLUMNS = {  # stream -> the column of its last value
    "train": "train, smoothed", "val": "val", "bpb": "bpb", "hella": "HellaSwag", "ms": "tokens/s",
}  # fmt: skip


def own_streams(runs: list[Run]) -> list[str]:
    """Those that only a fork's log has."""
    return sorted({stream for of in runs for stream in of.streams} - {*TITLES, *COLUMNS, "hella_se", "skipped"})


def summary(of: Run) -> dict[str, str]:
    """One row of the table, column -> text."""
    steps = f" of {of.number('max_steps'):,}" if of.number("max_steps") else ""
    row = {"run": of.name, "step": f"{of.last_step:,}{steps}", "tokens": short(of.last_step * of.tokens_per_step)}
    for stream in (*COLUMNS, *own_streams([of])):
        steps, values = of.finite(stream)
        if not len(values):
            continue
        row[COLUMNS.get(stream, stream)] = f"{values[-1]:.4f}"
        if stream == "train":
            row[COLUMNS[stream]] = f"{smooth(values)[-1]:.4f}"
        elif stream == "val":
            row["best val"] = f"{values.min():.4f} at {steps[values.argmin()]:,}"
        elif stream == "hella":
            row[COLUMNS[stream]] += f" +- {standard_errors(of)[-1]:.4f}"
        elif stream == "ms":
            hours = positions(of, steps[-1:] + 1, "hours")[0]
            row[COLUMNS[stream]] = short(tokens_per_second(of, np.median(values)))
            row["time"] = f"{hours:.1f} h" if hours >= 2 else f"{hours * 60:.1f} min"
    return row


def remarks(of: Run) -> list[str]:
    """What the table doesn't say: assumptions, restarts, and what could not be drawn."""
    found = []
    if not of.number("total_batch_size"):
        found.append(f"its config line gives no batch size, so {TOKENS_PER_STEP:,} tokens a step are assumed")
    if of.restarts:
        found.append(f"resumed at step {', '.join(f'{step:,}' for step in of.restarts)}")
    for stream in of.streams:
        if bad := of.bad(stream):
            found.append(f"{stream} is NaN, infinite or over 1e30 at {len(bad):,} steps, first at {bad[0]:,}")
    if of.unreadable:
        found.append(f"{of.unreadable:,} unreadable lines left out")
    return [f"{of.name}: {remark}" for remark in found]


def aligned(rows: list[list[str]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in rows)


def table(runs: list[Run]) -> str:
    """The columns that any run has something for, a row a run, then the remarks."""
    rows = [summary(of) for of in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = aligned([columns, *([row.get(column, "-") for column in columns] for row in rows)])
    return "\n".join([text, *(remark for of in runs for remark in remarks(of))])


# ----------------------------------------------------------------------------------------------------------------------
# Picture

WIDTH = 9.0  # inches, at DPI dots: 1800 pixels, shown at 900 in a README
DPI = 200
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "figure.titlesize": 13, "figure.titleweight": "bold",
    "figure.labelsize": 8.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "text.color": INK, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.formatter.useoffset": False, "grid.color": PALE, "grid.linewidth": 0.7, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.markersize": 2.8, "svg.hashsalt": "plot_log",
    "text.parse_math": False,  # a $ in a name is a $
}  # fmt: skip
KINDS = {  # of lines, and how they look; the later over the earlier
    "mark": {"color": GREY, "linewidth": 0.9, "linestyle": ":"},
    "raw": {"label": "each step", "linewidth": 0.7},
    "resumed": {"label": "resumed", "linewidth": 1, "linestyle": ":"},
    "reference": {"label": "reference (GPT-2 124M recipe on FineWeb-Edu)", "linewidth": 1, "linestyle": "--"},
    "smooth": {"label": "smoothed", "linewidth": 1.5},
    "exact": {"label": "_", "linewidth": 1.5},  # its panel's title names it
    "joined": {"label": "evaluation", "linewidth": 1, "marker": "o"},
    "points": {"label": "evaluation", "linewidth": 0, "marker": "o"},
    "bad": {"label": "NaN or infinite", "linewidth": 0, "marker": "x"},
}


def draw_runs(runs: list[Run], axis: str):
    """A matplotlib Figure: the losses, and below them a panel for each other stream, a fork's own ones last."""
    import matplotlib
    from matplotlib.figure import Figure

    streams = [stream for stream in (*TITLES, *own_streams(runs)) if any(len(of.finite(stream)[0]) for of in runs)]
    right = max(positions(of, np.array([of.last_step]), axis)[0] for of in runs) or 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(dpi=DPI, layout="constrained")
        heights = [2.4] + [1] * len(streams)
        panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        draw_loss(panels[0], runs, axis)
        for ax, stream in zip(panels[1:], streams):
            draw_stream(ax, runs, axis, stream)
        for ax in panels:
            if ax.get_ylim()[1] >= 1_000:
                ax.yaxis.set_major_formatter(lambda y, _: short(y))
        panels[-1].set(xlim=(-0.01 * right, 1.01 * right), xlabel=axis)  # of all: they share the axis
        panels[-1].xaxis.get_major_locator().set_params(integer=axis == "steps")
        panels[-1].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if axis == "steps" else short(x))
        legend_rows = add_header(figure, *describe(runs))
        figure.set_size_inches(WIDTH, 0.9 + 0.19 * legend_rows + 1.25 * sum(heights))
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        for ax in panels:  # the solver's last digits vary, and the same log is to give the same bytes
            ax.set_position(np.round(ax.get_position().bounds, 5))
    return figure


def add_header(figure, title: str, subtitle: str) -> int:
    """Title and legend above, what is shared below; returns the number of the legend's rows."""
    entries = {}
    for ax in reversed(figure.axes):  # so that the losses decide how a name is shown, and of their lines the boldest
        lines = [line for line in ax.get_legend_handles_labels()[0] if line.get_gid() != "mark"]
        entries |= {line.get_label(): line for line in sorted(lines, key=lambda line: line.get_linewidth())}
    widths = [0.5 + 0.075 * len(name) for name in entries]  # inches, a little more than it takes
    columns = len(entries) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    figure.legend(entries.values(), entries, ncols=columns, loc="outside upper left", alignment="left",
                  title=shortened(title, 60), title_fontproperties={"size": 13, "weight": "bold"})  # fmt: skip
    figure.supxlabel(subtitle, x=0.012, ha="left", color=GREY)
    return math.ceil(len(entries) / columns)


def draw_loss(ax, runs: list[Run], axis: str) -> None:
    """Training loss, validation, what to compare with, restarts, and where it was not finite."""
    unit, scales = loss_unit(runs)
    ax.set_title(f"Loss, {unit}")
    for i, (of, scale) in enumerate(zip(runs, scales)):
        steps, train = of.finite("train")
        draw(ax, runs, i, "noisy", positions(of, steps, axis), train * scale)
        steps, val = of.finite("val")
        # Joined only where no training curve shows the way: chords between a few points would cut its bends.
        draw(ax, runs, i, "points" if len(train) else "joined", positions(of, steps, axis), val * scale)
    set_frame(ax)
    comparable = all(map(on_fineweb_edu, runs)) and any(len(of.finite("val")[0]) for of in runs)
    if comparable and ax.get_ylim()[1] > GPT2_LOSS:
        mark(ax, f"GPT-2 124M {GPT2_LOSS}", GPT2_LOSS)
    low, high = ax.get_ylim()
    for i, of in enumerate(runs):
        bad = positions(of, np.array(of.bad("train"), dtype=int), axis)
        draw(ax, runs, i, "bad", bad, np.full(len(bad), high - 0.03 * (high - low)))
        for x in positions(of, np.array(of.restarts, dtype=int), axis):
            draw(ax, runs, i, "resumed", [x, x], [low, high])
    settings = [{**of.comments["config"], **of.comments["model"]} for of in runs]
    if comparable and any(map(reference.follows_recipe, settings)) and axis in ("steps", "tokens"):
        steps = np.linspace(0, min(max(REFERENCE_CURVE), max(of.last_step for of in runs)), 600)
        draw(ax, runs, -1, "reference", steps * (TOKENS_PER_STEP if axis == "tokens" else 1), reference_loss(steps))


def loss_unit(runs: list[Run]) -> tuple[str, list[float]]:
    """The unit of the losses, and what to multiply those of each run by.

    With different tokenizers nats per token can't be compared: tokens differ in length. Bits per byte can; a run's
    last validation says how many of them its nats are.
    """
    if len({str(of.comments["data"].get("tokenizer", "gpt2")) for of in runs}) == 1:
        return "nats per token", [1.0] * len(runs)
    scales = []
    for of in runs:
        val, bpb = dict(zip(*of.finite("val"))), dict(zip(*of.finite("bpb")))
        step = max((step for step in val.keys() & bpb.keys() if val[step]), default=None)
        scales.append(math.nan if step is None else bpb[step] / val[step])
    if np.isfinite(scales).all():
        return "bits per byte", scales
    return "nats per token, which different tokenizers make incomparable", [1.0] * len(runs)


def draw_stream(ax, runs: list[Run], axis: str, stream: str) -> None:
    """Any stream but the losses."""
    ax.set_title(TITLES.get(stream, stream))
    ax.margins(y=0.1)
    for i, of in enumerate(runs):
        steps, values = of.finite(stream)
        x = positions(of, steps, axis)
        values = tokens_per_second(of, values) if stream == "ms" else values
        of_every_step = stream in ("norm", "ms") or (stream not in TITLES and 2 * len(steps) > of.last_step)
        draw(ax, runs, i, "noisy" if of_every_step else "exact" if stream == "lr" else "joined", x, values)
        if stream == "hella" and len(x):
            errors, color = standard_errors(of), ax.lines[-1].get_color()
            ax.vlines(x, values - errors, values + errors, color=color, linewidth=0.7)
    set_frame(ax, from_zero=stream in ("lr", "norm", "ms"))
    if stream == "hella" and all(map(on_fineweb_edu, runs)):
        mark(ax, f"GPT-2 124M {GPT2_HELLASWAG}", GPT2_HELLASWAG)
        mark(ax, f"GPT-3 124M {GPT3_HELLASWAG}", GPT3_HELLASWAG, va="bottom")  # clear of GPT-2's name
    if stream == "hella" and ax.get_ylim()[1] < 0.4:  # above, it's far away, and its name in the way
        mark(ax, "chance 0.25", 0.25)
    clips = {of.number("grad_clip") for of in runs} - {0}
    if stream == "norm" and len(clips) == 1 and min(clips) < 3 * ax.get_ylim()[1]:
        mark(ax, f"clipped to {min(clips):g}", min(clips))


def draw(ax, runs: list[Run], i: int, kind: str, x, y) -> None:
    """A line of run i, or of none if i is -1; what is noisy is drawn raw, and smoothed over it.

    The legend names it by what it shows, or by its run if there are several. A color a run, and evaluations in another
    if it is alone; dashes tell more than seven apart.
    """
    if len(x) == 0:
        return
    if kind == "noisy":
        draw(ax, runs, i, "raw", x, y)
        return draw(ax, runs, i, "smooth", x, smooth(y))
    alone, style = len(runs) == 1, {"color": INK, "linestyle": ("-", "--", ":", "-.")[max(i, 0) // 7 % 4]}
    style |= KINDS[kind]
    if i >= 0:
        style["color"] = COLORS[(i + (alone and kind in ("joined", "points"))) % 7]
    if kind == "raw":  # pale, rather than transparent: a browser draws thousands of transparent strokes as opaque
        channels = (int(style["color"][at : at + 2], 16) for at in (1, 3, 5))
        style["color"] = "#" + "".join(f"{255 - (255 - channel) * 3 // 10:02x}" for channel in channels)
    elif len(x) == 1:
        style.setdefault("marker", "o")
    if i >= 0 and not alone and kind not in ("resumed", "bad"):
        name = shortened(runs[i].name, 40)
        style["label"] = f" {name}" if name.startswith("_") else name  # matplotlib hides names like _run
    order = 2 + [*KINDS].index(kind) / 10
    ax.plot(x, y, gid=kind, zorder=order, rasterized=len(x) > 5_000, **style)  # so that SVGs stay small


def set_frame(ax, from_zero: bool = False) -> None:
    """The vertical limits: those of what is smoothed and evaluated, from the time on when 5% of a run are done.

    A long run falls most of its way before; what users look at, the last tenths of a nat, would be a flat line.
    """
    if any(line.get_gid() == "smooth" for line in ax.lines):
        lines = [line.get_data() for line in ax.lines if line.get_gid() != "raw"]
        low = 0 if from_zero else min(y.min() for _, y in lines)
        high = max(y[x >= 0.05 * x[-1]].max() for x, y in lines)
        margin = max(0.07 * (high - low), 1e-3 * abs(high)) or 0.1
        ax.set_ylim(low - margin, high + margin)
    if from_zero:
        ax.set_ylim(bottom=0)


def mark(ax, name: str, y: float, va: str = "center") -> None:
    """A horizontal line to compare with, and its name in the margin, where no curve is."""
    low, high = ax.get_ylim()
    margin = 0.07 * (high - low)
    ax.set_ylim(min(low, y - margin), max(high, y + margin))
    draw(ax, [], -1, "mark", [0, ax.dataLim.x1], [y, y])
    ax.lines[-1].set_label(name)
    ax.annotate(name, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                va=va, fontsize=7.5, color=GREY, annotation_clip=False)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Page

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
pre {{ background: #f5f5f5; padding: 0.5em 1em; overflow-x: auto }}
.text {{ white-space: pre-wrap }}
</style>
{library}
<h1>{title}</h1>
<p class="text">{facts}</p>
<pre>{table}</pre>
<p>Drag to zoom; the panels move together. A click on a legend hides a line.</p>
{curves}
<h2>Samples</h2>
{samples}
<h2>Configuration</h2>
<pre>{settings}</pre>
</html>
"""


def make_page(runs: list[Run], axis: str) -> str:
    """The picture's lines, samples and settings as one HTML page that loads nothing and runs nothing of theirs."""
    from bokeh.embed import components
    from bokeh.layouts import gridplot
    from bokeh.resources import Resources

    plots = [plot_panel(ax, axis) for ax in draw_runs(runs, axis).axes]
    plots[0].height = 480
    for plot in plots:
        plot.x_range = plots[0].x_range
    script, place = components(gridplot(plots, ncols=1, sizing_mode="stretch_width"))
    samples = ""
    for of in runs:
        for step, texts in sorted(of.samples.items()):
            state = "open" if step == max(of.samples) else ""
            samples += f"<details {state}><summary>{html.escape(of.name)}, step {step:,}</summary>\n"
            samples += "".join(f'<pre class="text">{html.escape(text)}</pre>\n' for text in texts) + "</details>\n"
    keys = dict.fromkeys((kind, key) for of in runs for kind in of.comments for key in of.comments[kind])
    rows = [[f"{kind}: {key}", *(shortened(str(of.comments[kind].get(key, "-")), 60) for of in runs)]
            for kind, key in keys]  # fmt: skip
    rows.sort(key=lambda row: len(set(row[1:])) == 1)  # what differs first
    settings = aligned([["", *(of.name for of in runs)], *rows])
    title, facts, numbers = map(html.escape, (*describe(runs), table(runs)))
    return PAGE.format(title=title, facts=facts, table=numbers, settings=html.escape(settings), curves=place + script,
                       samples=samples or "The log has none: no lines of <code># samples</code>.",
                       library=Resources(mode="inline", components=["bokeh"]).render())  # fmt: skip


def plot_panel(ax, axis: str):
    """A panel of the picture as a figure of bokeh."""
    from bokeh.models import NumeralTickFormatter
    from bokeh.plotting import figure
    from matplotlib.colors import to_hex

    title = ax.get_title(loc="left")
    tips = [("", "$name"), (axis, "@x{0,0.[00]}"), (title, "@y{0.[0000]}")]
    plot = figure(title=title, x_axis_label=axis, y_range=ax.get_ylim(), height=300, tooltips=tips,
                  tools="box_zoom,pan,wheel_zoom,reset,save", active_drag="box_zoom")  # fmt: skip
    dashes = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashdot"}
    for line in sorted(ax.lines, key=lambda line: line.get_zorder()):
        x, y = np.asarray(line.get_data(), np.float32)  # half the page of float64
        name = title if line.get_label().startswith("_") else line.get_label()
        style = {"color": line.get_color(), "legend_label": name, "name": name}
        if line.get_linewidth():
            plot.line(x, y, line_width=line.get_linewidth(), line_dash=dashes[line.get_linestyle()], **style)
        if line.get_marker() in ("o", "x"):
            plot.scatter(x, y, marker=line.get_marker(), size=6, **style)
    for bars in ax.collections:
        ends = np.array(bars.get_segments(), np.float32)  # (n, 2 ends, x and y)
        plot.segment(*ends[:, 0].T, *ends[:, 1].T, color=to_hex(bars.get_color()[0]))
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")  # 2.5k
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[000000]a")
    plot.legend.update(click_policy="hide", ncols=4, location="left")
    plot.add_layout(plot.legend[0], "above")
    return plot


# ----------------------------------------------------------------------------------------------------------------------
# Inside a checkpoint: L layers, nh heads, T positions

MAX_PROMPT = 32  # tokens: more can't be labelled legibly


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
    from extras.tokenizer import encode_prompt, printable, tokenizer_for

    tokenizer = tokenizer_for(n_tokens)
    ids = encode_prompt(tokenizer, prompt)[0][: min(block_size, MAX_PROMPT)]
    return ids, [printable(tokenizer.decode([i])).replace("\n", "\\n") for i in ids]


def draw_model(shape: dict, state: dict, title: str, prompt: str):
    """A Figure of a model: position embeddings' similarity, attention on average, and that of every head."""
    import matplotlib
    from matplotlib.figure import Figure

    ids, words = tokenize_prompt(prompt, shape["n_tokens"], shape["block_size"])
    T, future = len(ids), ~np.tri(len(ids), dtype=bool)
    maps = np.where(future, math.nan, attention_maps(shape, state, ids))  # (L, nh, T, T); the future is left white
    lower = 0.35 + max(min(0.9, (WIDTH - 1.6) / shape["n_head"]) * shape["n_layer"], 0.6)  # inches
    wpe = state["transformer.wpe.weight"].detach().float().numpy()
    unit = wpe / np.maximum(np.linalg.norm(wpe, axis=-1, keepdims=True), 1e-12)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(WIDTH, 5.6 + lower), dpi=DPI, layout="constrained")
        figure.suptitle(shortened(title, 60), x=0.012, ha="left")
        sizes = "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**shape)
        figure.supxlabel(sizes, x=0.012, ha="left", color=GREY)
        similarity, mean, heads = figure.subplot_mosaic("ab;cc", height_ratios=[4.3, lower]).values()
        # an untrained model shows one bright line, a trained one bands around it
        heatmap(similarity, "Position embeddings, cosine similarity", unit @ unit.T, "position", "position", bar=True)
        heatmap(mean, "Attention, mean of all layers and heads", maps.mean((0, 1)), "key", "query", bar=True, gamma=0.5)
        mean.set_xticks(range(T), words, rotation=90, fontsize=min(8.5, 150 / T))
        mean.set_yticks(range(T), words, fontsize=min(8.5, 150 / T))
        cell = T + max(1, T // 10)  # a small map for each head, as one image with blank seams
        mosaic = np.pad(maps, [(0, 0), (0, 0), (0, cell - T), (0, cell - T)], constant_values=math.nan)
        mosaic = mosaic.transpose(0, 2, 1, 3).reshape(shape["n_layer"] * cell, shape["n_head"] * cell)
        heatmap(heads, "Attention of each head", mosaic, "head", "layer", gamma=0.5)
        heads.set_xticks((T - 1) / 2 + np.arange(shape["n_head"]) * cell, range(shape["n_head"]))
        heads.set_yticks((T - 1) / 2 + np.arange(shape["n_layer"]) * cell, range(shape["n_layer"]))
    return figure


def heatmap(ax, title: str, values: np.ndarray, xlabel: str, ylabel: str, bar=False, gamma=1.0) -> None:
    from matplotlib.colors import PowerNorm

    low, shown = min(0, float(np.nanmin(values))), "nearest" if len(values) <= 512 else "auto"
    image = ax.imshow(values, cmap="cividis", norm=PowerNorm(gamma, low, 1), interpolation=shown)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if bar:
        place = {"orientation": "horizontal", "shrink": 0.7, "aspect": 40, "pad": 0.02}
        ax.get_figure().colorbar(image, ax=ax, **place).outline.set_visible(False)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def save(drawing, out: Path) -> None:
    """Write a Figure or the text of a page whole or not at all: a viewer that follows it never sees half of one."""
    import matplotlib

    kind = out.suffix[1:].lower()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)  # the same log gives the same bytes
    writing = user_error(f"can't write {out}; choose another --out", OSError)
    with writing, atomic_file(out) as file, matplotlib.rc_context(STYLE):
        if isinstance(drawing, str):
            file.write(drawing.encode(errors="replace"))  # JSON can spell what UTF-8 can't
        else:
            drawing.savefig(file, format=kind, metadata=metadata)
    print(f"wrote {out}", flush=True)


def draw_curves(logs: list[tuple[str, Path]], axis: str, out: Path) -> list[Run]:
    """Read the logs, print the table, write the picture or page of those that have something to draw."""
    runs = [read_log(path, name) for name, path in logs]
    drawable = [of for of in runs if len(of.finite("train")[0]) or len(of.finite("val")[0])]
    if not drawable:
        counts = [f"{of.path} ({sum(map(len, of.streams.values())):,} values)" for of in runs]
        raise UserError(f"nothing to draw in {', '.join(counts)}: no finite value of train or val; "
                        "a log has lines of `step stream value`, such as `0 train 10.95`")  # fmt: skip
    for of in runs:
        if of not in drawable:
            print(f"{of.name}: nothing to draw in {of.path}")
        elif axis == "hours" and not len(of.finite("ms")[0]):
            raise UserError(f"{of.path} has no `ms` lines to tell hours by; use --x steps or --x tokens")
    print(table(drawable), flush=True)
    save((make_page if out.suffix.lower() == ".html" else draw_runs)(drawable, axis), out)
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
        sleep(3)


def main(config: Config) -> None:
    formats = (".png", ".svg", ".pdf", *(() if config.model else (".html",)))
    if config.out and not config.out.lower().endswith(formats):
        raise UserError(f"--out {config.out!r} must end in {', '.join(formats)}")
    if not config.model:
        logs = find_logs(config.run_dirs)
        (watch if config.watch else draw_curves)(logs, config.x, Path(config.out or logs[0][1].parent / "curves.png"))
        return
    from extras.pretrained import find_checkpoint, load_any

    path = find_checkpoint(config.model)
    title = "/".join(Path(path or config.model).parts[-2:])
    figure = draw_model(*load_any(config.model), title, config.prompt)
    save(figure, Path(config.out or (path.with_suffix(".png") if path else "model.png")))


if __name__ == "__main__":
    run(main, Config, __doc__)
