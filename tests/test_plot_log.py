"""plot_log.py: what a log says is what is drawn, nothing overlaps, and a user's mistake costs one line."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plot_log
from extras import cli, pretrained, reference

FINEWEB = "HuggingFaceFW/fineweb-edu:sample-10BT"
RECIPE = {
    **reference.RECIPE,
    "model": "gpt2",
    "init_from": "",
    "grad_clip": 1.0,
    "n_layer": 0,
    "n_head": 0,
    "n_embd": 0,
}
GPT2 = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768}
BUILD_NANOGPT = (
    "0 val 10.9504\n0 hella 0.2463\n0 train 10.955029\n1 train 9.632\n2 train 9.1\n2 val 9.2500\n2 hella 0.2500\n"
)


def write_log(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def make_log(folder: Path, steps: int, config=None, source=FINEWEB, skip=(), restart=None) -> Path:
    """A log as the trainer writes it: loss 3 + 8 exp(-s / tau), wavering."""
    comments = {
        "config": {**RECIPE, "max_steps": steps, **(config or {})},
        "model": GPT2,
        "data": {"source": source, "tokenizer": "gpt2"},
    }
    lines = [f"# {kind} {json.dumps(value)}" for kind, value in comments.items()]
    for step in range(steps + 1):
        loss = 3 + 8 * math.exp(-step / (0.04 * steps)) + 0.02 * math.sin(step)
        values = {"train": loss, "lr": 6e-4 * (1 - step / steps), "norm": 0.3 + math.exp(-step), "ms": 340 + step % 7}
        if step % (steps // 8) == 0:
            values |= {"val": loss, "bpb": loss / 3.2, "hella": 0.25 + 0.06 * step / steps}
        if restart and step == restart:
            lines.append(f'# restart {{"step": {step}}}')
        lines += [f"{step} {name} {value:.6f}" for name, value in values.items() if name not in skip]
    return write_log(folder / "log.txt", "\n".join(lines) + "\n")


def command(*argv) -> None:
    cli.run(plot_log.main, plot_log.Config, plot_log.__doc__, [str(word) for word in argv])


def failure(capsys, *argv) -> str:
    """The one line that a user's mistake ends with."""
    with pytest.raises(SystemExit) as exit_:
        command(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(lines) == 1
    return lines[0]


# ----------------------------------------------------------------------------------------------------------------------
# Logs


def test_a_log_says_what_its_lines_say(tmp_path):
    run = plot_log.read_log(write_log(tmp_path / "log.txt", BUILD_NANOGPT), "r")
    assert run.streams["train"] == {0: 10.955029, 1: 9.632, 2: 9.1}
    assert run.streams["val"] == {0: 10.9504, 2: 9.25} and run.streams["hella"] == {0: 0.2463, 2: 0.25}
    assert run.comments["config"] == {} and run.tokens_per_step == 524288 and run.last_step == 2 and run.unreadable == 0


def test_the_last_value_of_a_step_wins_and_a_restart_takes_back_what_came_after(tmp_path):
    lines = [
        "0 train 9",
        "1 train 8",
        "2 train 7",
        "2 val 6.5",
        "3 train 6",
        "4 train 5.5",
        "4 val 5",
        "# done {}",
        '# config {"total_batch_size": 64}',
        '# restart {"step": 2}',
        "2 train 7.5",
        "3 train 6.25",
    ]
    run = plot_log.read_log(write_log(tmp_path / "log.txt", "\n".join(lines) + "\n"), "r")
    assert run.streams["train"] == {0: 9, 1: 8, 2: 7.5, 3: 6.25}
    assert run.streams["val"] == {2: 6.5}, "what was measured at the step of the checkpoint stands"
    assert run.restarts == [2] and run.tokens_per_step == 64 and "done" not in run.comments
    assert "resumed at step 2" in plot_log.table([run])
    run = plot_log.read_log(write_log(tmp_path / "log.txt", "0 train 9\n1 train 8\n0 train 7\n"), "r")
    assert run.streams["train"] == {0: 7, 1: 8}, "without the comment too"


def test_a_torn_or_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    text = "\ufeff0 train 9\r\n# an unknown comment\n# config {broken\n1 train 8\nrubbish\n2 tra3 train 7\n"
    text += "4 train 6.5.1\n-1 train 3\n99999999999999999999 train 3\n5 tr\0in 3\n"
    text += "6 train 6"  # torn by a crash; then the run goes on
    text += '# restart {"step": 1}\n2 train 7.5\n3 train 6'  # and this is being written: 6.2?
    run = plot_log.read_log(write_log(tmp_path / "log.txt", text), "r")
    assert run.streams["train"] == {0: 9, 1: 8, 2: 7.5}
    assert run.restarts == [1] and run.comments["config"] == {} and run.unreadable == 6
    assert "6 unreadable lines" in plot_log.table([run])


def test_samples_are_kept_by_step_and_a_restart_takes_back_the_later_ones(tmp_path):
    lines = [{"step": 0, "texts": ["a", "b\nc"]}, {"step": 5, "texts": ["d"]}, {"step": 4, "texts": [1, None]}]
    lines = [f"# samples {json.dumps(line)}\n" for line in [*lines, {"step": "x", "texts": []}, {"step": 6}]]
    lines.insert(2, '# restart {"step": 2}\n')
    run = plot_log.read_log(write_log(tmp_path / "log.txt", "".join(lines)), "r")
    assert run.samples == {0: ["a", "b\nc"], 4: ["1", "None"]} and run.unreadable == 2


def test_what_is_no_record_is_left_out_and_counted(tmp_path):
    lines = [b"0 train 9", b"", b"   ", b"\0" * 300 + b"1 train 8", b"power cut here, restarted at 9 o'clock"]
    lines += [b"2 tra3 train 7", b"# caf\xe9 {}", b"caf\xe9", b"4 train 1_0", "٣ train 5".encode()]
    lines += [b'# restart {"step": null}', b"# note " + b"[" * 99_999]
    lines += [b"5 train 6", b"\0" * 512, b"6 train 5.5\r", b""]
    path = tmp_path / "log.txt"
    path.write_bytes(b"\n".join(lines))
    run = plot_log.read_log(path, "r")
    assert run.streams["train"] == {0: 9, 5: 6, 6: 5.5} and run.unreadable == 8 and run.restarts == []
    assert "8 unreadable lines left out" in plot_log.table([run]) and path.read_bytes() == b"\n".join(lines)


@pytest.mark.parametrize("value", [None, "x", [1], {"a": 1}, -1, 1e300, True, math.nan])
def test_settings_of_another_type_are_no_settings(tmp_path, value):
    names = ["total_batch_size", "max_steps", "hella_limit", "grad_clip", "n_layer", "n_head", "n_embd", "model"]
    data = {"source": {"dataset": None, "files": value}, "tokenizer": value}
    comments = {"config": dict.fromkeys(names, value), "data": data, "model": {"n_layer": value}}
    text = "".join(f"# {kind} {json.dumps(comment)}\n" for kind, comment in comments.items())
    path = write_log(tmp_path / "log.txt", text + BUILD_NANOGPT + "0 norm 1\n0 ms 3\n")
    run = plot_log.read_log(path, "r")
    plot_log.draw_runs([run], "tokens").draw_without_rendering()
    assert "a step are assumed" in plot_log.table([run]) and run.tokens_per_step == 524288


STREAMS = ["train", "val", "hella", "hella_se", "lr", "norm", "ms", "bpb"]
VALUES = st.tuples(st.sampled_from(STREAMS), st.integers(0, 10**12 - 1), st.floats(width=64))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["steps", "tokens", "hours"]), st.lists(VALUES, min_size=1, max_size=12))
def test_absurd_numbers_are_drawn_or_named(axis, values):
    with tempfile.TemporaryDirectory() as folder:
        text = "0 train 9\n" + "".join(f"{step} {stream} {value}\n" for stream, step, value in values)
        run = plot_log.read_log(write_log(Path(folder) / "log.txt", text), "r")
        assert run.unreadable == 0
        if axis != "hours" or len(run.finite("ms")[0]):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                plot_log.draw_runs([run], axis).draw_without_rendering()
        assert all(np.abs(run.finite(stream)[1]).max(initial=0) <= 1e30 for stream in run.streams)
        assert plot_log.table([run])


