"""The house rules: importing does nothing, files and functions keep their size, arrows point one way."""

import ast
import subprocess
import sys

from tiny import ROOT

MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
HEAVY = {"transformers", "datasets", "matplotlib", "pyarrow", "huggingface_hub", "tiktoken", "gigatoken", "hypothesis"}
PROBE = """
import importlib, socket, sys, threading
socket.socket.connect = None  # whoever calls home fails
for module in sys.argv[1:]:
    importlib.import_module(module)
    print(module, threading.active_count(), *sorted(set(sys.modules) & HEAVY))
if sys.modules["torch"].cuda.is_initialized():
    print("CUDA is initialized")
"""


def test_importing_is_silent_and_light():
    probe = PROBE.replace("HEAVY", repr(HEAVY))
    result = subprocess.run([sys.executable, "-c", probe, *MODULES], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines() == [f"{module} 1" for module in MODULES] and result.stderr == ""


def test_files_and_functions_keep_their_size():
    too_long = []
    for module in MODULES:
        text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
        if module == "train_gpt2" and text.count("\n") > 700:
            too_long.append(f"train_gpt2.py: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > (80 if node.name == "main" else 60):
                    too_long.append(f"{module}.{node.name}: {lines} lines")
    assert not too_long
    trainer = ast.parse((ROOT / "train_gpt2.py").read_text(encoding="utf-8"))
    loop = next(node for node in ast.walk(trainer) if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno <= 35


def test_arrows_point_one_way():
    imports = {}
    for module in MODULES:
        tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imports[module] = names & set(MODULES)
    assert [module for module, names in imports.items() if "train_gpt2" in names] == ["sample"]
    assert imports["hellaswag"] <= {"cli", "files", "machine", "tokenizer"}
    assert imports["plot_log"] <= {"cli", "files", "reference", "tokenizer"}
    settled: set[str] = set()
    while ready := {module for module in imports if imports[module] <= settled} - settled:
        settled |= ready
    assert settled == set(MODULES), "there is a cycle"
