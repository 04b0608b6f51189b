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

Contents: Config · Logs · Summary · Panels · Picture · Page · Inside a checkpoint · Commands
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
    out: str = ""  # where to: .html for a page, else .png, .svg or .pdf; curves.png beside the first log if not given
    x: Literal["steps", "tokens", "hours"] = "steps"  # horizontal axis; hours are of training, without evaluations
    watch: bool = False  # redraw whenever a log has grown, until every run is done or Ctrl-C
    model: str = ""  # draw a model instead, of whatever sample.py reads: position embeddings and attention
    prompt: str = "The cat that the dogs chased was tired because it had been running all day"
    """text whose attention is drawn"""


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
    comments: defaultdict[str, dict] = field(default_factory=lambda: defaultdict(dict))  # the last of each kind
    samples: dict[int, list[str]] = field(default_factory=dict)  # step -> texts
    restarts: list[int] = field(default_factory=list)
    unreadable: int = 0  # lines that are neither values nor comments

    def __getitem__(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a stream, NaNs included; empty arrays if the log has none of it."""
        return self.streams.get(stream, (np.empty(0), np.empty(0)))

    def finite(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        steps, values = self[stream]
        return steps[np.isfinite(values)], values[np.isfinite(values)]

    def number(self, setting: str) -> float:
        """A setting that is a positive number; 0 if the log doesn't have it or has something else."""
        value = self.comments["config"].get(setting)
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
    # A last line without its newline is still being written: "3.2" may become "3.2516", so it doesn't count.
    try:
        text, _, _ = path.read_bytes().decode("utf-8-sig", errors="replace").rpartition("\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; give another log") from error
    run, values = Run(name, path), {}  # values: stream -> step -> value
    for line in text.split("\n"):
        data, hash_sign, comment = line.partition("#")
        if hash_sign:
            kind, payload = parse_comment(comment)
            step = payload.get("step")
            is_step = type(step) is int and 0 <= step < 10**12
            if kind == "restart" and is_step:
                run.restarts.append(step)
                run.comments.pop("done", None)
                values = {stream: {s: v for s, v in of.items() if s <= step} for stream, of in values.items()}
                run.samples = {s: texts for s, texts in run.samples.items() if s <= step}
            elif kind == "samples" and is_step and isinstance(payload.get("texts"), list):
                run.samples[step] = [str(text) for text in payload["texts"]]
            elif kind in ("restart", "samples"):
                run.unreadable += 1
            elif kind:
                run.comments[kind] = payload
            data = ""  # a line that a crash cut short has no newline, so the comment of the restart follows on it
        if match := LINE.fullmatch(data):
            value = float(match[3])
            values.setdefault(match[2], {})[int(match[1])] = value if abs(value) <= LARGEST else math.nan
        elif data.strip():
            run.unreadable += 1
    run.streams = {stream: tuple(map(np.array, zip(*sorted(of.items())))) for stream, of in values.items() if of}
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
    timed, ms = of.finite("ms")
    hours = np.cumsum(np.diff(timed, prepend=-1) * ms) / 3.6e6  # a step without its own time took as long as the next
    return np.interp(steps, [0, *(timed + 1)], [0, *hours])


def smooth(values: np.ndarray) -> np.ndarray:
    """Rolling median over 2% of the values, which spikes don't move; at 1,000 places, joined; (n,) -> (n,), n > 0.

    At the start the window is kept symmetrical, so that the steep fall there is not smeared; at the end it reaches back
    only, so that the last point is a median too.
    """
    half = max(2, len(values) // 100)
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), 1_000)).astype(int))
    medians = [np.median(values[i - min(i, half) : i + min(i, half) + 1]) for i in places]
    return np.interp(np.arange(len(values)), places, medians)


def standard_errors(of: Run) -> np.ndarray:
    """Of each finite HellaSwag accuracy: as the log says, else that of a share of all examples, or of --hella_limit."""
    steps, accuracy = of.finite("hella")
    logged = dict(zip(*map(np.ndarray.tolist, of.finite("hella_se"))))
    p = np.clip(accuracy, 0, 1)
    binomial = np.sqrt(p * (1 - p) / (of.number("hella_limit") or HELLASWAG_EXAMPLES))
    return np.abs([logged.get(step, se) for step, se in zip(steps.tolist(), binomial)])


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