def test_what_is_not_finite_is_counted_marked_and_left_out(tmp_path):
    text = "".join(f"{step} train {value}\n" for step, value in enumerate([9, 8, "nan", "inf", "-inf", 6, 5.5]))
    run = plot_log.read_log(write_log(tmp_path / "log.txt", text + "6 val nan\n"), "r")
    assert run.finite("train")[0].tolist() == [0, 1, 5, 6]
    assert "train is NaN, infinite or over 1e30 at 3 steps, first at 2" in plot_log.table([run])
    figure = plot_log.draw_runs([run], "steps")
    (marks,) = [line for line in figure.axes[0].lines if line.get_label() == "NaN or infinite"]
    assert marks.get_xdata().tolist() == [2, 3, 4]
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_runs_are_named_by_as_much_of_their_path_as_it_takes(tmp_path):
    def names(*paths):
        return [name for name, _ in plot_log.find_logs([str(tmp_path / path) for path in paths])]

    for path in ("a/log", "b/log", "c"):
        write_log(tmp_path / path / "log.txt", BUILD_NANOGPT)
    assert names("c") == ["c"] and names("c/log.txt") == ["c"] and names("old/main.log") == ["main"]
    assert names("a/log", "c") == ["log", "c"] and names("a/log", "b/log/log.txt") == ["a/log", "b/log"]
    assert names("c", "c") == ["c", "c"]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_smoothing_neither_lags_nor_moves_with_spikes():
    values, expected = np.random.default_rng(0).normal(size=700).cumsum(), []
    for i in range(700):  # the interquartile mean, written out
        window = sorted(values[i - min(i, 7) : i + min(i, 7) + 1])
        rest = len(window) // 4
        expected.append(sum(window[rest : len(window) - rest]) / (len(window) - 2 * rest))
    np.testing.assert_allclose(plot_log.smooth(values), expected)
    line = np.arange(300.0)
    np.testing.assert_allclose(plot_log.smooth(line)[:-3], line[:-3])
    np.testing.assert_allclose(plot_log.smooth(np.arange(5000.0))[100:-100], np.arange(5000)[100:-100])
    values = np.full(5000, 2.0)
    values[20::40] = 1000
    assert plot_log.smooth(values).tolist() == [2.0] * 5000 and plot_log.smooth(np.array([3.0])).tolist() == [3.0]


