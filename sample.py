"""
Text from a checkpoint of ours, or from pretrained GPT-2 weights.

    python sample.py --model log --prompt "Once upon a time"        # the newest checkpoint of a run
    python sample.py --model gpt2 --num_samples 3 --stream          # no prompt: asks for one, again and again
    python sample.py --model gpt2 --prompt_file prompts.txt         # one prompt, or several between lines of ---
    python sample.py --model log --export exported                  # a directory for transformers, lm-eval, llama.cpp

Left alone, sampling is at temperature 1.0 from the 50 likeliest tokens, and ends at <|endoftext|>. All samples of all
prompts are drawn side by side, as many at once as memory allows; with --stream one after the other, so that of several
the draws fall otherwise: a single one is the same either way. Ctrl-C ends it.
"""

import codecs
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from extras.checkpoints import load_any
from extras.cli import UserError, run
from extras.generation import pad_left, stream, use_onednn
from extras.tokenizer import load_tokenizer
from train_gpt2 import GPT, find_device, keep_freed_memory

SAMPLES_BYTES = 2**31  # for what is kept of the samples that are drawn side by side
READERS = {  # of an exported model, by its number of tokens
    50257: "for transformers (AutoModelForCausalLM, AutoTokenizer), lm-eval and llama.cpp's convert_hf_to_gguf.py",
    257: "for transformers and lm-eval; llama.cpp's converter knows no tokenizer of bytes, and refuses it",
    None: "without a tokenizer, for it is not known which tokens these are; AutoModelForCausalLM loads it",
}


@dataclass
class Config:
    """All settings; each is a flag of the same name."""

    model: str = "log"  # a checkpoint, a run directory, a hub name or a GPT-2 directory
    device: str = "auto"  # cuda, mps or cpu
    compile: bool = False  # torch.compile the model: costs a minute, pays for long texts on a GPU
    export: str = ""  # a directory: write the model to it in transformers' form, instead of sampling
    prompt: str | None = None  # how the text begins; without it you are asked
    prompt_file: str = ""  # a file with a prompt, or with several between lines of ---
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 100  # tokens to add, at most
    stream: bool = False  # print as it is drawn, one sample after the other
    temperature: float = 1.0  # below 1 is safer, above 1 wilder; 0 takes the likeliest token
    top_k: int = 50  # draw from the k likeliest tokens; 0 = from all
    top_p: float = 1.0  # draw from the fewest tokens that have this probability together
    repetition_penalty: float = 1.0  # above 1 makes tokens that were there less likely
    seed: int = 1337  # the same seed draws the same text


def main(config: Config) -> None:
    check(config)
    model = GPT.of(*load_any(config.model))
    if config.export:
        model.save_pretrained(config.export)
        print(f"wrote {config.export} {READERS.get(model.config.n_tokens, READERS[None])}")
        return
    tokenizer = load_tokenizer("bytes" if model.config.n_tokens == 257 else "gpt2")
    if tokenizer.n_vocab != model.config.n_tokens:
        raise UserError(
            f"{config.model} has {model.config.n_tokens} tokens, and it is not known which: GPT-2's are 50257, bytes "
            "257; with another tokenizer use GPT.generate in Python"
        )
    device = find_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    draw = spoken if config.stream else written
    try:
        model.to(device).eval()
        use_onednn(model)
        if config.compile:
            model.features = torch.compile(model.features)
        for asked, prompts in enumerate(batches_of_prompts(config)):  # who asks again wants another answer
            for text in draw(model, tokenizer, prompts, replace(config, seed=config.seed + asked)):
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        print()  # so that the shell's prompt begins a line
        raise


