"""The trainer on the emulated card, against the same run on the CPU. test_emulated.py runs this file, in a process."""

import gc
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from emulated import device

device.start("A100")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tiny import read_log, tiny_config, token_set  # noqa: E402

import train_gpt2  # noqa: E402
from train_gpt2 import GPT, Ranks, Run, main  # noqa: E402

RANKS = Ranks(0, 1, torch.device("cuda", 0))
FAST = {"recipe": "fast", "max_lr": 3e-3, "muon_lr": 6e-3}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data, tmp_path):
    return lambda **changes: tiny_config(data, tmp_path / "log", **{"device": "cuda", "compile": False, **changes})


@pytest.fixture
def waits(monkeypatch):
    """How often the host waited for the card in each step of the runs to come."""
    counts, step = [], train_gpt2.train_step

    def counted(*args):
        with device.counted() as waited:
            values = step(*args)
        counts.append(int(waited))
        return values

    monkeypatch.setattr(train_gpt2, "train_step", counted)
    return counts


def hellaswag_file(directory: Path) -> Path:
    """Forty small examples; of all kinds of lengths."""
    path = directory / "hellaswag.jsonl"
    with path.open("w") as lines:
        for i in range(40):
            endings = [f"{'abcdefghijkl'[: 3 + (i + j) % 7]} {i * j % 10}." for j in range(4)]
            record = {"ctx": "This is the context"[: 6 + i % 13], "label": i % 4, "endings": endings}
            lines.write(json.dumps(record | {"ind": i, "activity_label": "x", "ctx_a": "a", "ctx_b": "b"}) + "\n")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"dtype": "float32"}, {"dtype": "bfloat16", "micro_batch": 2}, FAST,
     {"recompute": True}, {"sdpa": "flash"}],
    ids=["bfloat16", "float16", "float32", "micro_batches", "muon", "recompute", "flash"],
)  # fmt: skip
def test_a_run_equals_the_cpus_and_no_step_waits(config, tmp_path, waits, changes):
    main(config(**changes))
    assert waits == [0] * 10
    main(config(device="cpu", log_dir=str(tmp_path / "cpu"), **changes, **({} if "dtype" in changes else BF16)))
    ours, theirs = read_log(tmp_path / "log"), read_log(tmp_path / "cpu")
    assert ours["train"].keys() == theirs["train"].keys() and len(ours["train"]) == 10
    for stream, tolerance in (("train", 2e-3), ("val", 2e-3), ("norm", 2e-2)):
        for step, value in ours[stream].items():
            assert value == pytest.approx(theirs[stream][step], rel=tolerance), (stream, step)
    assert ours["val"][10] < ours["val"][0] - 0.2


BF16 = {"dtype": "bfloat16"}  # what the card chooses


def test_a_wait_in_a_step_is_seen(config, waits, monkeypatch):
    forward = GPT.forward

    def nosy(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        if torch.is_grad_enabled():
            loss.item()
        return logits, loss

    monkeypatch.setattr(GPT, "forward", nosy)
    main(config(micro_batch=2))
    assert waits == [4] * 10


def test_a_tensor_left_on_the_cpu_is_refused(config, monkeypatch):
    features = GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, idx, **options: features(self, idx, **options) * torch.ones(32))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        main(config())


def test_hellaswag_and_samples_are_the_cpus(config, tmp_path, capsys):
    changes = {
        "dtype": "float32", "max_steps": 4, "hella_every": 2, "hella_data": str(hellaswag_file(tmp_path)),
        "sample_every": 2, "sample_prompt": "A", "val_every": 0, "seq_len": 64, "micro_batch": 4,
    }  # fmt: skip
    values, screens = [], []
    for kind in ("cuda", "cpu"):
        values.append(main(config(device=kind, log_dir=str(tmp_path / kind), **changes)))
        screens.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("  >")])
    assert values[0]["hella"] == pytest.approx(values[1]["hella"]) and 0 < values[0]["hella"] < 1
    assert len(screens[0]) == 12 and len(set(screens[0])) > 8 and screens[0] == screens[1]


@pytest.mark.parametrize("sdpa", ["auto", "cudnn", "flash"])
def test_only_training_may_use_cudnn(config, tmp_path, monkeypatch, sdpa):
    """cuDNN plans once for each shape, in some tenths of a second: HellaSwag's batches and samples have a hundred."""
    seen, attention, cudnn = {True: set(), False: set()}, F.scaled_dot_product_attention, torch.backends.cuda

    def watched(*args, **kwargs):
        seen[torch.is_grad_enabled()].add((cudnn.cudnn_sdp_enabled(), cudnn.flash_sdp_enabled()))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    evals = {"hella_every": 2, "hella_data": str(hellaswag_file(tmp_path)), "sample_every": 2, "sample_prompt": "A"}
    main(config(sdpa=sdpa, max_steps=4, seq_len=64, micro_batch=4, val_every=2, **evals))
    assert seen == {True: {(sdpa != "flash", sdpa != "cudnn")}, False: {(False, True)}}


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "float16"}, FAST], ids=["bf16", "fp16", "muon"])
def test_a_resumed_run_is_the_undisturbed_one(config, tmp_path, changes):
    main(config(**changes))
    last = tmp_path / "log" / "ckpt_000010.pt"
    whole = torch.load(last, map_location="cpu", weights_only=True)
    last.unlink()
    main(config(resume=True, **changes))
    again = torch.load(last, map_location="cpu", weights_only=True)
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name]), name
    assert whole["scaler"] == again["scaler"] and again["step"] == 10


