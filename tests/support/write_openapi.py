"""Write the OpenAPI document of the code to where the repository keeps it.

python -m tests.support.write_openapi
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from service.api.app import create_app
from tests.support.paths import ROOT
from tests.support.served import backend_in

STORED = ROOT / "service" / "api" / "openapi.json"


def document() -> dict[str, Any]:
    """Return the document of the code."""
    with tempfile.TemporaryDirectory() as folder:
        return create_app(backend_in(Path(folder))).openapi()


if __name__ == "__main__":
    STORED.write_text(json.dumps(document(), indent=1) + "\n")