def test_the_axis_of_tokens_and_of_hours(tmp_path):
    text = '# config {"total_batch_size": 1000}\n0 ms 7200000\n1 ms 3600000\n3 ms 1800000\n3 train 5\n'
    run = plot_log.read_log(write_log(tmp_path / "log.txt", text), "r")
    steps = np.array([0, 1, 2, 3, 4])
    assert plot_log.positions(run, steps, "tokens").tolist() == [0, 1000, 2000, 3000, 4000]
    assert plot_log.positions(run, steps, "hours").tolist() == [0, 2, 3, 3.5, 4], "step 2 took as long as step 3"
    assert "4.0 h" in plot_log.table([run]) and plot_log.tokens_per_second(run, np.array(500.0)) == 2000


def test_error_bars_are_the_logs_or_those_of_a_share(tmp_path):
    log = "0 train 9\n0 hella 0.2955\n1 hella 0.3\n1 hella_se 0.0123\n"
    run = plot_log.read_log(write_log(tmp_path / "log.txt", log), "r")
    np.testing.assert_allclose(plot_log.standard_errors(run), [0.00455308, 0.0123], rtol=1e-4)
    bars = plot_log.draw_runs([run], "steps").axes[1].collections[0].get_segments()
    np.testing.assert_allclose(bars[1], [[1, 0.3 - 0.0123], [1, 0.3 + 0.0123]])
    run = plot_log.read_log(write_log(tmp_path / "log.txt", '# config {"hella_limit": 100}\n' + log), "r")
    np.testing.assert_allclose(plot_log.standard_errors(run)[0], 0.0456, rtol=1e-2)


def test_short_numbers():
    texts = {
        0: "0",
        0.25: "0.25",
        1760: "1.76k",
        99_960: "100k",
        524_288: "524k",
        999_999: "1M",
        1.5e6: "1.5M",
        9.96e9: "9.96B",
        1e10: "10B",
    }
    assert {number: plot_log.short(number) for number in texts} == texts


def test_the_table_says_where_a_run_is(tmp_path):
    run = plot_log.read_log(make_log(tmp_path / "mine", 83, {"total_batch_size": 2048}), "mine")
    head, row = plot_log.table([run]).splitlines()
    assert " ".join(head.split()) == "run step tokens train, smoothed val best val bpb HellaSwag tokens/s time"
    train = f"{run.finite('train')[1][-3:].mean():.4f}"  # as drawn: the mean of the last three
    assert row.split()[:6] == ["mine", "83", "of", "83", "170k", train] and "0.3078 +- 0.0046" in row
    assert row.split()[-3:] == ["5.97k", "0.5", "min"] and "2.9801 at 80" in row


# ----------------------------------------------------------------------------------------------------------------------
# Picture


def named(figure) -> set[str]:
    """Everything that a picture has a name for: its legend, and the names of its horizontal lines."""
    legend = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    return legend | {text.get_text() for ax in figure.axes for text in ax.texts}