def describe(runs: list[Run]) -> str:
    """What all runs share of model, data and batch, and how far they are."""
    facts = []
    for of in runs:
        model = {"n_layer": 0, "n_head": 0, "n_embd": 0, **of.comments["config"], **of.comments["model"]}
        sizes = "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**model)
        assumed = "" if of.number("total_batch_size") else " (assumed)"
        facts.append(["" if sizes.startswith("0 ") else shortened(sizes, 60), shortened(source_name(of), 38),
                      f"{of.tokens_per_step:,} tokens a step{assumed}", f"step {summary(of)['step']}"])  # fmt: skip
    shared = [values[0] for values in zip(*facts) if values[0] and len(set(values)) == 1]
    return "   ·   ".join(shared) or "models, data and batches differ"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"


def short(number: float) -> str:
    """524288 -> "524k", 9.96e9 -> "9.96B": three digits at most."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


COLUMNS = {  # stream -> the column of its last value
    "train": "train, smoothed", "val": "val", "bpb": "bpb", "hella": "HellaSwag", "ms": "tokens/s",
}  # fmt: skip


def summary(of: Run) -> dict[str, str]:
    """One row of the table, column -> text."""
    steps = f" of {of.number('max_steps'):,}" if of.number("max_steps") else ""
    row = {"run": of.name, "step": f"{of.last_step:,}{steps}", "tokens": short(of.last_step * of.tokens_per_step)}
    for stream in (*COLUMNS, *sorted(of.streams.keys() - {*COLUMNS, "hella_se", "lr", "norm"})):
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
    for stream, (steps, values) in of.streams.items():
        bad = ~np.isfinite(values)
        if bad.any():
            where = f"{bad.sum():,} steps, first at {steps[bad.argmax()]:,}"
            found.append(f"{stream} is NaN, infinite or over 1e30 at {where}")
    if of.unreadable:
        found.append(f"{of.unreadable:,} unreadable lines left out")
    return [f"{of.name}: {remark}" for remark in found]


def table(runs: list[Run]) -> list[list[str]]:
    """The columns that any run has something for, then a row a run."""
    rows = [summary(of) for of in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [columns, *([row.get(column, "-") for column in columns] for row in rows)]


def report(runs: list[Run]) -> str:
    """The table as text, and the remarks."""
    rows = table(runs)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in rows]
    return "\n".join([*lines, *(remark for of in runs for remark in remarks(of))])


# ----------------------------------------------------------------------------------------------------------------------
# Panels: what is drawn, in a picture as in a page

TITLES = {  # of the streams that get a panel, besides a fork's own
    "hella": "HellaSwag acc_norm ± s.e.", "lr": "Learning rate", "norm": "Gradient norm", "ms": "Tokens per second",
}  # fmt: skip
KINDS = {  # of lines, as matplotlib is to draw them; the later over the earlier
    "raw": {"label": "each step", "linewidth": 0.7},
    "resumed": {"label": "resumed", "linewidth": 1, "linestyle": ":"},
    "reference": {"label": "reference (GPT-2 124M recipe on FineWeb-Edu)", "linewidth": 1, "linestyle": "--"},
    "smooth": {"label": "smoothed", "linewidth": 1.5},
    "exact": {"label": "", "linewidth": 1.5},
    "joined": {"label": "evaluation", "linewidth": 1, "marker": "o"},
    "points": {"label": "evaluation", "linestyle": "none", "marker": "o"},
    "bad": {"label": "NaN or infinite", "linestyle": "none", "marker": "x"},
}


class Line(NamedTuple):
    kind: str
    run: int  # its index, which gives the color; -1 = of none
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | float = 0.0  # of y


@dataclass
class Panel:
    """Lines under a title, and horizontal lines to compare with."""

    title: str
    lines: list[Line] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)  # name -> y
    early: float = 0.0  # share of a run that may be above the frame
    from_zero: bool = False

    def add(self, *line) -> None:
        """A line, unless it is empty: kind, run, x, y, error."""
        if len(line[2]):
            self.lines.append(Line(*line))

    def add_noisy(self, run: int, x: np.ndarray, y: np.ndarray) -> None:
        """A stream of every step: raw and faint, and smoothed over it."""
        if len(x):
            self.lines += [Line("raw", run, x, y), Line("smooth", run, x, smooth(y))]

    def frame(self) -> tuple[float, float]:
        """The vertical limits.

        A long run falls most of its way in the first hundredths of it: if these were in the frame, what users look at,
        the last tenths of a nat, would be a flat line at the bottom.
        """
        lines = [line for line in self.lines if line.kind in ("smooth", "exact", "joined", "points")]
        late = [(line.y + line.error)[line.x >= self.early * line.x[-1]] for line in lines]
        high = max([*self.marks.values(), *(values.max() for values in late)])
        low = min([*self.marks.values(), *((line.y - line.error).min() for line in lines)])
        low = 0 if self.from_zero else low
        margin = max(0.07 * (high - low), 1e-3 * abs(high)) or 0.1
        return 0 if self.from_zero else low - margin, high + margin


def make_panels(runs: list[Run], axis: str) -> list[Panel]:
    """The loss, then a panel for each other stream that any run has, those of a fork's own last."""
    own = {stream for of in runs for stream in of.streams} - {"train", "val", "bpb", "hella_se", *TITLES}
    panels = [stream_panel(stream, runs, axis) for stream in (*TITLES, *sorted(own))]
    return [loss_panel(runs, axis), *(panel for panel in panels if panel.lines)]


