"""A real S3-compatible server for tests, in a process of its own.

It forgets everything when it ends.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping

import httpx2

from tests.support.served import free_port

START_SECONDS = 60
_KEY = "testing"
_SECRET = "testing-secret"  # noqa: S105  of a server that only tests reach
_REGION = "us-east-1"


class S3:
    """A server at a port of this machine."""

    def __init__(self) -> None:
        """Start, and wait until it answers."""
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                httpx2.get(self.url, timeout=5)
            except httpx2.HTTPError:
                time.sleep(0.05)
            else:
                return
        self.stop()
        raise RuntimeError(f"the S3 server did not answer within {START_SECONDS} s")

    def fresh(self) -> str:
        """Return the URL of a new empty bucket."""
        bucket = f"bucket-{secrets.token_hex(8)}"
        httpx2.put(f"{self.url}/{bucket}").raise_for_status()
        return f"s3://{bucket}"

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(30)


def variables(endpoint: str) -> Mapping[str, str]:
    """Return what the environment of a process must say to use a server at an endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