@pytest.mark.parametrize(
    "config, source, lines, curve",
    [
        ({}, FINEWEB, True, True),
        ({"max_lr": 18e-4}, FINEWEB, True, False),
        ({"muon_lr": 0.01}, FINEWEB, True, False),
        ({"warmup_steps": 0}, FINEWEB, True, False),
        ({"schedule": "linear"}, FINEWEB, True, False),
        ({"total_batch_size": 2**18}, FINEWEB, True, False),
        ({"n_layer": 24}, FINEWEB, True, True),  # what the model is says `# model`, not the flag
        ({"init_from": "gpt2"}, FINEWEB, True, False),
        ({}, {"dataset": FINEWEB, "revision": "1", "files": [["000_00000.parquet", 3]]}, True, True),
        ({}, {"input": ["*"], "revision": None, "files": [["fineweb-edu.parquet", 3]] * 65}, False, False),
        ({}, None, False, False),
    ],
)
def test_what_others_reached_is_drawn_only_where_it_compares(tmp_path, config, source, lines, curve):
    path = make_log(tmp_path, 80, {"max_steps": 19073, **config}, source)
    run = plot_log.read_log(path, "r")
    names = named(plot_log.draw_runs([run], "steps"))
    assert plot_log.source_name(run) in (FINEWEB, "python-docs", "file fineweb-edu.parquet and 64 more", "")
    assert {"GPT-2 124M 3.2924" in names, "GPT-2 124M 0.2955" in names, "GPT-3 124M 0.337" in names} == {lines}
    assert any("reference" in name for name in names) == curve
    assert "chance 0.25" in names and "NaN or infinite" not in names and "resumed" not in names
    assert not any("reference" in name for name in named(plot_log.draw_runs([run], "hours"))), "it has no hours"
    other = plot_log.read_log(make_log(tmp_path / "other", 80, source="python-docs"), "other")
    names = named(plot_log.draw_runs([run, other], "steps"))
    assert not any("124M" in name for name in names), "not all runs compare"
    run.comments["data"]["tokenizer"] = "bytes"
    assert not plot_log.on_fineweb_edu(run)


def test_build_nanogpts_logs_are_compared_and_the_batch_is_assumed_aloud(tmp_path):
    run = plot_log.read_log(write_log(tmp_path / "log.txt", BUILD_NANOGPT), "r")
    figure = plot_log.draw_runs([run], "tokens")
    assert any("reference" in name for name in named(figure)) and len(figure.axes) == 2
    assert "524,288 tokens a step (assumed)" in figure.get_supxlabel()
    assert "524,288 tokens a step are assumed" in plot_log.table([run])
    (validation,) = [line for line in figure.axes[0].lines if line.get_label() == "evaluation"]
    assert validation.get_xdata().tolist() == [0, 2 * 524288] and validation.get_ydata().tolist() == [10.9504, 9.25]


def test_the_reference_curve_goes_through_its_points():
    steps = np.array([*plot_log.REFERENCE_CURVE])
    np.testing.assert_allclose(plot_log.reference_loss(steps), [*plot_log.REFERENCE_CURVE.values()])
    assert (np.diff(plot_log.reference_loss(np.arange(19073))) < 0).all()


def test_a_run_is_shown_where_it_matters(tmp_path):
    """From 5% of it on, what is smoothed and evaluated; the fall before that is above the frame."""
    run = plot_log.read_log(make_log(tmp_path, 2000), "long")
    low, high = plot_log.draw_runs([run], "steps").axes[0].get_ylim()
    assert 2.5 < low < 3 and 4 < high < 8
    run.streams["val"][1000] = 11.0  # a validation that comes later is not left out
    assert plot_log.draw_runs([run], "steps").axes[0].get_ylim()[1] > 11


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    runs = [plot_log.read_log(make_log(tmp_path / name, 80), name) for name in ("gpt2", "bytes")]
    assert plot_log.loss_unit(runs) == ("nats per token", [1, 1])
    runs[1].comments["data"]["tokenizer"] = "bytes"
    runs[1].streams["bpb"] = {step: 2 * value for step, value in runs[1].streams["val"].items()}
    runs[0].streams["bpb"][90] = 7.0  # without a val beside it
    ax = plot_log.draw_runs(runs, "steps").axes[0]
    assert ax.get_title(loc="left") == "Loss, bits per byte" and not ax.texts, "GPT-2's loss is in nats"
    for kind, stream in (("points", "val"), ("raw", "train")):
        first, second = (line.get_ydata() for line in ax.lines if line.get_gid() == kind)
        np.testing.assert_allclose(first, runs[0].finite(stream)[1] / 3.2, rtol=1e-5)
        np.testing.assert_allclose(second, runs[1].finite(stream)[1] * 2, rtol=1e-5)
    del runs[1].streams["bpb"]
    title = plot_log.draw_runs(runs, "steps").axes[0].get_title(loc="left")
    assert title == "Loss, nats per token, which different tokenizers make incomparable"