def loss_panel(runs: list[Run], axis: str) -> Panel:
    """Training loss, validation, what to compare with, restarts, and where it was not finite."""
    unit, scales = loss_unit(runs)
    panel = Panel(f"Loss, {unit}", early=0.05)
    for i, (of, scale) in enumerate(zip(runs, scales)):
        steps, train = of.finite("train")
        panel.add_noisy(i, positions(of, steps, axis), train * scale)
        steps, val = of.finite("val")
        # Joined only where no training curve shows the way: chords between a few points would cut its bends.
        panel.add("points" if len(train) else "joined", i, positions(of, steps, axis), val * scale)
    comparable = all(map(on_fineweb_edu, runs)) and any(len(of.finite("val")[0]) for of in runs)
    if comparable and panel.frame()[1] > GPT2_LOSS:
        panel.marks[f"GPT-2 124M\n{GPT2_LOSS}"] = GPT2_LOSS
    low, high = panel.frame()
    for i, of in enumerate(runs):
        steps, train = of["train"]
        bad = positions(of, steps[~np.isfinite(train)], axis)
        panel.add("bad", i, bad, np.full(len(bad), high - 0.03 * (high - low)))
        for x in positions(of, np.array(of.restarts, dtype=int), axis):
            panel.add("resumed", i, np.array([x, x]), np.array([low, high]))
    of_recipe = [{**of.comments["config"], **of.comments["model"]} for of in runs]
    if comparable and any(map(reference.follows_recipe, of_recipe)) and axis in ("steps", "tokens"):
        last_step = max(of.last_step for of in runs)
        steps = np.unique(np.linspace(0, min(max(REFERENCE_CURVE), max(last_step, 1)), 600))
        panel.add("reference", -1, steps * (TOKENS_PER_STEP if axis == "tokens" else 1), reference_loss(steps))
    return panel


def loss_unit(runs: list[Run]) -> tuple[str, list[float]]:
    """The unit of the losses, and what to multiply those of each run by.

    With different tokenizers nats per token can't be compared: tokens differ in length. Bits per byte can; a run's
    last validation says how many of them its nats are.
    """
    if len({str(of.comments["data"].get("tokenizer", "gpt2")) for of in runs}) == 1:
        return "nats per token", [1.0] * len(runs)
    scales = []
    for of in runs:
        val, bpb = (dict(zip(*map(np.ndarray.tolist, of.finite(stream)))) for stream in ("val", "bpb"))
        step = max((step for step in val.keys() & bpb.keys() if val[step]), default=None)
        scales.append(math.nan if step is None else bpb[step] / val[step])
    if np.isfinite(scales).all():
        return "bits per byte", scales
    return "nats per token, which different tokenizers make incomparable", [1.0] * len(runs)


def stream_panel(stream: str, runs: list[Run], axis: str) -> Panel:
    """Any stream but the losses; without lines if no run has it."""
    panel = Panel(TITLES.get(stream, stream), from_zero=stream in ("lr", "norm", "ms"))
    for i, of in enumerate(runs):
        steps, values = of.finite(stream)
        x = positions(of, steps, axis)
        if stream == "hella":
            panel.add("joined", i, x, values, standard_errors(of))
        elif stream == "lr":
            panel.add("exact", i, x, values)
        elif stream in TITLES or 2 * len(steps) > of.last_step:
            panel.early = 0.05
            panel.add_noisy(i, x, tokens_per_second(of, values) if stream == "ms" else values)
        else:
            panel.add("joined", i, x, values)
    if stream == "hella" and panel.lines:
        if all(map(on_fineweb_edu, runs)):
            panel.marks[f"GPT-2 124M\n{GPT2_HELLASWAG}"] = GPT2_HELLASWAG
            panel.marks[f"GPT-3 124M\n{GPT3_HELLASWAG}"] = GPT3_HELLASWAG
        if panel.frame()[1] < 0.4:  # above, it's far away, and its name in the way
            panel.marks["chance 0.25"] = 0.25
    clips = {of.number("grad_clip") for of in runs} - {0}
    if stream == "norm" and panel.lines and len(clips) == 1 and min(clips) < 3 * panel.frame()[1]:
        panel.marks[f"clipped\nto {min(clips):g}"] = min(clips)
    return panel


