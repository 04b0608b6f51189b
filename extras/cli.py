"""
Command lines from dataclasses, by tyro, and one way to fail. train_gpt2.py has its own: it runs without this folder.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """A mistake the user can correct: one line with the numbers and the next move, exit status 2, no traceback."""


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
    markers = (tyro.conf.DisallowNone,)  # so that an optional bool is --flag and --no-flag
    return tyro.cli(config_class, args=argv, description=about, use_underscores=True, config=markers)


def run(main: Callable, config_class: type, description: str, argv: Sequence[str] | None = None) -> None:
    """Parse, call `main(config)`, and turn a UserError or want of memory into one line on stderr and exit status 2."""
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
    except (ValueError, RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", message):
            message = f"out of memory: a smaller batch, sequence or model fits better, see --help ({message[:200]})"
        elif not is_user_error(error):
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def is_user_error(error: BaseException) -> bool:
    """Whether it is a UserError, of this file or of train_gpt2.py, which can't import this one."""
    return any(kind.__name__ == "UserError" for kind in type(error).__mro__)