def test_a_stream_of_ones_own_is_drawn_and_in_the_table(tmp_path):
    run = plot_log.read_log(make_log(tmp_path, 80), "r")
    run.streams |= {"wnorm": {0: 5.0, 80: -7.5}, "entropy": {step: 2.0 + step for step in range(80)}, "skipped": {3: 1}}
    panels = {ax.get_title(loc="left"): ax for ax in plot_log.draw_runs([run], "steps").axes}
    assert plot_log.own_streams([run]) == ["entropy", "wnorm"] and [*panels][5:] == ["entropy", "wnorm"]
    (line,) = panels["wnorm"].lines
    assert line.get_xydata().tolist() == [[0, 5], [80, -7.5]] and line.get_marker() == "o"
    assert [line.get_gid() for line in panels["entropy"].lines] == ["raw", "smooth"], "as every stream of every step"
    assert "-7.5000" in plot_log.table([run]) and "wnorm" in plot_log.table([run])


def scenes(folder: Path) -> dict:
    """Pictures as different as users', the hardest for the layout among them."""

    def read(name, *args, **kwargs):
        return plot_log.read_log(make_log(folder / name, *args, **kwargs), name)

    bare = plot_log.read_log(write_log(folder / "bare" / "log.txt", BUILD_NANOGPT), "bare")
    no_hella, no_time = read("demo", 200, source="python-docs", skip=("hella",)), read("w", 400, skip=("ms",))
    recipe = read("gpt2", 400, {"max_steps": 19073}, restart=100)
    long = "a-very-long-name-of-a-run-with-all-its-settings-lr0.0018-wd0.1-seed1337-batch524288-try-%d"
    many = [read(f"$many_{i}", 200, {"max_lr": i * 1e-4}) for i in range(3)]
    for i, run in enumerate(many):
        run.name = long % i
    large = read("large", 200)
    large.streams["hella"] = {step: 2 * value for step, value in large.streams["hella"].items()}
    return {
        "large": [large],
        "demo": [no_hella],
        "no_time": [no_time],
        "recipe": [recipe],
        "bare": [bare],
        "many": many,
        "mixed": [recipe, bare, no_hella],
        "_long": [read(long % 9, 200, source="some/data" * 20)],
    }


@pytest.mark.parametrize("axis", ["steps", "tokens", "hours"])
def test_nothing_overlaps_and_every_line_is_named(tmp_path, axis):
    for name, runs in scenes(tmp_path).items():
        if axis == "hours" and name in ("bare", "no_time", "mixed"):
            continue
        figure = plot_log.draw_runs(runs, axis)
        assert_tidy(figure, name)
        colors = {text.get_text(): handle.get_color() for legend in figure.legends
                  for text, handle in zip(legend.get_texts(), legend.legend_handles)}  # fmt: skip
        for ax in figure.axes:
            where, (*lines,) = f"{name}: {ax.get_title(loc='left')}", ax.lines
            marks = [line.get_label() for line in lines if line.get_gid() == "mark"]
            assert marks == [text.get_text() for text in ax.texts], where
            for line in lines:
                if line.get_gid() == "exact" and len(runs) == 1:
                    assert line.get_color() == colors["smoothed"], "its panel's title names it"
                elif line.get_gid() not in ("mark", "raw"):
                    assert line.get_color() == colors[line.get_label()], where
                assert line.get_gid() != "raw" or line.get_label() in colors, where


def assert_tidy(figure, name: str) -> None:
    """No text over another or beyond the edge; none but a panel's own over the panel."""
    with matplotlib.rc_context(plot_log.STYLE):
        figure.draw_without_rendering()
    texts = [*figure.texts]
    for legend in figure.legends:
        texts += [legend.get_title(), *legend.get_texts()]
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [axis.label, *(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)]
        texts += [ax.title, ax._left_title, ax._right_title, *ax.texts]
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    assert not any(text.get_parse_math() for text in texts), "a $ in a name is a $"
    boxes = [text.get_window_extent() for text in texts]
    panels = [ax.get_window_extent() for ax in figure.axes]
    for i, (text, box) in enumerate(zip(texts, boxes)):
        where = f"{name}: {text.get_text()!r}"
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, f"{where} is cut"
        over = [other.get_text() for other, b in zip(texts[:i], boxes) if overlap(box, b)]
        assert not over, f"{where} is over {over}"
        assert not any(overlap(box, panel) for panel in panels), f"{where} is over a panel"


def overlap(a, b) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


