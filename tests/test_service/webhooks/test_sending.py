"""Promises of service.webhooks.sending.

Webhooks end in time, whatever the receiver does, and can be verified by it.
"""

import base64
import json
import socket
import ssl
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event, Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from standardwebhooks import Webhook, WebhookVerificationError

from service.errors import DeliveryFailed
from service.webhooks.sending import post
from service.webhooks.signing import RETRY_SECONDS, delay_before, new_secret, sign
from tests.support.web_server import (
    LOOPBACK,
    NAME,
    SOON_SECONDS,
    Resolver,
    receiving,
    status,
    was_reached,
)
from tests.test_architecture import run_python


def test_the_receiver_gets_the_body_as_it_is_and_can_verify_it() -> None:
    secret, body = (
        new_secret(),
        json.dumps({"type": "job.succeeded", "name": "größer"}, ensure_ascii=False).encode(),
    )
    headers = sign(secret, "msg_1", datetime.now(UTC), body) | {
        "content-type": "application/json",
        "Host": "other.example",
    }
    with receiving(status(204)) as receiver:
        assert post(receiver.url, body, headers, LOOPBACK) == 204
    [(path, got, taken)] = receiver.got
    assert (path, taken, got["host"]) == ("/hook?token=hush", body, f"127.0.0.1:{receiver.port}")
    assert got["content-type"] == "application/json"
    assert Webhook(secret).verify(taken, got) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(taken, got)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(taken + b" ", got)


def test_a_signature_is_of_the_moment_in_any_time_zone() -> None:
    secret, moment = new_secret(), datetime.now(UTC)
    there = moment.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert sign(secret, "msg_1", there, b"{}") == sign(secret, "msg_1", moment, b"{}")
    Webhook(secret).verify(b"{}", sign(secret, "msg_1", there, b"{}"))


def test_secrets_are_of_256_bits_and_differ() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert {
        len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) for secret in made
    } == {32}


@pytest.mark.parametrize("code", [200, 400, 410, 500])
def test_any_status_is_returned(code: int) -> None:
    with receiving(status(code)) as receiver:
        assert post(receiver.url, b"{}", {}, LOOPBACK) == code


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_to_a_private_address_is_returned_and_not_followed(
    code: int, listener: socket.socket
) -> None:
    to = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with receiving(status(code, location=to)) as receiver:
        assert post(receiver.url, b"{}", {}, LOOPBACK) == code
    assert not was_reached(listener)


def test_proxies_of_the_environment_are_not_used(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
    with receiving(status(200)) as receiver:
        assert post(receiver.url, b"{}", {}, LOOPBACK) == 200
    assert not was_reached(listener)


def test_an_answer_of_ten_megabytes_is_not_read() -> None:
    sent_bytes: list[int] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        handler.send_response(200)
        handler.send_header("content-length", "10000000")
        handler.end_headers()
        sent_bytes.append(0)
        while sent_bytes[0] < 10_000_000:
            sent_bytes[0] += handler.connection.send(bytes(10_000))

    with receiving(answer) as receiver:
        assert post(receiver.url, b"{}", {}, LOOPBACK) == 200
    assert sent_bytes[0] < 2_000_000  # what the kernel takes on the way


def drip(handler: BaseHTTPRequestHandler, text: bytes) -> None:
    """Send some bytes, one in each 50 ms."""
    for index in range(len(text)):
        handler.connection.send(text[index : index + 1])
        time.sleep(0.05)


def test_a_receiver_that_drips_its_headers_is_left_in_time() -> None:
    with receiving(
        lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nx: " + b"x" * 60)
    ) as receiver:
        begun = time.monotonic()
        with pytest.raises(DeliveryFailed, match=r"'127\.0\.0\.1' gave no answer within 0\.5 s"):
            post(receiver.url, b"{}", {}, LOOPBACK, SOON_SECONDS)
        assert SOON_SECONDS <= time.monotonic() - begun < 3 * SOON_SECONDS


def test_a_receiver_that_drips_its_body_is_left_in_time_with_the_status_that_it_gave() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(202)
        handler.send_header("content-length", "60")
        handler.end_headers()
        drip(handler, b"x" * 60)

    with receiving(answer) as receiver:
        begun = time.monotonic()
        assert post(receiver.url, b"{}", {}, LOOPBACK, SOON_SECONDS) == 202
        assert time.monotonic() - begun < 3 * SOON_SECONDS


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_receiver_that_says_nothing_or_takes_nothing_is_left_in_time(
    scheme: str, listener: socket.socket
) -> None:
    begun = time.monotonic()
    with pytest.raises(DeliveryFailed, match="gave no answer within"):
        post(
            f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/",
            bytes(30_000_000),
            {},
            LOOPBACK,
            SOON_SECONDS,
        )
    assert time.monotonic() - begun < 3 * SOON_SECONDS
    assert was_reached(listener)


def test_a_receiver_that_takes_the_message_slowly_is_left_in_time() -> None:
    done = Event()

    def take(server: socket.socket) -> None:
        with server.accept()[0] as connection, suppress(OSError):
            while connection.recv(1_000_000) and not done.wait(0.02):
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=take, args=(server,))
        thread.start()
        begun = time.monotonic()
        with pytest.raises(DeliveryFailed, match="gave no answer within"):
            post(
                f"http://127.0.0.1:{server.getsockname()[1]}/",
                bytes(100_000_000),
                {},
                LOOPBACK,
                SOON_SECONDS,
            )
        assert time.monotonic() - begun < 3 * SOON_SECONDS
        done.set()
        thread.join()


