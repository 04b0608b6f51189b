"""The house: five scripts over one folder, importing does nothing, and files and functions stay readable.

The caps have a margin: a fork's few lines fail nothing, and a script of one's own in the root is not looked at.
"""

import ast
import subprocess
import sys

from tiny import ROOT

SCRIPTS = ["train_gpt2", "fineweb", "hellaswag", "sample", "plot_log"]
EXTRAS = sorted(f"extras.{path.stem}" for path in (ROOT / "extras").glob("*.py") if path.stem != "__init__")
HEAVY = {"transformers", "datasets", "matplotlib", "pyarrow", "huggingface_hub", "tiktoken", "gigatoken", "hypothesis"}
PROBE = """
import importlib, socket, sys, threading
socket.socket.connect = None  # whoever calls home fails
for module in sys.argv[1:]:
    importlib.import_module(module)
    print(module, threading.active_count(), *sorted(set(sys.modules) & HEAVY))
if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
    print("CUDA is initialized")
"""


def source(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def imports(node: ast.AST) -> set[str]:
    """Modules of ours that are imported anywhere within."""
    found = {alias.name for part in ast.walk(node) if isinstance(part, ast.Import) for alias in part.names}
    for part in ast.walk(node):
        if isinstance(part, ast.ImportFrom):
            found |= {part.module, *(f"{part.module}.{alias.name}" for alias in part.names)}
    return found & {*SCRIPTS, *EXTRAS}


def test_importing_is_silent_and_light():
    probe = PROBE.replace("HEAVY", repr(HEAVY))
    command = [sys.executable, "-c", probe, *SCRIPTS, *EXTRAS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == [f"{module} 1" for module in [*SCRIPTS, *EXTRAS]] and result.stderr == ""


def test_files_and_functions_fit_a_reader():
    too_long, caps = [], {"train_gpt2": 1110}
    for module in [*SCRIPTS, *EXTRAS]:
        text = source(module)
        if (lines := text.count("\n")) > caps.get(module, 900):
            too_long.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > 60:
                too_long.append(f"{module}.{node.name}: {lines} lines")
    assert not too_long
    tree = ast.parse(source("train_gpt2"))
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    loop = next(node for node in ast.walk(train) if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno <= 45
    assert sum(source(module).count("\n") for module in [*SCRIPTS, *EXTRAS]) <= 6500


def test_arrows_point_one_way():
    known = {module: imports(ast.parse(source(module))) for module in [*SCRIPTS, *EXTRAS]}
    assert [module for module in known if "train_gpt2" in known[module]] == ["sample"]
    assert all(not known[module] & set(SCRIPTS) for module in EXTRAS)
    settled: set[str] = set()
    while ready := {module for module in known if known[module] <= settled} - settled:
        settled |= ready
    assert settled == set(known), "there is a cycle"


def test_the_trainer_imports_nothing_of_ours_until_a_setting_asks():
    tree = ast.parse(source("train_gpt2"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(imports(node) for node in top)
    names = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy", "torch"}
