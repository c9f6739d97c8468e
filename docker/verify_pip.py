"""Write this host's pip configuration as pip inside an image's build must see it.

    python verify_pip.py FOLDER

FOLDER gets `pip.conf`, and `volumes`, the host's folders and files that it refers to, one a line.
If `ca.crt` lies in FOLDER, pip is told to trust it.
"""  # noqa: INP001  a script

import ast
import subprocess
import sys
from pathlib import Path

CERTIFICATE = "/run/secrets/ca.crt"


def host_values() -> dict[str, str]:
    """Return pip's settings by name; where several sources have one, the value that pip heeds.

    That is the environment's. `pip config list` gives it first or last, by the version of pip.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    values: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        values[key.rpartition(".")[2]] = " ".join(str(ast.literal_eval(value)).split())
    return values


def volumes(values: dict[str, str]) -> set[str]:
    """Return what of the host's disk the settings refer to.

    Of an index, the folder that holds its list and its files.
    """
    found = set()
    for word in " ".join(values.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            found.add(str(path.parent if word.startswith("file://") else path))
    return found


def write(folder: Path) -> None:
    """Write both files."""
    values = host_values()
    values.pop("cert", None)
    (folder / "volumes").write_text("".join(f"{path}\n" for path in sorted(volumes(values))))
    if (folder / "ca.crt").exists():
        values["cert"] = CERTIFICATE
    (folder / "pip.conf").write_text(
        "[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
