"""The command line, and how a command ends.

Exit codes: 0 done, 2 input to correct, 3 cannot be done, 130 interrupted, 1 a bug.
"""

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any

from cyclopts import (
    App,
    Argument,
    CoercionError,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownCommandError,
    UnusedCliTokensError,
)
from pydantic import ValidationError

from quantizer.known_error import ExitCode, KnownError
from service.cli.commands import COMMANDS
from service.cli.console import print_json
from service.cli.flags import flag_name
from service.errors import RequestError
from service.logs import err, set_up_logging
from service.process import quiet_libraries
from service.validation import missing, sentences, words

_NUMBERS: Mapping[Any, str] = {int: "a whole number", float: "a number"}


def _shown_default(value: Any) -> str | None:
    """Return a default for the help page, None for one that says no more than that it is unset."""
    return None if value is None or value is False or value in ("", []) else str(value)


app = App(
    name="bitwright",
    help="Quantize a language model within a size budget: measure, optimize, quantize, evaluate.",
    help_epilogue=(
        "Exit codes: 0 done, 2 input to correct, 3 cannot be done, 130 interrupted (run the same "
        "command again to resume), 1 a bug."
    ),
    help_flags=("--help", "-h"),
    version=lambda: version("bitwright"),
    default_parameter=Parameter(
        negative=(),
        name_transform=flag_name,
        allow_repeating=True,
        show_default=_shown_default,
    ),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for _title, _commands in COMMANDS.items():
    _group = Group.create_ordered(_title)
    for _place, _command in enumerate(_commands):
        app.command(
            _command.place,
            name=_command.name,
            help=_command.summary,
            group=_group,
            sort_key=_place,
        )
app.register_install_completion_command(
    name="--install-completion", help="Install completion of commands and options in this shell."
)


def main(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name, and return its exit code.

    Known errors become one sentence on stderr and, with `--json`, a document on stdout. Bugs are
    raised.
    """
    as_json = "--json" in arguments
    set_up_logging()
    try:
        code = app([*arguments], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _fail(usage_error(error), as_json=as_json)
    except KnownError as error:
        return _fail(error, as_json=as_json)
    except KeyboardInterrupt:
        err.print("interrupted; run the same command again to resume", style="yellow")
        return ExitCode.INTERRUPTED
    return code if isinstance(code, int) else ExitCode.OK


def usage_error(error: CycloptsError) -> RequestError:
    """Return what is wrong with the arguments, in the sentence that the REST interface uses too."""
    if isinstance(error.__cause__, ValidationError):
        return RequestError(sentences(error.__cause__))
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return RequestError(_missing(error, error.argument))
    if isinstance(error, UnknownCommandError):
        wrong = (error.unused_tokens or [""])[0]
        names = [command.name for commands in COMMANDS.values() for command in commands]
        return RequestError(f"command {wrong!r} does not exist; use one of {', '.join(names)}")
    if isinstance(error, UnusedCliTokensError):
        unused = ", ".join(repr(token) for token in error.unused_tokens or ())
        return RequestError(f"{unused}: the command takes no such argument; leave it out")
    if isinstance(error, CoercionError) and error.argument and error.token:
        name, kind = words(error.argument.field_info.name), error.target_type
        if kind in _NUMBERS:
            return RequestError(f"{name} {error.token.value!r}: give {_NUMBERS[kind]}")
    return RequestError(str(error))


def _missing(error: MissingArgumentError, argument: Argument) -> str:
    """Return what is missing, or the option that was written in its place."""
    options = [token for token in error.unused_tokens or () if token.startswith("--")]
    for wrong in get_close_matches(argument.name, [each.partition("=")[0] for each in options], 1):
        if wrong not in argument.names:
            return f"option {wrong!r} does not exist; write {argument.name}"
    return missing(argument.field_info.name)


def _fail(error: KnownError, *, as_json: bool) -> int:
    """Print an error: a sentence on stderr, and with `--json` also a document on stdout."""
    name = type(error).__name__
    err.print(f"[bold red]error[/] {name}: ", end="")
    err.print(str(error), markup=False, highlight=False)
    if as_json:
        document: dict[str, Any] = {"error": name, "message": str(error)}
        print_json(document | {"exit_code": error.exit_code} | error.details)
    return error.exit_code


def entry() -> None:
    """Run the command line of this process."""
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
