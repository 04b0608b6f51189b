"""
Text from a checkpoint of ours, or from pretrained GPT-2 weights.

    python sample.py --model log --prompt "Once upon a time"        # the newest checkpoint of a run
    python sample.py --model log --prompt ""                        # a document from its beginning: <|endoftext|>
    python sample.py --model gpt2 --num_samples 3 --stream          # no prompt: asks for one, again and again
    python sample.py --model gpt2 --prompt_file prompts.txt         # one prompt, or several between lines of ---
    python sample.py --model log --format chat --system "Be brief"  # a conversation with a model finetuned on chats
    python sample.py --model log --format alpaca --prompt "Add 1 2" # an instruction, as fineweb.py --format writes it
    python sample.py --model log --export exported                  # a directory for transformers, lm-eval, llama.cpp

By default a token is drawn at temperature 1.0 from the 50 likeliest, and a sample ends at <|endoftext|>. The samples of
all prompts are drawn in batches as large as memory allows; with --stream one after the other, so several samples differ
from those without it, while a single one is the same. Control characters are escaped. Ctrl-C ends it; during an answer
of a conversation it ends that answer. A conversation's oldest turns are left out when the model can't see them all.
"""

import codecs
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from extras.cli import UserError, run, user_error
from extras.generation import continue_texts, stream, use_onednn
from extras.hardware import find_device, keep_freed_memory
from extras.tokenizer import END, alpaca_prompt, encode_chat, encode_prompt, printable, tokenizer_for, tokenizer_name
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
    format: Literal["text", "alpaca", "chat"] = "text"  # what a prompt is: text, or as fineweb.py --format prepared it
    system: str = ""  # with --format chat: the system's message, before all others
    prompt: str | None = None  # how the text begins; "" or <|endoftext|> begins a document; without it you are asked
    prompt_file: str = ""  # a file with a prompt, or with several between lines of ---
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int | None = None  # tokens to add, at most (default: 100; in a chat half of those the model sees)
    stream: bool = False  # print as it is drawn, one sample after the other
    temperature: float = 1.0  # below 1 is safer, above 1 wilder; 0 takes the likeliest token
    top_k: int = 50  # draw from the k likeliest tokens; 0 = from all
    top_p: float = 1.0  # draw from the fewest tokens that have this probability together
    repetition_penalty: float = 1.0  # above 1 makes tokens already in the text less likely
    seed: int = 1337  # the same seed draws the same text


def main(config: Config) -> None:
    check(config)
    model = GPT.from_pretrained(config.model)
    if config.export:
        model.save_pretrained(config.export)
        print(f"wrote {config.export} {READERS[tokenizer_name(model.config.n_tokens)]}")
        return
    tokenizer, device = tokenizer_for(model.config.n_tokens, config.model), find_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    options["generator"] = torch.Generator(device).manual_seed(config.seed)
    options["max_new_tokens"] = config.max_new_tokens or (model.config.block_size if config.format == "chat" else 100)
    draw = stream_samples if config.stream else draw_batches
    try:
        model.to(device).eval()
        use_onednn(model)
        if config.compile:
            model.features = torch.compile(model.features)
        if config.format == "chat":
            return chat(model, tokenizer, config.system, prompts_of(config), options)
        for prompts in prompts_of(config):
            if config.format == "alpaca":
                prompts = [END + alpaca_prompt(prompt) for prompt in prompts]
            for text in draw(model, tokenizer, prompts, config.num_samples, options):
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
        if (value := getattr(config, name)) is not None and not least <= value < 2**bits:
            raise UserError(f"--{name} is {value}; it must be at least {least}, and below 2^{bits}")
    if config.format != "chat" and config.system:
        raise UserError("--system goes with --format chat only; add that, or put it into the prompt")
    if config.format == "chat" and config.num_samples != 1:
        raise UserError(f"--num_samples is {config.num_samples}; with --format chat a message has one answer")


