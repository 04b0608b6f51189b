"""Two nodes of one process each: what one of them alone fails at, both say, and both end, at once."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, flags, tiny_config, token_set

from train_gpt2 import main


def run_nodes(configs: list, directories: tuple = (ROOT, ROOT), seconds: float = 60) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of a rank for each config, in a directory with the trainer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, (config, directory) in enumerate(zip(configs, directories)):
        names = {"RANK": rank, "WORLD_SIZE": len(configs), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
        command = [sys.executable, "train_gpt2.py", *flags(config)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=directory, env=environment, **pipes))
    deadline, ends = time.monotonic() + seconds, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ends.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ends


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


def on_one_node(changes: dict, guilty: int, data: Path, tmp_path: Path, **common) -> list:
    """The configs of two nodes, each with a log_dir of its own, that differ in these settings."""
    settings = [{"micro_batch": 4, **common, **(changes if rank == guilty else {})} for rank in (0, 1)]
    return [tiny_config(data, tmp_path / f"log{rank}", **of) for rank, of in enumerate(settings)]


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data_dir": "nowhere"}, "no train shards in 'nowhere'"),  # met while the run is set up
        ({"device": "cuda:7"}, "--device cuda:7: there is none here"),  # before there is a process group
        ({"max_lr": -1.0}, "--max_lr is -1.0"),
    ],
    ids=["data", "device", "flag"],
)
def test_an_error_on_one_node_ends_both(changes, words, guilty, data, tmp_path):
    ends = run_nodes(on_one_node(changes, guilty, data, tmp_path))
    assert [status for status, _, _ in ends] == [2, 2]
    assert words in ends[guilty][2] and f"rank {guilty}: {words}" in ends[1 - guilty][2]
    assert all(err.count("error:") == 1 and "Traceback" not in err for _, _, err in ends)


def test_a_log_directory_that_one_node_cannot_make(data, tmp_path):
    (tmp_path / "file").write_text("")
    ends = run_nodes(on_one_node({"log_dir": str(tmp_path / "file")}, 1, data, tmp_path))
    assert ends[0][0] == 2 and "can't be made: [Errno 17] File exists" in ends[0][2] and ends[1][0] != 0


def test_other_data_on_one_node_is_refused(data, tmp_path):
    """Other tokens of the same lengths: only the checksums tell."""
    other = shutil.copytree(data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = "another"
    (other / "manifest.json").write_text(json.dumps(manifest))
    ends = run_nodes(on_one_node({"data_dir": str(other)}, 1, data, tmp_path))
    for status, _, err in ends:
        assert status == 2 and f"all nodes need the same shards in {data}" in err.replace(str(other), str(data))


def test_a_checkpoint_on_one_node_alone_is_refused(data, tmp_path):
    main(tiny_config(data, tmp_path / "log1", max_steps=2))
    ends = run_nodes(on_one_node({}, 0, data, tmp_path, resume=True, max_steps=4))
    for status, _, err in ends:
        assert status == 2 and "all nodes need the same checkpoints in" in err and "rank by rank they have 0, 2" in err


def test_without_hellaswag_on_one_node_both_train_without(data, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ROOT / "train_gpt2.py", home)
    shutil.copytree(ROOT / "extras", home / "extras")
    example = {"ctx": "A", "label": 0, "endings": ["b", "c", "d", "e"]}
    (tmp_path / "hella.jsonl").write_text(json.dumps(example) + "\n")
    changes = {"hella_every": 1, "hella_data": str(tmp_path / "hella.jsonl"), "max_steps": 2}
    configs = [tiny_config(data, tmp_path / f"log{rank}", micro_batch=4, **changes) for rank in (0, 1)]
    ends = run_nodes(configs, (ROOT, home))
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "step: 2" in ends[0][1] and "\nhella" not in ends[0][1] and "training without HellaSwag" in ends[0][1]


def test_a_hellaswag_file_that_one_node_lacks_ends_both(data, tmp_path):
    lacking = {"hella_data": str(tmp_path / "nowhere.jsonl")}
    ends = run_nodes(on_one_node(lacking, 0, data, tmp_path, hella_every=1))
    assert [status for status, _, _ in ends] == [2, 2] and all("nowhere.jsonl" in err for _, _, err in ends)