# ----------------------------------------------------------------------------------------------------------------------
# A gradient that isn't finite


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "float16"}, FAST], ids=["bf16", "fp16", "muon"])
def test_a_bad_gradient_changes_nothing(config, changes):
    """In float16 the scale is halved, too; the step after is a step again."""
    settings = config(**changes)
    run = Run(settings, RANKS)
    train_gpt2.train_step(run, run.batch(0), 1e-3)
    before, scale = snapshot(run), run.scaler.get_scale()
    bad = run.raw_model.transformer.h[1].mlp.c_fc.weight.register_hook(lambda grad: grad * torch.inf)
    with device.counted() as waited:
        _, norm = train_gpt2.train_step(run, run.batch(1), 1e-3)
    assert int(waited) == 0 and not torch.isfinite(norm)
    after = snapshot(run)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if settings.dtype == "float16":
        assert run.scaler.get_scale() == scale / 2
    bad.remove()
    _, norm = train_gpt2.train_step(run, run.batch(1), 1e-3)
    assert torch.isfinite(norm) and not any(torch.equal(before[k], v) for k, v in snapshot(run).items() if v.dim() == 2)


def snapshot(run) -> dict:
    """Copies of the weights, and of all that the optimizer keeps."""
    tensors = dict(run.raw_model.named_parameters())
    for i, state in enumerate(run.optimizer.state.values()):
        tensors |= {f"{i} {name}": value for name, value in state.items()}
    return {name: value.detach().clone().cpu() for name, value in tensors.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Memory

BIG = {"total_batch_size": 64 * 32, "micro_batch": 0, "max_steps": 2}


@pytest.fixture(params=["eager", "compiled"])
def compiled(request, monkeypatch):
    """Compiled: by Dynamo and AOTAutograd, which hold tensors of their own; Inductor would need a real card."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(train_gpt2, "wants_compile", lambda asked, ranks: asked)  # whatever becomes of Triton here
    yield request.param == "compiled"
    torch.compiler.reset()


def measured(config, B: int) -> tuple[int, int, int]:
    """Bytes of a Run with that micro-batch: held after it, the most up to its first backward, the most of all."""
    gc.collect()
    start, backward, forward = device.card.card_allocated(), torch.Tensor.backward, []

    def watched(loss, *args, **kwargs):
        forward.append(device.card.card_peak() - start)
        backward(loss, *args, **kwargs)

    device.card.card_reset_peak()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", watched)
        run = Run(config(**{**BIG, "micro_batch": B}), RANKS)
    assert run.micro_batch == B
    return device.card.card_allocated() - start, forward[0], device.card.card_peak() - start


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_out_of_memory_at_first_halves_the_micro_batch(config, compiled, phase, monkeypatch, capsys):
    config = partial(config, compile=compiled, dtype="bfloat16")
    held, _, enough = measured(config, 32)
    _, needed, _ = measured(config, 64)
    assert enough < needed, "there is a limit under which 32 fits, and 64 fails in the forward"
    results, backward = [], torch.Tensor.backward

    def full_at_first(loss, *args, **kwargs):
        with device.limited_to(0) if phase == "backward" and not results else nullcontext():
            results.append("failed")
            backward(loss, *args, **kwargs)
            results[-1] = "done"

    monkeypatch.setattr(torch.Tensor, "backward", full_at_first)
    gc.collect()
    gc.disable()  # what only a collection gives back counts as held
    try:
        start = device.card.card_allocated()
        with device.limited_to((enough + needed) // 2) if phase == "forward" else nullcontext():
            run = Run(config(**BIG), RANKS)
            left = device.card.card_allocated() - start
            losses = [train_gpt2.train_step(run, run.batch(step), 1e-3)[0].item() for step in range(2)]
    finally:
        gc.enable()
    assert results[0] == ("failed" if phase == "backward" else "done") and set(results[1:]) == {"done"}
    assert run.micro_batch == 32 and left == held
    assert "trying micro-batch 32" in capsys.readouterr().out
    run = Run(config(**{**BIG, "micro_batch": 32}), RANKS)
    assert losses == [train_gpt2.train_step(run, run.batch(step), 1e-3)[0].item() for step in range(2)]


@pytest.mark.parametrize(
    "words, is_memory",
    [
        ("CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("an illegal memory access was encountered", False),
    ],
)
def test_what_libraries_say_for_want_of_memory(config, monkeypatch, words, is_memory):
    calls, backward = [], torch.Tensor.backward

    def failing_at_first(loss, *args, **kwargs):
        calls.append(loss)
        if len(calls) == 1:
            raise RuntimeError(f"CUDA error: {words}")
        backward(loss, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", failing_at_first)
    if is_memory:
        assert Run(config(**BIG), RANKS).micro_batch == 32
    else:
        with pytest.raises(RuntimeError, match=words):
            Run(config(**BIG), RANKS)


def test_no_memory_for_one_sequence_is_a_message(config):
    with device.limited_to(300_000), pytest.raises(ValueError, match="out of memory with --micro_batch 1;"):
        Run(config(**BIG), RANKS)
