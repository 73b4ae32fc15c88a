"""Command lines: one parser for all scripts, and errors a user can read.

Flags may be written with ``_`` or ``-``; booleans take ``--amm``, ``--amm True``, ``--amm False`` and ``--no-amm``;
unknown and abbreviated flags are errors. A mistake on the command line ends with exit code 2, anything else a user can cause
(ValueError, OSError, a lack of memory) with a one-line message and exit code 1.
"""

import argparse
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from runtime import watch
from runtime.distributed import SharedError, leave_group, lost_a_process
from runtime.redact import redact

# Of torch's plain RuntimeError, where the CPU's memory does not suffice.
OUT_OF_MEMORY_WORDS = ("can't allocate memory", "Storage size calculation overflowed")
TRUE_WORDS, FALSE_WORDS = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default only where it says something: not None, and not the False of a switch."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class BooleanFlag(argparse.Action):
    """``--flag``, ``--flag True|False``, ``--no-flag``."""

    def __init__(self, option_strings, dest, default=False, help=None, **kwargs):
        negations = ["--no-" + option[2:] for option in option_strings if option.startswith("--")]
        super().__init__([*option_strings, *negations], dest, nargs="?", default=default, help=help, metavar="BOOL")

    def __call__(self, parser, namespace, value, option_string=None):
        negated = option_string.startswith("--no-")
        if value is None:
            setattr(namespace, self.dest, not negated)
        elif negated:
            parser.error(f"{option_string} takes no value, got {value!r}")
        elif value.lower() in TRUE_WORDS | FALSE_WORDS:
            setattr(namespace, self.dest, value.lower() in TRUE_WORDS)
        else:
            parser.error(f"{option_string} takes True or False, got {value!r}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the project's conventions (see the module docstring)."""

    def __init__(self, description: str, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashes(arg) for arg in args], namespace)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:  # of flags only the names: the value of a misspelt one may be a key
            flags = [arg.partition("=")[0] for arg in unknown if arg.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(flags or unknown)}")
        return namespace

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def _dashes(arg: str) -> str:
    """``--cfg_scale=1.5`` -> ``--cfg-scale=1.5``; anything that is not a long flag is left alone."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def number(kind: type, minimum: float, maximum: float = math.inf, *, exclusive: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float from ``minimum`` (exclusive: above it) to ``maximum``, infinity excluded."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not (value > minimum if exclusive else value >= minimum) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if exclusive else 'at least'} {minimum} and finite")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text} must be at most {maximum}")
        return value

    return parse


INT_MAX = 2**31 - 1  # no count of images, steps or bytes here needs more, and libraries fail in many ways beyond
positive_int = number(int, 1, INT_MAX)
non_negative_int = number(int, 0, INT_MAX)
positive_float = number(float, 0.0, exclusive=True)
non_negative_float = number(float, 0.0)
probability = number(float, 0.0, 1.0)
seed = number(int, 0, 2**63 - 1)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call a script's ``main`` and turn what a user can cause into one line on stderr and exit code 1.

    Of several processes the first one that fails tells, and the others end quietly. ``TRACEBACK=1`` in the environment shows
    where the error came from; that of a bug is always shown.
    """
    try:
        main(None)
        leave_group()
        sys.stdout.flush()
    except torch.OutOfMemoryError as error:
        _fail(f"the device ran out of memory: lower the batch size or the micro-batch size ({str(error).splitlines()[0]})")
    except MemoryError as error:
        _fail(f"this machine ran out of memory{': ' if str(error) else ''}{error}")
    except SharedError as error:
        _fail(str(error), shared=True)
    except BrokenPipeError:  # whoever reads the output, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", code=130, shared=True)
    except SystemExit as exit_:
        if exit_.code:
            watch.announce_failure()
        raise
    except BaseException as error:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS):
            _fail(f"this machine ran out of memory: {first_line(error)}")
        if lost_a_process(error):
            # Where the launcher is ending all processes, this one's turn comes within the second.
            time.sleep(watch.TELL_SECONDS)
            _fail(f"lost another process of this job (killed? out of memory?): {first_line(error).partition('. ')[0]}")
        if not watch.announce_failure():
            watch.end_quietly()
        raise


def first_line(error: Exception) -> str:
    """What a library's error says, without its paragraphs of advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fail(message: str, code: int = 1, shared: bool = False) -> None:
    """shared: all processes fail alike, so that the message does not say which it was."""
    if not watch.announce_failure():
        watch.end_quietly()
    if os.environ.get("TRACEBACK"):
        traceback.print_exc()
    whose = watch.whose()
    if whose:
        print(file=sys.stderr)  # another process's progress bar may have left the line unfinished
    print(f"error: {'' if shared else whose}{redact(message)}", file=sys.stderr, flush=True)
    raise SystemExit(code)
