"""Submit a small job to a running service and wait for its end.

    python verify_job.py BASE_URL API_KEY


Exit code 0 says that it succeeded. The model `tiny` must lie in a folder that jobs may use.
"""  # noqa: INP001  a script

import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

JOB = {
    "model": "tiny",
    "budget": "4bpw",
    "tokens": 64,
    "calibration_windows": 4,
    "evaluation_windows": 3,
    "probe_windows": 3,
    "probe_tokens": 32,
    "guard_windows": 2,
}
MOST_SECONDS = 300
ENDED = ("succeeded", "failed", "cancelled")


def ask(url: str, key: str, body: dict[str, Any] | None = None) -> Any:
    """Return what the service answers; an error's text ends the program."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)  # noqa: S310  named by who runs it
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error}: {error.read().decode()[:2000]}")


def main(base: str, key: str) -> int:
    """Submit, wait, show how it ended, and return the exit code."""
    job = ask(f"{base}/v1/jobs", key, JOB)
    end = time.monotonic() + MOST_SECONDS
    while job["status"] not in ENDED and time.monotonic() < end:
        time.sleep(1)
        job = ask(f"{base}/v1/jobs/{job['id']}", key)
    sys.stdout.write(json.dumps(job, indent=1) + "\n")
    return job["status"] != "succeeded"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
