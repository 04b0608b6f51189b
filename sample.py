"""
Text from a checkpoint of ours, or from pretrained GPT-2 weights.

    python sample.py --model log --prompt "Once upon a time"        # the newest checkpoint of a run
    python sample.py --model gpt2 --num_samples 3 --stream          # no prompt: asks for one, again and again
    python sample.py --model log --export exported                  # a directory for transformers, lm-eval, llama.cpp

Left alone, sampling is at temperature 1.0 from the 50 likeliest tokens, and ends at <|endoftext|>.
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import UserError, knob, run
from generate import stream
from tokenizer import load_tokenizer
from train_gpt2 import GPT, load_model


@dataclass
class Config:
    model: str = knob("log", "a checkpoint, a run directory, a hub name or a GPT-2 directory", group="model")
    device: str = knob("auto", "cuda, mps or cpu")
    export: str = knob("", "write the model to this directory, in transformers' form, instead of sampling", metavar="DIR")
    prompt: str | None = knob(None, "how the text begins; without it you are asked", group="text", metavar="TEXT")
    prompt_file: str = knob("", "a file with the prompt", metavar="FILE")
    num_samples: int = knob(1, "continuations of each prompt")
    max_new_tokens: int = knob(100, "tokens to add, at most")
    stream: bool = knob(False, "print as it is drawn, one sample after the other")
    temperature: float = knob(1.0, "below 1 is safer, above 1 wilder; 0 takes the likeliest token", group="sampling")
    top_k: int = knob(50, "draw from the k likeliest tokens; 0 = from all")
    top_p: float = knob(1.0, "draw from the fewest tokens that have this probability together")
    repetition_penalty: float = knob(1.0, "above 1 makes tokens that were there less likely")
    seed: int = knob(1337, "the same seed draws the same text")


def main(config: Config) -> None:
    check(config)
    model, tokenizer_name = load_model(config.model)
    tokenizer = load_tokenizer(tokenizer_name)
    if config.export:
        model.save_pretrained(config.export)
        print(f"wrote {config.export}: transformers' AutoModelForCausalLM and AutoTokenizer load it")
        return
    model.to(choose_device(config.device)).eval()
    for prompt in prompts(config):
        for text in (spoken if config.stream else written)(model, tokenizer, prompt, config):
            print(text, end="", flush=True)
            if not config.stream:
                print("\n" + "-" * 80)
        if config.stream:
            print()


def check(config: Config) -> None:
    if config.prompt == "":
        raise UserError("--prompt is empty; give it some text, or leave it out and be asked")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top_p is {config.top_p}; it is a probability, above 0 and up to 1")
    if config.temperature < 0 or config.repetition_penalty <= 0 or config.top_k < 0:
        raise UserError("--temperature and --top_k must not be negative, --repetition_penalty must be above 0")
    if config.num_samples < 1 or config.max_new_tokens < 1:
        raise UserError("--num_samples and --max_new_tokens must be at least 1")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not here; use auto, cuda, mps or cpu") from error


def prompts(config: Config) -> Iterator[str]:
    """The prompt of the command line or the file; else what is typed, until the end of input."""
    if config.prompt is not None:
        yield config.prompt
    elif config.prompt_file:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read --prompt_file {config.prompt_file}: {error}") from error
        if not text:
            raise UserError(f"--prompt_file {config.prompt_file} is empty; give it some text")
        yield text
    else:
        print("A prompt, then Enter; an empty line ends.", file=sys.stderr)
        try:
            while line := input("> "):
                yield line
        except EOFError:
            return


def options(model: GPT, tokenizer, config: Config) -> dict:
    device = model.lm_head.weight.device
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    generator = torch.Generator(device).manual_seed(config.seed)
    return {name: getattr(config, name) for name in names} | {"stop": tokenizer.eot, "generator": generator}


def written(model: GPT, tokenizer, prompt: str, config: Config) -> Iterator[str]:
    """Whole samples, drawn side by side: prompt and continuation, up to end-of-text."""
    ids = tokenizer.encode(prompt)
    idx = torch.tensor([ids] * config.num_samples, device=model.lm_head.weight.device)
    for row in model.generate(idx, config.max_new_tokens, **options(model, tokenizer, config)).tolist():
        new = row[len(ids) :]
        yield tokenizer.decode(ids + new[: new.index(tokenizer.eot) if tokenizer.eot in new else len(new)])


def spoken(model: GPT, tokenizer, prompt: str, config: Config) -> Iterator[str]:
    """Text as it comes, the samples one after the other; a character is shown when all its bytes are there."""
    idx = torch.tensor([tokenizer.encode(prompt)], device=model.lm_head.weight.device)
    settings = options(model, tokenizer, config)
    for _ in range(config.num_samples):
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        yield prompt
        for token in stream(model, idx, config.max_new_tokens, **settings):
            if token.item() != tokenizer.eot:
                yield characters.decode(tokenizer.decode_bytes([token.item()]))
        yield characters.decode(b"", final=True) + "\n"


if __name__ == "__main__":
    run(main, Config, __doc__)
