"""The command line: which commands there are, and how each of them ends.

Exit codes: 0 done, 2 input to correct, 3 cannot be done, 130 interrupted, 1 a bug. A command's
module is imported when the command is called, so that `bitwright --help` answers at once.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownCommandError
from pydantic import ValidationError

from quantizer.known_error import ExitCode, KnownError
from service.cli.console import print_json
from service.cli.flags import flag_name
from service.errors import RequestError
from service.logs import err, set_up_logging
from service.process import quiet_libraries
from service.validation import missing, sentences

MODELS = "Models"
PROFILES = "Profiles"
SERVICE = "Job service"
MACHINE = "This machine"

COMMANDS = (
    (MODELS, "run", "service.cli.models:run", "Quantize MODEL within a budget and evaluate it."),
    (
        MODELS,
        "profile",
        "service.cli.models:profile",
        "Measure the cost of quantizing each layer of MODEL.",
    ),
    (MODELS, "quantize", "service.cli.models:quantize", "Quantize MODEL by a plan."),
    (
        MODELS,
        "evaluate",
        "service.cli.models:evaluate",
        "Compare quantized checkpoints with MODEL.",
    ),
    (MODELS, "report", "service.cli.reports:report", "Show the report of a finished run."),
    (
        PROFILES,
        "plan",
        "service.cli.plans:plan",
        "Choose the fidelity of each layer for a budget, from a profile.",
    ),
    (
        PROFILES,
        "frontier",
        "service.cli.plans:frontier",
        "Show the predicted loss of the best plan of each budget.",
    ),
    (PROFILES, "diff", "service.cli.plans:diff", "Show how two plans differ."),
    (
        SERVICE,
        "serve",
        "service.cli.serving:serve",
        "Serve the REST interface; its documentation is at /docs.",
    ),
    (SERVICE, "worker", "service.cli.working:worker", "Run the jobs that the service accepts."),
    (
        SERVICE,
        "migrate",
        "service.cli.tenants:migrate",
        "Bring the database to the current schema.",
    ),
    (SERVICE, "quota", "service.cli.tenants:quota", "Set the limits of a tenant."),
    (SERVICE, "keys", "service.cli.tenants:keys", "Create, list and revoke API keys."),
    (
        MACHINE,
        "doctor",
        "service.cli.doctor:doctor",
        "Show versions, processor, memory, GPU and cache.",
    ),
)
"""Group, name, place and summary of each command."""

app = App(
    name="bitwright",
    help="Quantize a language model within a size budget: measure, optimize, quantize, evaluate.",
    help_epilogue=(
        "Exit codes: 0 done, 2 input to correct, 3 cannot be done, 130 interrupted (run the same "
        "command again to resume), 1 a bug."
    ),
    help_flags=("--help", "-h"),
    version=lambda: version("bitwright"),
    default_parameter=Parameter(negative=(), name_transform=flag_name, allow_repeating=True),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
for _group, _name, _place, _summary in COMMANDS:
    app.command(_place, name=_name, help=_summary, group=_group)
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
        return RequestError(missing(error.argument.field_info.name))
    if isinstance(error, UnknownCommandError):
        name = (error.unused_tokens or [""])[0]
        commands = ", ".join(name for _, name, *_ in COMMANDS)
        return RequestError(f"command {name!r} does not exist; use one of {commands}")
    return RequestError(str(error))


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
