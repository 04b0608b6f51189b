"""
Does a small model learn the form of 200 answers? The model of `make demo`, before and after it was finetuned.

    make demo                                                  # once: log/demo, the model to begin with
    python bench/finetune_demo.py                              # some two minutes on two cores
    python bench/finetune_demo.py --model gpt2 --max_lr 1e-4   # any other that --init_from takes

The examples are made from the standard library, no two of the same name:

    {"instruction": "What is heapq.merge?", "output": "It is a function of heapq."}

200 of them are learned and 100 others asked. An answer has the form if it says `It is a KIND of MODULE.` in one line
and then ends, by end-of-text. Whether KIND is right, for which the shape of the name is enough, is counted, too, and
whether MODULE is, for which it would have to be copied: that is much for so small a model. The commands are
printed as they are run.
"""

import sys

sys.path[0] += "/.."  # the modules beside this folder, not its files of the same names

import ast
import json
import random
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from extras.cli import UserError, run
from extras.generation import pad_left
from extras.pretrained import load_any
from extras.tokenizer import alpaca_prompt, load_tokenizer
from train_gpt2 import GPT

ROOT = Path(__file__).parent.parent
KINDS = {ast.ClassDef: "class", ast.FunctionDef: "function"}
FORM = re.compile(r" It is a (class|function|method) of (\w+)\.")


@dataclass
class Config:
    model: str = "log/demo"  # the model to begin with
    out: str = "log/finetune_demo"  # examples, shards and the run go here; it must not be there yet
    examples: int = 200  # examples to learn
    asked: int = 100  # prompts that are not among them
    epochs: float = 20.0  # how often to read the examples
    max_lr: float = 2e-3  # learning rate; for a pretrained GPT-2 take less
    max_new_tokens: int = 20  # an answer that is longer did not end


def main(config: Config) -> None:
    out = Path(config.out)
    if out.exists():
        raise UserError(f"--out {out} is there already; remove it, or name another")
    examples = draw_examples(config.examples + config.asked)
    learned, asked = examples[: config.examples], examples[config.examples :]
    out.mkdir(parents=True)
    (out / "learned.jsonl").write_text("".join(json.dumps(example) + "\n" for example in learned), encoding="utf-8")
    prompts = [alpaca_prompt(example["instruction"]) for example in asked]
    (out / "prompts.txt").write_text("\n---\n".join(prompts[:3]) + "\n", encoding="utf-8")
    say = ["sample.py", "--prompt_file", f"{out}/prompts.txt", "--temperature", "0",
           "--max_new_tokens", f"{config.max_new_tokens}"]  # fmt: skip
    call(*say, "--model", config.model)
    call("fineweb.py", "--input", f"{out}/learned.jsonl", "--format", "alpaca", "--val_size", "600",
         "--out", f"{out}/data")  # fmt: skip
    call("train_gpt2.py", "--init_from", config.model, "--data_dir", f"{out}/data", "--log_dir", f"{out}/log",
         "--epochs", f"{config.epochs:g}", "--seq_len", "256", "--total_batch_size", "512",
         "--max_lr", f"{config.max_lr:g}", "--min_lr", f"{config.max_lr / 10:g}", "--warmup_steps", "10",
         "--val_every", "50", "--hella_every", "0", "--sample_every", "0", "--log_every", "50")  # fmt: skip
    call(*say, "--model", f"{out}/log")
    print(f"\n{len(learned)} examples learned, {len(asked)} others asked; of the answers, the likeliest each,")
    for name, model in (("before", config.model), ("after", f"{out}/log")):
        print(f"{name:6s} ", shares(answers(model, prompts, config.max_new_tokens), asked), flush=True)


def call(script: str, *flags: str) -> None:
    """Run one of the entry points as it is run from a shell, its command printed before what it prints."""
    print(f"\n$ python {shlex.join([script, *flags])}", flush=True)
    if subprocess.run([sys.executable, str(ROOT / script), *flags], stderr=subprocess.STDOUT).returncode:
        raise UserError(f"{script} failed, see above")


# ----------------------------------------------------------------------------------------------------------------------
# Examples


def draw_examples(count: int) -> list[dict]:
    """So many of all that there are, in an order that depends on the Python version alone."""
    found = {name: f"It is a {kind} of {name.split('.')[0]}." for name, kind in described()}
    if len(found) < count:
        raise UserError(f"this Python's standard library has {len(found)} such names, not {count}; ask for fewer")
    names = sorted(found)
    random.Random(1).shuffle(names)
    return [{"instruction": f"What is {name}?", "output": found[name]} for name in names[:count]]


def described() -> Iterator[tuple[str, str]]:
    """(qualified name, kind) of what the standard library's modules define and describe by a docstring."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for outer in ast.parse(path.read_bytes()).body:
            found = [(outer, f"{path.stem}.{outer.name}", KINDS[type(outer)])] if type(outer) in KINDS else []
            if isinstance(outer, ast.ClassDef):
                methods = [inner for inner in outer.body if isinstance(inner, ast.FunctionDef)]
                found += [(inner, f"{path.stem}.{outer.name}.{inner.name}", "method") for inner in methods]
            for node, name, kind in found:
                if ast.get_docstring(node) and len(name) <= 40 and "._" not in name:
                    yield name, kind


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def answers(source: str, prompts: list[str], max_new_tokens: int) -> list[tuple[str, bool]]:
    """The likeliest continuation of each prompt, and whether it came to its end."""
    model, tokenizer = GPT.of(*load_any(source)).eval(), load_tokenizer("gpt2")
    idx, padding = pad_left([tokenizer.encode(prompt) for prompt in prompts])
    with torch.no_grad():
        rows = model.generate(idx, max_new_tokens, temperature=0, stop=tokenizer.eot, padding=padding)
    texts = [tokenizer.decode(row).split("<|endoftext|>") for row in rows[:, idx.shape[1] :].tolist()]
    return [(text[0], len(text) > 1) for text in texts]


def shares(said: list[tuple[str, bool]], asked: list[dict]) -> str:
    """Percentages of all answers: ended, in the form, and in the form with the right kind and the right module."""
    wanted = [FORM.fullmatch(" " + example["output"]) for example in asked]
    found = [FORM.fullmatch(text) if ended else None for text, ended in said]
    counts = {
        "end by themselves": sum(ended for _, ended in said),
        "have the form": sum(answer is not None for answer in found),
        "of these with the right kind": sum(bool(answer and answer[1] == w[1]) for answer, w in zip(found, wanted)),
        "with the right module": sum(bool(answer and answer[2] == w[2]) for answer, w in zip(found, wanted)),
    }
    return ", ".join(f"{100 * count / len(asked):.0f}% {name}" for name, count in counts.items())


if __name__ == "__main__":
    run(main, Config, __doc__)