def check(config: Config) -> None:
    if not os.path.exists(config.model) and config.model == Config.model:
        raise UserError("no run in log/; name a checkpoint, a run directory or pretrained weights with --model")
    if config.prompt is not None and config.prompt_file:
        raise UserError("--prompt and --prompt_file are two ways to say the same; give one of them")
    if config.prompt == "":
        raise UserError("--prompt is empty; give it some text, or leave it out and be asked")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top_p is {config.top_p}; it is a probability, above 0 and up to 1")
    if not (config.temperature == 0 or 1e-3 <= config.temperature < math.inf):
        raise UserError(f"--temperature is {config.temperature}; it is 0 for the likeliest token, or at least 0.001")
    if not 0 < config.repetition_penalty < math.inf:
        raise UserError(f"--repetition_penalty is {config.repetition_penalty}; it must be above 0; 1 changes nothing")
    for name, least, bits in (("top_k", 0, 63), ("num_samples", 1, 63), ("max_new_tokens", 1, 31), ("seed", 0, 63)):
        if not least <= getattr(config, name) < 2**bits:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be at least {least}, and below 2^{bits}")


def batches_of_prompts(config: Config) -> Iterator[list[str]]:
    """The prompts of the command line or the file, at once; else what is typed, one by one, until the end of input."""
    if config.prompt is not None:
        yield [config.prompt]
    elif config.prompt_file:
        try:
            text = Path(config.prompt_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"can't read --prompt_file {config.prompt_file}: {error}") from error
        prompts = re.split(r"^---\n", text.removesuffix("\n") + "\n", flags=re.MULTILINE)
        prompts = [prompt.removesuffix("\n") for prompt in prompts]  # those before ---, and the end of the file
        if not all(prompts):
            where = f"its prompt {prompts.index('') + 1} is empty" if len(prompts) > 1 else "it is empty"
            raise UserError(f"--prompt_file {config.prompt_file}: {where}; give it some text")
        yield prompts
    else:
        print("A prompt, then Enter; an empty line ends.", file=sys.stderr)
        try:
            while line := input("> " if sys.stdin.isatty() else ""):
                yield [line]
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "", file=sys.stderr)
        except UnicodeDecodeError as error:
            raise UserError(f"what was typed is not text: {error}") from error


def options(model: GPT, tokenizer, config: Config) -> dict:
    device = model.lm_head.weight.device
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    generator = torch.Generator(device).manual_seed(config.seed)
    return {name: getattr(config, name) for name in names} | {"stop": tokenizer.eot, "generator": generator}


def written(model: GPT, tokenizer, prompts: list[str], config: Config) -> Iterator[str]:
    """Whole samples, drawn side by side: prompt and continuation, up to end-of-text, and a line."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    samples = (ids for ids in encoded for _ in range(config.num_samples))
    count, settings = at_once(model, max(map(len, encoded)) + config.max_new_tokens), options(model, tokenizer, config)
    while rows := list(itertools.islice(samples, count)):
        idx, padding = pad_left(rows, model.lm_head.weight.device)
        drawn = model.generate(idx, config.max_new_tokens, padding=padding, **settings)
        for begin, row in zip(padding.tolist(), drawn.tolist()):
            new = row[idx.shape[1] :]
            new = new[: new.index(tokenizer.eot) if tokenizer.eot in new else len(new)]
            yield f"{tokenizer.decode(row[begin : idx.shape[1]] + new)}\n{'-' * 80}\n"


def at_once(model: GPT, tokens: int) -> int:
    """How many samples of so many tokens to draw side by side: their keys and values, and some copies of logits."""
    c = model.config
    return max(1, SAMPLES_BYTES // (8 * c.n_layer * c.n_embd * min(tokens, c.block_size) + 24 * c.n_tokens))


def spoken(model: GPT, tokenizer, prompts: list[str], config: Config) -> Iterator[str]:
    """Text as it comes, the samples one after the other; a character is shown when all its bytes are there."""
    settings = options(model, tokenizer, config)
    for prompt in (prompt for prompt in prompts for _ in range(config.num_samples)):
        idx = torch.tensor([tokenizer.encode(prompt)], device=model.lm_head.weight.device)
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        yield prompt
        for token in stream(model, idx, config.max_new_tokens, **settings):
            if token.item() != tokenizer.eot:
                yield characters.decode(tokenizer.decode_bytes([token.item()]))
        yield f"{characters.decode(b'', final=True)}\n{'-' * 80}\n"


if __name__ == "__main__":
    run(main, Config, __doc__)