def prompts_of(config: Config) -> Iterator[list[str]]:
    """The prompts of the command line or the file, at once; else what is typed, one by one, until the end of input."""
    if config.prompt is not None:
        yield [config.prompt]
    elif config.prompt_file:
        with user_error(f"can't read --prompt_file {config.prompt_file}", OSError, UnicodeDecodeError):
            text = Path(config.prompt_file).read_text(encoding="utf-8-sig")
        prompts = [prompt.removesuffix("\n") for prompt in re.split(r"(?m)^---\n", text.removesuffix("\n") + "\n")]
        if not all(prompts):
            where = f"prompt {prompts.index('') + 1} of {len(prompts)}"
            raise UserError(f"--prompt_file {config.prompt_file}: {where} is empty; <|endoftext|> begins a document")
        yield prompts
    else:
        begins = "" if config.format == "chat" else " <|endoftext|> begins a document;"
        print(f"A prompt, then Enter;{begins} an empty line ends.", file=sys.stderr)
        try:
            while line := input("> " if sys.stdin.isatty() else ""):
                yield [line]
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "", file=sys.stderr)
        except UnicodeDecodeError as error:
            raise UserError(f"what was typed is not text: {error}") from error


def draw_batches(model: GPT, tokenizer, prompts: list[str], num_samples: int, options: dict) -> Iterator[str]:
    """Whole samples: prompt and continuation, up to end-of-text, and a line. As many at once as SAMPLES_BYTES hold."""
    c = model.config
    tokens = max(len(encode_prompt(tokenizer, prompt)[0]) for prompt in prompts) + options["max_new_tokens"]
    sample_bytes = 8 * c.n_layer * c.n_embd * min(tokens, c.block_size) + 24 * c.n_tokens  # the cache, copies of logits
    samples = (prompt for prompt in prompts for _ in range(num_samples))
    while batch := list(itertools.islice(samples, max(1, SAMPLES_BYTES // sample_bytes))):
        for text in continue_texts(model, batch, **options):
            yield f"{text}\n{LINE}\n"


def stream_samples(model: GPT, tokenizer, prompts: list[str], num_samples: int, options: dict) -> Iterator[str]:
    """Text as it comes, the samples one after the other."""
    for prompt in (prompt for prompt in prompts for _ in range(num_samples)):
        ids, text = encode_prompt(tokenizer, prompt)
        yield text
        yield from stream_text(model, tokenizer, ids, options)
        yield f"\n{LINE}\n"


def stream_text(model: GPT, tokenizer, ids: list[int], options: dict) -> Iterator[str]:
    """What follows the ids, up to end-of-text; a character comes when all its bytes are there."""
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    for token in stream(model, idx, stop=tokenizer.eot, **options):
        if token.item() != tokenizer.eot:
            yield characters.decode(tokenizer.decode_bytes([token.item()]))
    yield characters.decode(b"", final=True)


def chat(model: GPT, tokenizer, system: str, questions: Iterable[list[str]], options: dict) -> None:
    """Answer each question with those before it in view; the oldest turns go when the model can't see them all."""
    messages = [("system", system)] if system else []
    oldest, forgot, block_size = len(messages), False, model.config.block_size
    options = options | {"max_new_tokens": min(options["max_new_tokens"], block_size // 2)}
    limit = block_size - options["max_new_tokens"]
    for question in itertools.chain.from_iterable(questions):
        asked = [*messages, ("user", question)]
        while len(ids := encode_chat(tokenizer, asked)) > limit and len(asked) > oldest + 1:
            del asked[oldest : oldest + 2]
        if len(ids) > limit:
            print(f"too long: {len(ids)} tokens, and only up to {limit} leave room for an answer", file=sys.stderr)
            continue
        if len(asked) <= len(messages) and not forgot:
            forgot = True
            print(f"the model sees {block_size} tokens; the oldest turns are left out now", file=sys.stderr)
        answer = ""
        try:
            for text in stream_text(model, tokenizer, ids, options):
                print(printable(text if answer else text.removeprefix(" ")), end="", flush=True)
                answer += text
        except KeyboardInterrupt:  # ends this answer
            pass
        print()
        if not answer:
            print("(no answer: the model ended at once)", file=sys.stderr)
        messages = [*asked, ("assistant", answer.removeprefix(" "))]


if __name__ == "__main__":
    run(main, Config, __doc__)
