"""The global stream of samples: nothing lost, nothing repeated, the same for any number of ranks."""

import shutil

import numpy as np
import pytest
import torch
from tiny import USER_ERRORS, tiny_config, token_set

from train_gpt2 import LocalError, Ranks, SampleStream, Shard, batch_of_step, main, open_shards, read_manifest

T = 16


def numbered(lengths, masks=None) -> list[Shard]:
    """Shards whose tokens are their own numbers: 0, 1, 2 ... over all of them."""
    ends = np.cumsum([0, *lengths])
    shards = [np.arange(a, b).astype(np.uint16) for a, b in zip(ends, ends[1:])]
    return [Shard(str(i), tokens, None if masks is None else masks[i]) for i, tokens in enumerate(shards)]


def rank(r, world_size) -> Ranks:
    return Ranks(r, world_size, torch.device("cpu"))


# 33 = 2 T + 1: a whole number of sequences; 17 = T + 1: just one; 15: none
@pytest.mark.parametrize("order", ["shuffle", "sequential"])
@pytest.mark.parametrize("lengths", [[100, 33, 250], [17, 400], [15, 100], [1000]])
def test_an_epoch_reads_every_token_of_a_shard_once_but_at_most_T(order, lengths):
    sequences = SampleStream(numbered(lengths), T, 2**16, order, seed=3)
    for epoch in range(3):
        x, y = sequences.read(range(epoch * len(sequences), (epoch + 1) * len(sequences)))
        assert (y == x + 1).all(), "a window never crosses into another shard, and targets are the next tokens"
        seen = np.sort(y.flatten())
        assert len(np.unique(seen)) == len(seen), "no target twice"
        ends = np.cumsum([0, *lengths])
        for first, end in zip(ends, ends[1:]):
            unread = (end - first - 1) - ((seen > first) & (seen < end)).sum()
            assert unread <= T


def test_sequential_order_is_the_shards_from_the_start():
    sequences = SampleStream(numbered([100, 33, 250]), T, 2**16)
    x, _ = sequences.read(range(len(sequences)))
    starts = [*range(0, 100 - T, T), *range(100, 133 - T, T), *range(133, 383 - T, T)]
    expected = [start + np.arange(T) for start in starts]
    assert (x == np.array(expected)).all()


def test_shuffling_is_by_seed_and_epoch_and_moves_the_cuts():
    sequences = SampleStream(numbered([1000, 1003]), T, 2**16, "shuffle", seed=3)
    n = len(sequences)
    first, second = sequences.read(range(n))[0], sequences.read(range(n, 2 * n))[0]
    assert not (first == second).all()
    assert (first != np.sort(first, axis=0)).any(), "sequences are permuted"
    assert set(first[:, 0] % T) != set(second[:, 0] % T), "they are cut elsewhere in the next epoch"
    again = SampleStream(numbered([1000, 1003]), T, 2**16, "shuffle", seed=3)
    assert (again.read(range(n, 2 * n))[0] == second).all(), "and it needs no history"
    other = SampleStream(numbered([1000, 1003]), T, 2**16, "shuffle", seed=4)
    assert (other.read(range(n))[0] != first).any()


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_the_batch_of_a_step_is_the_same_for_any_ranks_and_micro_batch(order):
    sequences, G = SampleStream(numbered([300, 500]), T, 2**16, order), 16  # an epoch is 49 samples: it wraps
    for step in (0, 2, 3, 7):
        expected = sequences.read(range(step * G, (step + 1) * G))[0]
        for W in (1, 2, 4, 8):
            for B in (1, 2, G // W):
                parts = [batch_of_step(sequences, step * G, G, B, rank(r, W))[0] for r in range(W)]
                assert all(part.shape == (G // W // B, B, T) for part in parts)
                together = torch.stack(parts, dim=1).reshape(G, T)  # micro-batch, rank, row: the order of the samples
                assert (together.numpy() == expected).all()


def test_a_shard_shorter_than_a_batch_is_used():
    sequences = SampleStream(numbered([40]), T, 2**16)
    x, _, _ = batch_of_step(sequences, 0, 8, 8, rank(0, 1))
    assert (x[0, :, 0].numpy() == [0, 16] * 4).all()


def test_weights_are_shares_of_the_targets():
    masks = [np.zeros(400, dtype=np.uint8)]
    masks[0][5:30] = 1  # all targets in the first two sequences
    sequences = SampleStream(numbered([400], masks), T, 2**16)
    _, y, _ = batch_of_step(sequences, 0, 8, 8, rank(0, 1))
    assert (y >= 0).sum() == 25 and y[y >= 0].tolist() == list(range(5, 30))
    assert batch_of_step(sequences, 0, 8, 1, rank(0, 1))[2] == pytest.approx([12 / 25, 13 / 25] + [0] * 6)
    assert batch_of_step(sequences, 0, 8, 1, rank(1, 2))[2] == pytest.approx([2 * 13 / 25, 0, 0, 0])
    plain = SampleStream(numbered([400]), T, 2**16)
    assert batch_of_step(plain, 0, 8, 2, rank(1, 2))[2] == [1 / 2, 1 / 2]


def test_no_window_fits():
    with pytest.raises(USER_ERRORS, match=r"--seq_len 16 \+ 1 tokens, only 16"):
        SampleStream(numbered([16, 3]), T, 2**16)


def test_an_id_that_is_no_token_is_named():
    with pytest.raises(LocalError, match="holds id 99, its tokenizer has 50 ids"):
        SampleStream(numbered([100]), 99, 50).read([0])


UNFINISHED = '{"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "shards": [], "complete": false}'


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: [p.unlink() for p in d.glob("*train*")], "lacks edufineweb_train_000001.npy"),
        (lambda d: [p.unlink() for p in d.glob("*")], "no train shards in .* run fineweb.py first"),
        (lambda d: np.save(d / "edufineweb_train_000001.npy", np.zeros(3000, dtype=np.int64)), "holds int64"),
        (lambda d: np.save(d / "edufineweb_train_000001.npy", np.zeros((30, 100), dtype=np.uint16)), r"\[30, 100\]"),
        (lambda d: np.save(d / "edufineweb_train_000001.npy", np.zeros(9, dtype=np.uint16)), "9 tokens and manifest"),
        (lambda d: (d / "edufineweb_train_000001.npy").write_bytes(b"PK"), "not a whole .npy"),
        (lambda d: np.save(d / "edufineweb_train_000001.npy", np.array([{}]), allow_pickle=True), "not a whole .npy"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda d: (d / "manifest.json").write_text(UNFINISHED), "not finished"),
        (lambda d: np.save(d / "edufineweb_train_000001.mask.npy", np.zeros(9, dtype=np.uint8)), "mask.npy 9"),
    ],
)  # fmt: skip
def test_a_damaged_set_is_refused_by_name(tmp_path, damage, message):
    token_set(tmp_path)
    damage(tmp_path)
    with pytest.raises(USER_ERRORS, match=message):
        open_shards(str(tmp_path), read_manifest(str(tmp_path)), "train")