def test_a_resolver_that_hangs_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2) or [])
    begun = time.monotonic()
    with pytest.raises(DeliveryFailed):
        post("https://receiver.example/", b"{}", {}, (), SOON_SECONDS)
    assert time.monotonic() - begun < 3 * SOON_SECONDS


def test_a_failure_says_nothing_of_the_answer_and_of_the_url_only_the_host() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"hush hush\r\n\r\n")

    with (
        receiving(answer) as receiver,
        pytest.raises(DeliveryFailed, match="did not answer in HTTP") as caught,
    ):
        post(receiver.url, b"hush", {"authorization": "hush"}, LOOPBACK)
    assert "hush" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_receiver_that_is_not_there_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(DeliveryFailed, match="did not accept the connection"):
        post(f"http://127.0.0.1:{port}/", b"{}", {}, LOOPBACK)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `NAME` that signs itself, with its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)]),
    )
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "receiver.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(made.public_bytes(Encoding.PEM) + private)
    return path


def test_tls_is_verified_for_the_name_in_the_url(
    certificate: Path, resolves: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[str | None] = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    tls.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    with receiving(status(200), tls) as receiver:
        url = f"https://{NAME}:{receiver.port}/"
        resolves(NAME, [["127.0.0.1"]])
        with pytest.raises(DeliveryFailed, match="no TLS certificate that is valid and trusted"):
            post(url, b"{}", {}, LOOPBACK)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert post(url, b"{}", {}, LOOPBACK) == 200
        with pytest.raises(DeliveryFailed, match="no TLS certificate that is valid and trusted"):
            post(f"https://127.0.0.1:{receiver.port}/", b"{}", {}, LOOPBACK)
    assert asked_for[:2] == [NAME, NAME]
    assert [headers["host"] for _, headers, _ in receiver.got] == [f"{NAME}:{receiver.port}"]


def test_https_to_what_speaks_no_tls_is_a_failure() -> None:
    with (
        receiving(status(200)) as receiver,
        pytest.raises(DeliveryFailed, match="did not agree on TLS"),
    ):
        post(f"https://127.0.0.1:{receiver.port}/", b"{}", {}, LOOPBACK, 2)
    assert not receiver.got


def test_attempts_span_a_day_at_the_shortest_and_then_end() -> None:
    for draw, factor in ((0.0, 0.8), (0.5, 1.0), (1.0, 1.2)):
        delays = [
            delay_before(attempt, lambda draw=draw: draw)
            for attempt in range(1, len(RETRY_SECONDS) + 1)
        ]
        assert delays == pytest.approx([factor * wait for wait in RETRY_SECONDS])
        assert sum(delay for delay in delays if delay is not None) >= 24 * 3600
    assert delay_before(0, lambda: 0.9) == 0
    assert delay_before(len(RETRY_SECONDS) + 1, lambda: 0.5) is None


def test_sending_loads_no_heavy_library() -> None:
    loaded = run_python("import sys, service.webhooks.sending; print(*sys.modules)").split()
    assert not {"torch", "transformers", "cvxpy", "numpy"} & set(loaded)