def test_several_runs_are_told_apart(tmp_path):
    runs = [plot_log.read_log(make_log(tmp_path / f"{i}", 40), f"_run{i}") for i in range(9)]
    figure = plot_log.draw_runs(runs, "steps")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [f" _run{i}" for i in range(9)] and "pale: each step" in figure.get_supxlabel()
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.legends[0].legend_handles[:9]}) == 9


# ----------------------------------------------------------------------------------------------------------------------
# Page

EVIL = "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">&amp; $$x$$"
PROBE = """<script>
const errors = [], tips = new Set();
addEventListener("error", event => errors.push(event.message));
document.addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
function* within(root, selector) {
  yield* root.querySelectorAll(selector);
  for (const element of root.querySelectorAll("*"))
    if (element.shadowRoot) yield* within(element.shadowRoot, selector);
}
const ranges = () => [...Bokeh.documents[0]._all_models.values()].filter(model => model.type == "Figure")
  .map(figure => [figure.x_range.start, figure.x_range.end]);
function point(type, area, x, y, buttons) {
  const box = area.getBoundingClientRect(), clientX = box.left + x * box.width, clientY = box.top + y * box.height;
  area.dispatchEvent(new PointerEvent(type, {bubbles: true, composed: true, pointerId: 1, isPrimary: true, buttons,
                                             clientX, clientY}));
}
setTimeout(() => {
  const before = ranges(), area = [...within(document, ".bk-events")][0];
  for (let i = 0; i < 1500; i++) {
    point("pointermove", area, i % 50 / 50, i / 1500, 0);
    for (const tip of within(document, ".bk-tooltip-row-value")) tips.add(tip.textContent.trim());
  }
  point("pointerdown", area, 0.3, 0.3, 1);
  for (const share of [0.4, 0.5, 0.6]) point("pointermove", area, share, 0.5, 1);
  point("pointerup", area, 0.6, 0.5, 0);
  setTimeout(() => {
    const texts = [...document.querySelectorAll("details .text")].map(element => element.textContent);
    const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
    const found = document.createElement("pre");
    found.id = "found";
    found.textContent = JSON.stringify({title: document.title, errors, tips: [...tips], before, after: ranges(), texts,
                                        loaded});
    document.body.append(found);
  }, 500);
}, 1500);
</script>"""


def evil_runs(folder: Path) -> list[plot_log.Run]:
    """Two runs of which whatever can be text is a script."""
    runs = []
    for name in ("a", "b"):
        path = make_log(folder / name, 80, {"sample_prompt": EVIL}, source=EVIL)
        with path.open("a") as file:
            file.write(f"# samples {json.dumps({'step': 40, 'texts': [EVIL, 'plain']})}\n")
            file.write(f"# {name} {json.dumps({EVIL: EVIL})}\n")
        runs.append(plot_log.read_log(path, f"{name} {EVIL}"))
    return runs


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and its text outside of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += "" if self.tags and self.tags[-1][0] == "script" else data


def test_the_page_is_one_file_that_loads_and_runs_nothing_of_the_logs(tmp_path, capsys):
    page = Tags(plot_log.make_page(evil_runs(tmp_path), "steps"))
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onerror", "data"} & attrs.keys()]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "http" not in policy
    plain = Tags(plot_log.make_page([plot_log.read_log(make_log(tmp_path / "c", 80), "c")], "steps"))
    scripts = [[tag for tag, _ in parsed.tags].count("script") for parsed in (page, plain)]
    assert scripts[0] == scripts[1] and not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(EVIL) >= 4 and "The log has none" in plain.text and "config: max_lr" in plain.text
    with (tmp_path / "c" / "log.txt").open("a") as file:
        file.write('# samples {"step": 80, "texts": ["half a \\ud800 character"]}\n')
    command(tmp_path / "c", "--out", tmp_path / "run.html")
    assert "half a ? character" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "wrote" in capsys.readouterr().out and (tmp_path / "run.html").stat().st_size < 2e6
    assert "must end in .png, .svg, .pdf" in failure(capsys, "--model", tmp_path, "--out", tmp_path / "model.html")


