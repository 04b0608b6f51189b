"""
Command lines from dataclasses, and one way to fail.

Every entry point keeps its knobs on one page, a dataclass whose fields carry default, type and reason; the command line
is derived from that page. A mistake of the user's is a `UserError`: one line on stderr, exit status 2, no traceback.
"""

import argparse
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields


class UserError(ValueError):
    """What the user can mend. The message is one line: what is wrong, the numbers, and the next move.

    Under torchrun it is raised by every rank alike, and rank 0 speaks for all.
    """


class LocalError(UserError):
    """A UserError that perhaps only one rank meets: whoever meets it says so."""


def knob(default, help, *, group=None, choices=None, flag=None, metavar=None):
    """A dataclass field that is also a flag.

    group: heads the section of `--help` that this field and those after it stand in. flag: a short or positional
    spelling, such as "-m" or "run_dir". A default that is a list makes the flag take several values.
    """
    metadata = {"help": help, "group": group, "choices": choices, "flag": flag, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(config_class: type, description: str, argv: Sequence[str] | None = None):
    """The command line as an instance of `config_class`. Raises UserError for a flag or a value that does not fit."""
    about = description.partition("\nContents:")[0]  # what follows is for those who read the source
    parser = Parser(description=about, formatter_class=HelpFormatter, allow_abbrev=False)
    types_of, section = typing.get_type_hints(config_class), parser
    for knob_field in fields(config_class):
        meta = knob_field.metadata
        if meta.get("group"):
            section = parser.add_argument_group(meta["group"])
        add_flag(section, knob_field, types_of[knob_field.name])
    argv = sys.argv[1:] if argv is None else argv
    return config_class(**vars(parser.parse_args([underscored(word) for word in argv])))


def run(main: Callable, config_class: type, description: str, argv: Sequence[str] | None = None) -> None:
    """Parse, call `main(config)`, and turn a UserError or want of memory into one line on stderr and exit status 2."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a console that can't show a character must not end a run
            output.reconfigure(errors="replace")
    try:
        main(parse(config_class, description, argv))
    except UserError as error:
        fail(str(error), every_rank=isinstance(error, LocalError))
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|can't allocate memory", str(error)) and not isinstance(error, MemoryError):
            raise
        reason = str(error).strip().split("\n")[0].rstrip(".") or "MemoryError"
        fail(f"out of memory: a smaller batch, window or model fits better, see --help ({reason})", every_rank=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever read our output, `head` for one, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            sys.exit(141)
        raise


def fail(message: str, every_rank: bool) -> None:
    """One line on stderr, of rank 0 or of any, and exit status 2."""
    rank = os.environ.get("RANK", "0")
    if every_rank or rank == "0":
        where = f"rank {rank}: " if rank != "0" else ""
        line = f"{os.path.basename(sys.argv[0])}: error: {where}{' '.join(message.split())}"
        print(line, file=sys.stderr, flush=True)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.81) if unknown else []
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{message}; {hint}--help lists the flags")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The groups say all there is to say: no list of every flag above them, no `--no-` of what is off anyway."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, max_help_position=32, **kwargs)

    def _format_usage(self, usage, actions, groups, prefix):
        words = [f"[{action.metavar} ...]" for action in actions if not action.option_strings]
        return super()._format_usage(" ".join(["%(prog)s", *words, "[--flag value ...]"]), actions, groups, prefix)

    def _format_action_invocation(self, action, *args):
        if action.default is False and len(action.option_strings) > 1:
            return action.option_strings[0]
        return super()._format_action_invocation(action, *args)

    def _get_help_string(self, action):
        default = action.default
        if default in (None, "", [], argparse.SUPPRESS) or isinstance(default, bool):
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        shown = f"{default:g}" if isinstance(default, float) else default
        return f"{action.help} (default: {shown})".replace("%%", "%").replace("%", "%%")


def underscored(word: str) -> str:
    """`--max-steps=3` -> `--max_steps=3`; `--no-keep-it` -> `--no-keep_it`; anything that is not a long flag stays."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    prefix = "no-" if name.startswith(("no-", "no_")) else ""
    return f"--{prefix}{name[len(prefix) :].replace('-', '_')}{equals}{value}"


def add_flag(section, knob_field, hint) -> None:
    meta = knob_field.metadata
    options = [of for of in typing.get_args(hint) if of is not types.NoneType] or [hint]
    default = knob_field.default_factory() if knob_field.default is MISSING else knob_field.default
    settings = {"help": meta["help"].replace("%", "%%"), "default": default}
    names = [f"--{knob_field.name}"]
    if meta["flag"]:
        names = [meta["flag"]] if not meta["flag"].startswith("-") else [meta["flag"], *names]
    if bool in options:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["type"] = options[0]
        settings["choices"] = meta["choices"]
        settings["metavar"] = meta["metavar"] or (None if meta["choices"] else options[0].__name__.upper())
    if isinstance(default, list):
        settings["nargs"] = "+" if names[0].startswith("-") else "*"  # a glob that matched nothing is no default
    if names[0].startswith("-"):
        settings["dest"] = knob_field.name
    section.add_argument(*names, **settings)
