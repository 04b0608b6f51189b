"""
Command lines from dataclasses, by tyro, and one way to fail.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence

# the last: there was no room for cuBLAS's handle
NO_MEMORY = "out of memory|can't allocate memory|STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"


class UserError(ValueError):
    """A mistake the user can correct: one line with the numbers and the next move, exit status 2, no traceback."""


class LocalError(UserError):
    """A UserError that only one rank may hit, so that rank reports it; else the first rank of each node does."""


@contextlib.contextmanager
def user_error(message: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """What the block raises of these kinds becomes a UserError: the message, why, and the advice.

    A lack of memory stays what it is: no other file or setting of that kind would help.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            raise
        why = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{message}: {why}" + (f"; {advice}" if advice else "")) from error


ELSEWHERE = {  # flags of nanoGPT, transformers and others -> what train_gpt2.py calls them
    "batch_size": "micro_batch (sequences a forward) and --total_batch_size (tokens an update)",
    "gradient_accumulation_steps": "total_batch_size (tokens an update)", "block_size": "seq_len",
    "lr": "max_lr", "learning_rate": "max_lr", "max_iters": "max_steps", "num_iterations": "max_steps",
    "warmup_iters": "warmup_steps", "lr_decay_iters": "max_steps", "eval_interval": "val_every",
    "eval_iters": "val_tokens", "log_interval": "log_every", "out_dir": "log_dir", "output_dir": "log_dir",
    "dataset": "data_dir", "num_train_epochs": "epochs", "max_seq_length": "seq_len",
    "resume_from_checkpoint": "resume",
}  # fmt: skip


def check_names(argv: Sequence[str]) -> None:
    """UserError for a flag that another trainer has, with ours."""
    for word in argv:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name == "dropout":
            raise UserError("there is no --dropout here; it is two lines in the model: README, Changing the model")
        if word.startswith("--") and name in ELSEWHERE:
            raise UserError(f"there is no --{name} here; it is called --{ELSEWHERE[name]}")


def parse(config_class: type, description: str, argv: Sequence[str] | None = None):
    """The command line as an instance of `config_class`: a flag for each field, its comment or docstring the help."""
    import tyro

    about = (description or "").partition("\nContents:")[0]  # what follows is for those who read the source
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if hasattr(config_class, "resume_from"):  # train_gpt2.py
        check_names(argv)
        for i in range(len(argv) - 1, 0, -1):  # --resume PATH: a flag of tyro's takes a value or takes none
            if argv[i - 1] == "--resume" and not argv[i].startswith("--"):
                argv[i:i] = ["--resume_from"]
    markers = (tyro.conf.DisallowNone,)  # so that an optional bool is --flag and --no-flag
    shown = {"description": about, "use_underscores": True}
    shown["console_outputs"] = os.environ.get("LOCAL_RANK", "0") == "0"  # one rank of each node, its flags may differ
    return tyro.cli(config_class, args=argv, config=markers, **shown)


def run(main: Callable, config_class: type, description: str, argv: Sequence[str] | None = None) -> None:
    """Parse, call `main(config)`, and turn a UserError, or a lack of memory, into one line on stderr and exit status 2.

    Of several ranks the first of each node speaks, and any that alone met a LocalError or has no memory.
    """
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a console that can't show a character must not end a run
            output.reconfigure(errors="replace")
    try:
        main(parse(config_class, description, argv))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever read our output, `head` for one, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            sys.exit(141)
        raise
    except (ValueError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        kinds, message = {kind.__name__ for kind in type(error).__mro__}, " ".join(str(error).split())
        if no_memory := isinstance(error, MemoryError) or re.search(NO_MEMORY, message):
            message = f"out of memory: a smaller batch, sequence or model fits better, see --help ({message[:200]})"
        elif isinstance(error, ModuleNotFoundError):
            package, *_ = error.name.split(".")
            file = f"{error.name.replace('.', '/')}.py is not beside train_gpt2.py"
            better = file if package in ("extras", "hellaswag") else f"pip install {package}"
            message = f"a setting needs more than this file: {better}"
        elif "UserError" not in kinds:  # of this file, or of train_gpt2.py, which can't import this one
            raise
        rank = os.environ.get("RANK", "0")
        if os.environ.get("LOCAL_RANK", "0") == "0" or no_memory or "LocalError" in kinds:
            where = f"rank {rank}: " if rank != "0" else ""
            print(f"{os.path.basename(sys.argv[0])}: error: {where}{message}", file=sys.stderr, flush=True)
        sys.exit(2)
