"""The command line as a whole: help, exit codes, and what is imported before a command is known."""

import json
import subprocess
import sys

import pytest

from service.cli.commands import COMMANDS
from service.cli.main import app
from tests.support.commands import bitwright
from tests.support.paths import ROOT

NAMES = [command.name for commands in COMMANDS.values() for command in commands]
HEAVY = {"torch", "transformers", "cvxpy", "matplotlib", "fastapi", "sqlalchemy"}

LOADED = """
import sys
from service.cli.main import main

code = main(sys.argv[1:])
print("LOADED", code, *sys.modules)
"""


def loaded_by(*arguments: str) -> tuple[int, set[str]]:
    """Return the exit code of a command, and the modules that its process has imported."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    _, code, *modules = done.stdout.splitlines()[-1].split()
    return int(code), set(modules)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag: str) -> None:
    done = bitwright(flag)
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*NAMES, *COMMANDS, "Exit codes", "--version"])
    assert bitwright().stdout == done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(name: str) -> None:
    done = bitwright(name, "--help")
    assert done.returncode == 0
    assert f"Usage: bitwright {name}" in done.stdout


def test_help_of_the_program_loads_no_heavy_library() -> None:
    code, modules = loaded_by("--help")
    assert code == 0
    assert not modules & (HEAVY | {"numpy", "osqp"})


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("run", "--help"), 0),
        (("quantize", "--help"), 0),
        (("run", "model", "--budget", "4bpw", "--signal", "magic"), 2),
        (("run", "model", "--budget", "lots"), 2),
        (("evaluate", "model"), 2),
        (("keys", "--nothing"), 2),
    ],
)
def test_help_and_wrong_options_of_a_command_load_no_torch(
    arguments: tuple[str, ...], code: int
) -> None:
    found, modules = loaded_by(*arguments)
    assert found == code
    assert not modules & {"torch", "transformers", "cvxpy", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "command 'nothing' does not exist; use one of run, profile"),
        (("run", "model"), "budget is missing"),
        (("report",), "folder is missing"),
        (("run", "model", "--budget", "4bpw", "--nothing", "1"), "--nothing"),
        (("run", "model", "--budgt", "4bpw"), "option '--budgt' does not exist; write --budget"),
        (("run", "model", "--budgt=4bpw"), "option '--budgt' does not exist; write --budget"),
        (("run", "model", "more", "--budget", "4bpw"), "'more': the command takes no such"),
        (("serve", "--port", "http"), "port 'http': give a whole number"),
        (("quota", "team", "--active-jobs", "few"), "active jobs 'few': give a whole number"),
        (("quota", "team", "--keep-days", "few"), "keep days 'few': give a number"),
    ],
)
def test_arguments_that_make_no_sense_are_bad_input(arguments: tuple[str, ...], words: str) -> None:
    plain, told = bitwright(*arguments), bitwright(*arguments, "--json")
    assert plain.returncode == told.returncode == 2
    assert words in plain.stderr
    document = json.loads(told.stdout)
    assert (document["error"], document["exit_code"]) == ("RequestError", 2)
    assert document["message"] in plain.stderr


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_ports_that_do_not_exist_are_bad_input(port: str) -> None:
    done = bitwright("serve", "--port", port)
    message = f"error RequestError: port '{port}': give a whole number from 1 to 65535\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_the_last_of_several_values_counts_and_values_may_begin_with_a_hyphen() -> None:
    options = ["run", "model", "--budget", "lots", "--budget", "-3bpw"]
    assert "-3bpw" in bitwright(*options).stderr


def test_version_is_that_of_the_package() -> None:
    assert bitwright("--version").stdout.strip() == "0.1.0"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    script = app.generate_completion(shell=shell)
    assert all(name in script for name in NAMES)
    assert all(option in script for option in ("calibration-windows", "older-than", "max-kl"))
