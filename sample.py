"""
Text from a checkpoint of ours, or from pretrained GPT-2 weights.

    python sample.py --model log --prompt "Once upon a time"        # the newest checkpoint of a run
    python sample.py --model log --prompt ""                        # a document from its beginning: <|endoftext|>
    python sample.py --model gpt2 --num_samples 3 --stream          # no prompt: asks for one, again and again
    python sample.py --model gpt2 --prompt_file prompts.txt         # one prompt, or several between lines of ---
    python sample.py --model log --export exported                  # a directory for transformers, lm-eval, llama.cpp

By default a token is drawn at temperature 1.0 from the 50 likeliest, and a sample ends at <|endoftext|>. The samples of
all prompts are drawn in batches as large as memory allows; with --stream one after the other, so several samples differ
from those without it, while a single one is the same. Control characters are escaped. Ctrl-C ends it.
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
from extras.hardware import find_device, keep_freed_memory
from extras.tokenizer import encode_prompt, load_tokenizer, printable, tokenizer_name
from train_gpt2 import GPT

SAMPLES_BYTES = 2**31  # memory for the keys, values and logits of one batch of samples
LINE = "-" * 80
READERS = {  # of an exported model, by its tokenizer
    "gpt2": "for transformers (AutoModelForCausalLM, AutoTokenizer), lm-eval and llama.cpp's convert_hf_to_gguf.py",
    "bytes": "for transformers and lm-eval; llama.cpp's converter knows no tokenizer of bytes, and refuses it",
    None: "without a tokenizer, for it is not known which tokens these are; AutoModelForCausalLM loads it",
}


@dataclass
class Config:
    """All settings; each is a flag of the same name."""

    model: str = "log"  # a checkpoint, a run directory, a hub name or a GPT-2 directory
    device: str = "auto"  # cuda, mps or cpu
    compile: bool = False  # torch.compile the model: costs a minute, pays for long texts on a GPU
    export: str = ""  # a directory: write the model to it in transformers' form, instead of sampling
    prompt: str | None = None  # how the text begins; "" or <|endoftext|> begins a document; without it you are asked
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
    n_tokens = model.config.n_tokens
    name = tokenizer_name(n_tokens)
    if config.export:
        model.save_pretrained(config.export)
        print(f"wrote {config.export} {READERS[name]}")
        return
    if name is None:
        raise UserError(
            f"{config.model} has {n_tokens} tokens, and it is not known which: GPT-2's are 50257, bytes 257; with "
            "another tokenizer use GPT.generate in Python"
        )
    tokenizer, device = load_tokenizer(name), find_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    draw = stream_samples if config.stream else draw_batches
    try:
        model.to(device).eval()
        use_onednn(model)
        if config.compile:
            model.features = torch.compile(model.features)
        for asked, prompts in enumerate(batches_of_prompts(config)):  # who asks again wants another answer
            for text in draw(model, tokenizer, prompts, replace(config, seed=config.seed + asked)):
                print(printable(text), end="", flush=True)
    except KeyboardInterrupt:
        print()  # so that the shell's prompt begins a line
        raise


def check(config: Config) -> None:
    if not os.path.exists(config.model) and config.model == Config.model:
        raise UserError("no run in log/; name a checkpoint, a run directory or pretrained weights with --model")
    if config.prompt is not None and config.prompt_file:
        raise UserError("--prompt and --prompt_file are two ways to say the same; give one of them")
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
        prompts = [prompt.removesuffix("\n") for prompt in re.split(r"(?m)^---\n", text.removesuffix("\n") + "\n")]
        if not all(prompts):
            where = f"prompt {prompts.index('') + 1} of {len(prompts)}"
            raise UserError(f"--prompt_file {config.prompt_file}: {where} is empty; <|endoftext|> begins a document")
        yield prompts
    else:
        print("A prompt, then Enter; <|endoftext|> begins a document; an empty line ends.", file=sys.stderr)
        try:
            while line := input("> " if sys.stdin.isatty() else ""):
                yield [line]
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "", file=sys.stderr)
        except UnicodeDecodeError as error:
            raise UserError(f"what was typed is not text: {error}") from error


def options(model: GPT, tokenizer, config: Config) -> dict:
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(config.seed)
    return {name: getattr(config, name) for name in names} | {"stop": tokenizer.eot, "generator": generator}


def draw_batches(model: GPT, tokenizer, prompts: list[str], config: Config) -> Iterator[str]:
    """Whole samples, drawn in batches: prompt and continuation, up to end-of-text, and a line."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    samples = (prompt for prompt in encoded for _ in range(config.num_samples))
    tokens = max(len(ids) for ids, _ in encoded) + config.max_new_tokens
    count, settings = batch_size(model, tokens), options(model, tokenizer, config)
    while batch := list(itertools.islice(samples, count)):
        idx, padding = pad_left([ids for ids, _ in batch], model.lm_head.weight.device)
        drawn = model.generate(idx, config.max_new_tokens, padding=padding, **settings)
        for (_, text), new in zip(batch, drawn[:, idx.shape[1] :].tolist()):
            new = new[: new.index(tokenizer.eot) if tokenizer.eot in new else len(new)]
            yield f"{text}{tokenizer.decode(new)}\n{LINE}\n"


def batch_size(model: GPT, tokens: int) -> int:
    """How many samples of so many tokens to draw at once: their keys and values, and some copies of logits."""
    c = model.config
    return max(1, SAMPLES_BYTES // (8 * c.n_layer * c.n_embd * min(tokens, c.block_size) + 24 * c.n_tokens))


def stream_samples(model: GPT, tokenizer, prompts: list[str], config: Config) -> Iterator[str]:
    """Text as it comes, the samples one after the other; a character is shown when all its bytes are there."""
    settings = options(model, tokenizer, config)
    for prompt in (prompt for prompt in prompts for _ in range(config.num_samples)):
        ids, text = encode_prompt(tokenizer, prompt)
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        yield text
        idx = torch.tensor([ids], device=model.lm_head.weight.device)
        for token in stream(model, idx, config.max_new_tokens, **settings):
            if token.item() != tokenizer.eot:
                yield characters.decode(tokenizer.decode_bytes([token.item()]))
        yield f"{characters.decode(b'', final=True)}\n{LINE}\n"


if __name__ == "__main__":
    run(main, Config, __doc__)