def test_a_set_without_a_manifest_is_gpt2_tokens(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(100, dtype=np.uint16))
    manifest = read_manifest(str(tmp_path))
    assert manifest["tokenizer"] == {"name": "gpt2", "vocab_size": 50257}
    assert len(open_shards(str(tmp_path), manifest, "train")) == 1


def bin_set(directory, source, names) -> None:
    """The shards in `source`, as llm.c and modded-nanogpt write them."""
    directory.mkdir()
    for path in sorted(source.glob("*.npy")):
        tokens, split = np.load(path), path.name.split("_")[1]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens)
        (directory / names[split].format(int(path.stem[-6:]))).write_bytes(header.tobytes() + tokens.tobytes())


NAMES = {split: f"fineweb_{split}_{{:06d}}.bin" for split in ("train", "val")}


@pytest.mark.parametrize("names", [NAMES, {"train": "shakespeare_train.bin", "val": "shakespeare_val.bin"}])
def test_bin_files_train_as_the_same_tokens_in_npy_files(tmp_path, names):
    lengths = (2000, 3000, 2500) if names is NAMES else (2000, 3000)
    npy = token_set(tmp_path / "npy", lengths, "gpt2", 50257)
    (npy / "manifest.json").unlink()
    bin_set(tmp_path / "bin", npy, names)
    values = [main(tiny_config(tmp_path / kind, tmp_path / f"log-{kind}", max_steps=4)) for kind in ("npy", "bin")]
    assert values[0]["val"] == values[1]["val"] and values[0]["train"] == values[1]["train"]
    weights = [torch.load(tmp_path / f"log-{kind}" / "ckpt_000004.pt")["model"] for kind in ("npy", "bin")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


LIES = {
    "the magic": lambda header, tokens: header.__setitem__(0, 20240519),
    "the version": lambda header, tokens: header.__setitem__(1, 2),
    "a count too large": lambda header, tokens: header.__setitem__(2, 1001),
    "a count too small": lambda header, tokens: header.__setitem__(2, 999),
    "an odd length": lambda header, tokens: tokens.__setitem__(slice(1), b""),
    "cut off in the header": lambda header, tokens: tokens.__setitem__(slice(None), b""),
    "an id that is no token": lambda header, tokens: tokens.__setitem__(slice(10, 12), b"\xff\xff"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_bin_file_that_lies_is_named(tmp_path, lie):
    header, tokens = np.zeros(256, "<i4"), bytearray(np.arange(1000, 2000, dtype="<u2").tobytes())
    header[:3] = 20240520, 1, 1000
    lie(header, tokens)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes()[: 1024 if tokens else 100] + tokens)
    with pytest.raises(USER_ERRORS, match=r"000001.bin (is not a whole .bin file|begins with ids up to 65535)"):
        open_shards(str(tmp_path), read_manifest(str(tmp_path)), "train")


def test_two_kinds_of_files_are_not_mixed(tmp_path):
    npy = token_set(tmp_path / "npy", tokenizer="gpt2", vocab_size=50257)
    bin_set(tmp_path / "bin", npy, NAMES)
    shutil.copy(npy / "edufineweb_train_000001.npy", tmp_path / "bin")
    with pytest.raises(USER_ERRORS, match=r"has \.npy and \.bin files of train"):
        open_shards(str(tmp_path / "bin"), read_manifest(str(tmp_path / "bin")), "train")