def axis_name(axis: str) -> str:
    return "hours of training" if axis == "hours" else axis


def label(line: Line, runs: list[Run]) -> str:
    """What the legend calls a line: by what it shows if there is one run, else by the run."""
    if len(runs) == 1 or line.run < 0 or line.kind in ("resumed", "bad"):
        return KINDS[line.kind]["label"]
    name = shortened(runs[line.run].name, 40)
    return f" {name}" if name.startswith("_") else name  # matplotlib hides names like _run


def look(line: Line, alone: bool) -> dict:
    """matplotlib's arguments: a color a run, and evaluations in another if it is alone; dashes tell more than seven."""
    color = COLORS[(line.run + (alone and "marker" in KINDS[line.kind])) % 7] if line.run >= 0 else INK
    if line.kind == "raw":  # pale, rather than transparent: a browser draws thousands of transparent strokes as opaque
        color = "#" + "".join(f"{255 - (255 - int(color[i : i + 2], 16)) * 3 // 10:02x}" for i in (1, 3, 5))
    marker = "o" if len(line.x) == 1 and line.kind != "raw" else ""
    own = {"color": color, "linestyle": ("-", "--", ":", "-.")[max(line.run, 0) // 7 % 4], "marker": marker}
    return own | KINDS[line.kind]


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


def draw_runs(runs: list[Run], axis: str):
    """A matplotlib Figure: the losses across the top, below them the other panels, two or three a row."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = make_panels(runs, axis)
    across = 3 if len(panels) == 4 else 2
    rows = 1 + math.ceil((len(panels) - 1) / across)
    right = max(line.x[-1] for panel in panels for line in panel.lines if line.run >= 0) or 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(dpi=DPI, layout="constrained")
        grid = figure.add_gridspec(rows, across, height_ratios=[1.75] + [1] * (rows - 1))
        for i, panel in enumerate(panels):
            row, column = divmod(i + across - 1, across)
            whole = i == 0 or (column == 0 and i == len(panels) - 1)  # the loss, and a last one without neighbours
            ax = figure.add_subplot(grid[row, :] if whole else grid[row, column])
            draw_panel(ax, panel, runs)
            ax.set_xlim(-0.01 * right, 1.01 * right)
            ticks = {"nbins": 8 if whole else 7 - across, "steps": [1, 2, 2.5, 5, 10], "integer": axis == "steps"}
            ax.xaxis.set_major_locator(MaxNLocator(**ticks))
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if axis == "steps" else short(x))
            if row == rows - 1:
                ax.set_xlabel(axis_name(axis))
        legend_rows = add_header(figure, runs[0].name if len(runs) == 1 else f"{len(runs)} runs", describe(runs))
        figure.set_size_inches(WIDTH, 3.85 + 1.85 * (rows - 1) + 0.19 * legend_rows)
    return figure


def draw_panel(ax, panel: Panel, runs: list[Run]) -> None:
    ax.set_title(panel.title)
    for line in panel.lines:
        style, order = look(line, len(runs) == 1), 2 + [*KINDS].index(line.kind) / 10
        named = len(runs) == 1 or line.kind not in ("raw", "points")
        style["label"] = label(line, runs) if named else None
        ax.plot(line.x, line.y, **style, zorder=order, rasterized=len(line.x) > 5_000)  # so that SVGs stay small
        if np.any(line.error):
            ax.vlines(line.x, line.y - line.error, line.y + line.error, color=style["color"], linewidth=0.7)
    for name, y in panel.marks.items():  # in the margin, where no curve is
        ax.axhline(y, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.2)), zorder=1.5)
        ax.annotate(name, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=7.5, color=GREY, annotation_clip=False)  # fmt: skip
    low, high = panel.frame()
    ax.set_ylim(low, high)
    if high >= 1_000:
        ax.yaxis.set_major_formatter(lambda y, _: short(y))


def add_header(figure, title: str, subtitle: str) -> int:
    """Title and legend above, what is shared below; returns the number of the legend's rows."""
    entries = {}
    for ax in figure.axes:
        entries = {name: handle for handle, name in zip(*ax.get_legend_handles_labels())} | entries
    widths = [0.5 + 0.075 * len(name) for name in entries]  # inches, a little more than it takes
    columns = len(entries) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    figure.legend(entries.values(), entries, ncols=columns, loc="outside upper left", alignment="left",
                  title=shortened(title, 60), title_fontproperties={"size": 13, "weight": "bold"})  # fmt: skip
    figure.supxlabel(subtitle, x=0.012, ha="left", color=GREY)
    return math.ceil(len(entries) / columns)


# ----------------------------------------------------------------------------------------------------------------------
# Page

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ border-bottom: 1px solid #ddd; padding: 2px 12px 2px 0; text-align: left; overflow-wrap: anywhere }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6em 1em; margin: .4em 0 }}
summary {{ cursor: pointer }}
</style>
{library}
</head>
<body>
<h1>{title}</h1>
<p>{facts}</p>
{table}
{remarks}
<p>Drag to zoom; the panels move together. A click on a legend hides a line.</p>
{curves}
<h2>Samples</h2>
{samples}
<h2>Configuration</h2>
{settings}
</body>
</html>
"""


def make_page(runs: list[Run], axis: str) -> str:
    """The panels, samples and settings of the runs as one HTML page that loads nothing and runs nothing of theirs."""
    from bokeh.embed import components
    from bokeh.layouts import layout
    from bokeh.resources import Resources

    plots, text = [], html.escape
    for panel in make_panels(runs, axis):
        plots.append(plot_panel(panel, runs, axis))
        plots[-1].x_range = plots[0].x_range
    rows = [plots[:1], *(plots[i : i + 2] for i in range(1, len(plots), 2))]
    script, place = components(layout(rows, sizing_mode="stretch_width"))
    samples = ""
    for of in runs:
        samples += f"<h3>{text(of.name)}</h3>\n" if of.samples else ""
        for step, texts in sorted(of.samples.items()):
            blocks = "".join(f"<pre>{text(sample)}</pre>" for sample in texts)
            state = "open" if step == max(of.samples) else ""
            samples += f"<details {state}><summary>step {step:,}</summary>{blocks}</details>\n"
    keys = dict.fromkeys((kind, key) for of in runs for kind in of.comments for key in of.comments[kind])
    settings = [[f"{kind}: {key}", *(str(of.comments[kind].get(key, "-")) for of in runs)] for kind, key in keys]
    settings.sort(key=lambda row: len(set(row[1:])) == 1)  # what differs first
    return PAGE.format(
        title=text(runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        library=Resources(mode="inline", components=["bokeh"]).render(), facts=text(describe(runs)),
        table=html_table(table(runs)), remarks="".join(f"<p>{text(r)}</p>" for of in runs for r in remarks(of)),
        curves=place + script, samples=samples or "<p>The log holds none: lines of <code># samples</code>.</p>",
        settings=html_table([["", *(of.name for of in runs)], *settings]),
    )  # fmt: skip


def html_table(rows: list[list[str]]) -> str:
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "".join(f"<tr>{row}</tr>\n" for row in cells) + "</table>"


def plot_panel(panel: Panel, runs: list[Run], axis: str):
    """A panel as a figure of bokeh."""
    from bokeh.models import NumeralTickFormatter
    from bokeh.plotting import figure

    tips = [("", "$name"), (axis_name(axis), "@x{0,0.[00]}"), (panel.title, "@y{0.[0000]}")]
    plot = figure(title=panel.title, x_axis_label=axis_name(axis), y_range=panel.frame(), height=400, tooltips=tips,
                  tools="box_zoom,pan,wheel_zoom,reset,save", active_drag="box_zoom")  # fmt: skip
    dashes = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashdot"}
    for line in sorted(panel.lines, key=lambda line: [*KINDS].index(line.kind)):
        style, name = look(line, len(runs) == 1), label(line, runs) or panel.title
        x, y, error = (np.asarray(values, np.float32) for values in (line.x, line.y, line.error))  # half the page
        same = {"color": style["color"], "legend_label": name, "name": name}
        if style["linestyle"] != "none":
            plot.line(x, y, line_width=style["linewidth"], line_dash=dashes[style["linestyle"]], **same)
        if style["marker"]:
            plot.scatter(x, y, marker={"o": "circle", "x": "x"}[style["marker"]], size=6, **same)
        if error.any():
            plot.segment(x, y - error, x, y + error, **same)
    for name, y in panel.marks.items():
        plot.line([0, max(line.x[-1] for line in panel.lines)], y, color=GREY, line_dash="dotted",
                  legend_label=name.replace("\n", " "))  # fmt: skip
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")  # 2.5k
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[000000]a")
    plot.legend.update(click_policy="hide", ncols=3)
    plot.add_layout(plot.legend[0], "below")
    return plot


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
    maps = np.where(np.tri(len(ids), dtype=bool), attention_maps(shape, state, ids), math.nan)  # the future stays white
    layers = np.unique(np.linspace(0, len(maps) - 1, min(len(maps), MAX_LAYERS)).round().astype(int))
    lower = 0.35 + max(min(0.9, (WIDTH - 1.6) / maps.shape[1]) * len(layers), 0.6)  # inches
    wpe = state["transformer.wpe.weight"].detach().float().numpy()
    unit = wpe / np.maximum(np.linalg.norm(wpe, axis=-1, keepdims=True), 1e-12)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(WIDTH, 5.6 + lower), dpi=DPI, layout="constrained")
        figure.suptitle(shortened(title, 60), x=0.012, ha="left")
        sizes = "{n_layer} layers, {n_head} heads, {n_embd} channels".format(**shape)
        figure.supxlabel(sizes, x=0.012, ha="left", color=GREY)
        grid = figure.add_gridspec(2, 2, height_ratios=[4.3, lower])
        ax = figure.add_subplot(grid[0, 0])  # an untrained model shows one bright line, a trained one bands around it
        heatmap(ax, "Position embeddings, cosine similarity", unit @ unit.T, "position", "position", bar=True)
        ax = figure.add_subplot(grid[0, 1])
        heatmap(ax, "Attention, mean of all layers and heads", maps.mean((0, 1)), "key", "query", bar=True, gamma=0.5)
        size = min(8.5, 150 / len(words))
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=size)
        ax.set_yticks(range(len(words)), words, fontsize=size)
        draw_heads(figure.add_subplot(grid[1, :]), maps[layers], layers)
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


def save(drawing, out: Path) -> None:
    """Write a Figure or the text of a page whole or not at all: a viewer that follows it never sees half of one."""
    import matplotlib

    kind = out.suffix[1:].lower()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)  # the same log gives the same bytes
    try:
        with atomic_file(out) as file, matplotlib.rc_context(STYLE):
            if isinstance(drawing, str):
                file.write(drawing.encode())
            else:
                drawing.savefig(file, format=kind, metadata=metadata)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}; choose another --out") from error
    print(f"wrote {out}", flush=True)


def draw_curves(logs: list[tuple[str, Path]], axis: str, out: Path) -> list[Run]:
    """Read the logs, print the table, write the picture or page of those that have something to draw."""
    runs = [read_log(path, name) for name, path in logs]
    drawable = [of for of in runs if len(of.finite("train")[0]) or len(of.finite("val")[0])]
    if not drawable:
        counts = [f"{of.path} ({sum(len(steps) for steps, _ in of.streams.values()):,} values)" for of in runs]
        raise UserError(f"nothing to draw in {', '.join(counts)}: no finite value of train or val; "
                        "a log has lines of `step stream value`, such as `0 train 10.95`")  # fmt: skip
    for of in runs:
        if of not in drawable:
            print(f"{of.name}: nothing to draw in {of.path}")
        elif axis == "hours" and not len(of.finite("ms")[0]):
            raise UserError(f"{of.path} has no `ms` lines to tell hours by; use --x steps or --x tokens")
    print(report(drawable), flush=True)
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
        sleep(WATCH_SECONDS)


def main(config: Config) -> None:
    formats = (".png", ".svg", ".pdf") if config.model else (".png", ".svg", ".pdf", ".html")
    if config.out and not config.out.lower().endswith(formats):
        raise UserError(f"--out {config.out!r} must end in {', '.join(formats)}")
    if not config.model:
        logs = find_logs(config.run_dirs)
        (watch if config.watch else draw_curves)(logs, config.x, Path(config.out or logs[0][1].parent / "curves.png"))
        return
    from extras.checkpoints import find_checkpoint, load_any

    path = find_checkpoint(config.model)
    figure = draw_model(*load_any(config.model), config.model, config.prompt)
    save(figure, Path(config.out or (path.with_suffix(".png") if path else "model.png")))


if __name__ == "__main__":
    run(main, Config, __doc__)