def test_the_page_has_the_lines_of_the_picture(tmp_path):
    runs = [plot_log.read_log(make_log(tmp_path / name, 80, restart=40), name) for name in ("a", "b")]
    for ax in plot_log.draw_runs(runs, "tokens").axes:
        plot = plot_log.plot_panel(ax, "tokens")
        drawn = [glyph.data_source.data for glyph in plot.renderers if "x" in glyph.data_source.data]
        lines = [line.get_xydata() for line in sorted(ax.lines, key=lambda line: line.get_zorder())]
        both = [line for line in ax.lines if line.get_linewidth() and line.get_marker() == "o"]
        assert len(drawn) == len(lines) + len(both) and plot.y_range.start == ax.get_ylim()[0]
        for line in lines:
            assert any(np.allclose(line.T, [data["x"], data["y"]]) for data in drawn if len(data["x"]) == len(line))
        bars = [glyph.data_source.data for glyph in plot.renderers if "x0" in glyph.data_source.data]
        if ax.get_title(loc="left").startswith("HellaSwag"):
            for data, run in zip(bars, runs):
                np.testing.assert_allclose(data["y1"] - data["y0"], 2 * plot_log.standard_errors(run), atol=1e-6)
        assert len(bars) == 2 * ax.get_title(loc="left").startswith("HellaSwag")


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium: apt-get install chromium")
def test_the_page_zooms_in_a_browser(tmp_path):
    """A drag over the losses zooms every panel; nothing is loaded, no script of a log runs, not even in a tooltip."""
    runs = evil_runs(tmp_path)
    (tmp_path / "page.html").write_text(plot_log.make_page(runs, "steps") + PROBE, encoding="utf-8")
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*chromium, "--window-size=1200,1500", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, timeout=300)
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout.decode(), re.DOTALL)
    assert match, done.stderr.decode()[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert found["title"] == "2 runs" and found["errors"] == [] and found["loaded"] == []
    assert found["texts"] == [EVIL, "plain"] * 2
    assert set(found["tips"]) >= {plot_log.shortened(run.name, 40) for run in runs}
    assert len(found["after"]) == 5 and len(set(map(tuple, found["after"]))) == 1, "the panels move together"
    (left, right), (low, high) = found["before"][0], found["after"][0]
    assert left < low < high < right and high - low < 0.5 * (right - left)


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def test_the_picture_is_a_png_or_svg_written_whole(tmp_path, capsys, monkeypatch):
    from PIL import Image

    make_log(tmp_path / "run", 80)
    (tmp_path / "new").mkdir()
    command(tmp_path / "run")
    picture = Image.open(tmp_path / "run" / "curves.png")
    assert picture.size[0] == 1800 and "wrote" in capsys.readouterr().out
    colors = {color for _, color in picture.convert("RGB").getcolors(2**20)}
    assert {(255, 255, 255), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors
    for copy in ("a.svg", "b.svg"):
        command(tmp_path / "run" / "log.txt", "--x", "tokens", "--out", tmp_path / "new" / copy)
    svg = (tmp_path / "new" / "a.svg").read_bytes()
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == (tmp_path / "new" / "b.svg").read_bytes(), "the same log, the same bytes"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in failure(capsys, tmp_path / "run", "--out", tmp_path / "new" / "a.svg")
    for out in (tmp_path / "nodir" / "a.svg", tmp_path / "new"):
        assert "--out" in failure(capsys, tmp_path / "run", "--out", out) and not (tmp_path / "nodir").exists()
    assert (tmp_path / "new" / "a.svg").read_bytes() == svg and len(list((tmp_path / "new").iterdir())) == 2


def test_mistakes_cost_one_line(tmp_path, capsys):
    make_log(tmp_path / "log" / "demo", 40)
    assert "there is one in" in (line := failure(capsys, tmp_path / "log")) and "demo" in line
    assert "nowhere" in failure(capsys, tmp_path / "nowhere")
    empty, nans = write_log(tmp_path / "empty.txt", ""), write_log(tmp_path / "nans.txt", "0 train nan\n")
    assert "nothing to draw" in failure(capsys, empty) and "(1 values)" in failure(capsys, nans)
    line = failure(capsys, tmp_path / "log" / "demo", "--out", tmp_path / "curves.jpg")
    assert "must end in .png, .svg, .pdf, .html" in line
    bare = write_log(tmp_path / "bare.txt", BUILD_NANOGPT)
    assert "--x steps" in failure(capsys, bare, "--x", "hours")
    assert "ckpt.pt is not there" in failure(capsys, "--model", tmp_path / "ckpt.pt")
    assert "is damaged, or holds no weights" in (line := failure(capsys, "--model", bare)) and "\x1b" not in line
    assert "no log file" in failure(capsys, "x" * 300) and "no log file" in failure(capsys, tmp_path / "x" / "a.txt")
    assert not list(tmp_path.rglob("*.png"))
    command(empty, bare)  # one that has not begun doesn't keep the others from being drawn
    assert "nothing to draw in" in capsys.readouterr().out and (tmp_path / "curves.png").is_file()


def test_watching_waits_follows_and_ends(tmp_path, capsys):
    path, out, moments = tmp_path / "run" / "log.txt", tmp_path / "run" / "curves.png", []

    def sleep(seconds):
        moments.append(out.stat().st_mtime_ns if out.exists() else 0)
        if len(moments) == 1:
            write_log(path, "")
        elif len(moments) == 2:
            write_log(path, BUILD_NANOGPT)
        elif len(moments) == 4:
            write_log(path, BUILD_NANOGPT + '3 train 8\n# done {"step": 3}\n')
        assert len(moments) < 5, "the run was done"

    plot_log.watch(plot_log.find_logs([str(path.parent)]), "steps", out, sleep)
    assert moments[:2] == [0, 0] and 0 < moments[2] == moments[3] < out.stat().st_mtime_ns
    printed = capsys.readouterr().out
    assert printed.count("waiting: ") == 1 and printed.count("wrote ") == 2


def test_importing_is_silent_and_light():
    code = "import sys, plot_log; print({'matplotlib', 'bokeh', 'torch', 'tiktoken'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(plot_log.__file__).parent
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# ----------------------------------------------------------------------------------------------------------------------
# Inside a checkpoint


def tiny_gpt2(n_layer=3, n_head=4, n_embd=32, vocab_size=50304, block_size=48):
    """A transformers model with weights large enough for attention to be far from uniform, and its checkpoint."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    model = GPT2LMHeadModel(GPT2Config(n_positions=block_size, attn_implementation="eager", **size)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D's, transposed against Linear's
    weights = {k: v.t().contiguous() if k.endswith(matrices) else v for k, v in model.state_dict().items()}
    return model, {"model": weights, "model_config": {**size, "block_size": block_size}, "step": 7, "config": {}}


def test_attention_is_softmax_of_queries_and_keys():
    """Written out for the first two layers, in float64."""
    _, state = tiny_gpt2()
    shape = {**state["model_config"], "n_tokens": 50257}
    ids = [464, 3797, 50256, 11, 464, 7]
    w = {name.removeprefix("transformer."): tensor.double().numpy() for name, tensor in state["model"].items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    found, x = plot_log.attention_maps(shape, state["model"], ids), w["wte.weight"][ids] + w["wpe.weight"][:6]
    assert found.shape == (3, 4, 6, 6) and found.dtype == np.float32
    for i in range(2):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").reshape(6, 3, 4, 8)
        scores = np.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) / math.sqrt(8)
        attention = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(6)
        attention /= attention.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[i], attention, atol=1e-4)
        x = x + linear(np.einsum("hqk,khd->qhd", attention, qkv[:, 2]).reshape(6, 32), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")


def test_a_checkpoint_is_drawn(tmp_path, capsys):
    import torch

    _, state = tiny_gpt2()
    for step in (999_999, 1_000_000):
        torch.save({**state, "step": step}, tmp_path / f"ckpt_{step:06d}.pt")
    command("--model", tmp_path)
    assert (tmp_path / "ckpt_1000000.png").stat().st_size > 10_000, "the newest of a run directory"
    shape, _ = pretrained.load_any(str(tmp_path))
    damaged = bytearray((tmp_path / "ckpt_1000000.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "ckpt_1000000.pt").write_bytes(damaged)
    assert "fails its checksum" in failure(capsys, "--model", tmp_path), "as sample.py refuses it"
    wpe = state["model"]["transformer.wpe.weight"].double().numpy()
    cosines = wpe @ wpe.T / np.outer(np.linalg.norm(wpe, axis=1), np.linalg.norm(wpe, axis=1))
    figure = plot_log.draw_model(shape, state["model"], "title", "Why does it cost $5 or $6, and what is $5?\n" * 9)
    similarity, attention, heads = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    np.testing.assert_allclose(similarity, cosines, atol=1e-5)
    assert attention.shape == (32, 32) and attention.mask[0, 1] and not attention.mask[1, 0], "the future is left white"
    assert heads.shape == (3 * 35, 4 * 35)
    assert_tidy(figure, "model")


def test_whatever_sample_reads_is_drawn(tmp_path, monkeypatch):
    import torch

    model, state = tiny_gpt2()
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("exported")
    command("--model", "exported", "--prompt", "")
    (tmp_path / "nano").mkdir()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state["model"].items()}
    torch.save({"model": compiled, "model_args": state["model_config"]}, "nano/ckpt.pt")
    command("--model", "nano/", "--out", "a.png")
    assert (tmp_path / "model.png").is_file() and (tmp_path / "a.png").is_file()


def test_the_prompt_of_a_byte_level_model_is_bytes():
    ids, words = plot_log.tokenize_prompt("a\nb", 257, 48)
    assert ids == [97, 10, 98] and words == ["a", "\\n", "b"]
    assert plot_log.tokenize_prompt("a b c d", 50304, 2)[1] == ["a", " b"]
