"""Promises of service.outbound: webhooks reach checked addresses only, end in time, and can be verified by their receivers."""

import base64
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from threading import Event, Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from standardwebhooks import Webhook, WebhookVerificationError

from service.errors import DeliveryFailed, TargetRefused
from service.outbound import RETRY_SECONDS, check_target, delay_before, new_secret, post, sign
from tests.test_architecture import run_python

LOOPBACK = ("127.0.0.0/8",)
PUBLIC, UNREACHED = "93.184.216.34", "192.0.2.1"
NAME = "receiver.example"
SOON_SECONDS = 0.5

Answer = Callable[[BaseHTTPRequestHandler], None]
Resolver = Callable[[str, list[list[str]]], list[str]]


@dataclass(slots=True)
class Receiver:
    """A web server that notes what it got."""

    port: int
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?token=hush"


@contextmanager
def receiving(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """Serve HTTP on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            answer(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Keep the test's output quiet."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Take it that clients break off."""

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    receiver = Receiver(server.server_port)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return answer


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that waits for connections of any family, and accepts none by itself."""
    try:
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):
        server = socket.create_server(("", 0))
    with server:
        server.setblocking(False)
        yield server


def was_reached(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Have a name resolve to one list of addresses after another, the last for good; return the names that are asked for."""
    real = socket.getaddrinfo

    def resolve(name: str, answers: list[list[str]]) -> list[str]:
        asked: list[str] = []

        def fake(host: str, port: int, *args: object, **options: object) -> list[object]:
            addresses = answers[min(asked.count(name), len(answers) - 1)] if host == name else [host]
            asked.append(host)
            return [found for address in addresses for found in real(address, port, *args, **options)]  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", fake)
        return asked

    return resolve


def test_the_receiver_gets_the_body_as_it_is_and_can_verify_it() -> None:
    secret, body = new_secret(), json.dumps({"type": "job.succeeded", "name": "größer"}, ensure_ascii=False).encode()
    headers = sign(secret, "msg_1", datetime.now(UTC), body) | {"content-type": "application/json", "Host": "other.example"}
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
    assert {len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) for secret in made} == {32}


@pytest.mark.parametrize("code", [200, 400, 410, 500])
def test_any_status_is_returned(code: int) -> None:
    with receiving(status(code)) as receiver:
        assert post(receiver.url, b"{}", {}, LOOPBACK) == code


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_to_a_private_address_is_returned_and_not_followed(code: int, listener: socket.socket) -> None:
    to = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with receiving(status(code, location=to)) as receiver:
        assert post(receiver.url, b"{}", {}, LOOPBACK) == code
    assert not was_reached(listener)


def test_proxies_of_the_environment_are_not_used(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with receiving(lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nx: " + b"x" * 60)) as receiver:
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
def test_a_receiver_that_says_nothing_or_takes_nothing_is_left_in_time(scheme: str, listener: socket.socket) -> None:
    begun = time.monotonic()
    with pytest.raises(DeliveryFailed, match="gave no answer within"):
        post(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/", bytes(30_000_000), {}, LOOPBACK, SOON_SECONDS)
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
            post(f"http://127.0.0.1:{server.getsockname()[1]}/", bytes(100_000_000), {}, LOOPBACK, SOON_SECONDS)
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

    with receiving(answer) as receiver, pytest.raises(DeliveryFailed, match="did not answer in HTTP") as caught:
        post(receiver.url, b"hush", {"authorization": "hush"}, LOOPBACK)
    assert "hush" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_receiver_that_is_not_there_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(DeliveryFailed, match="did not take the connection"):
        post(f"http://127.0.0.1:{port}/", b"{}", {}, LOOPBACK)


PRIVATE_HOSTS = [
    *("localhost", "LOCALHOST", "127.0.0.1", "127.1", "127.255.255.254", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1"),
    *("0", "0.0.0.0", "127.0.0.1.", "localhost.", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),  # noqa: S104
    *("[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::ffff:10.0.0.1]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]"),
    *("[ff02::1]", "[fec0::1]", "[2001:db8::1]", "[3fff::1]", "[100::1]", "[64:ff9b:1::1]", "10.0.0.1", "172.16.0.1"),
    *("192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "203.0.113.9", "224.0.0.1"),
    *("239.255.255.250", "240.0.0.1", "255.255.255.255", "%31%32%37.0.0.1", "127.0.0.1%2f", "127.0.0.1\t"),
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_hosts_in_every_form_are_refused_without_a_connection(host: str, listener: socket.socket) -> None:
    url = f"http://{host}:{listener.getsockname()[1]}/"
    with pytest.raises(TargetRefused):
        check_target(url)
    with pytest.raises(TargetRefused):
        post(url, b"{}", {}, (), SOON_SECONDS)
    assert not was_reached(listener)


def carriers(carried: IPv4Address) -> list[IPv6Address]:
    """Return IPv6 addresses of each form that carries an IPv4 address."""
    number, other = int(carried), int(IPv4Address(PUBLIC))
    teredo = 0x2001_0000 << 96
    return [
        IPv6Address((0xFFFF << 32) | number),
        IPv6Address((0x64_FF9B << 96) | number),
        IPv6Address((0x2002 << 112) | (number << 80) | 1),
        IPv6Address(teredo | (number << 64) | (other ^ 0xFFFFFFFF)),
        IPv6Address(teredo | (other << 64) | (number ^ 0xFFFFFFFF)),
    ]


@pytest.mark.parametrize("form", range(5), ids=["mapped", "nat64", "6to4", "teredo server", "teredo client"])
def test_an_address_that_carries_another_counts_as_that_one(form: int) -> None:
    for private in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"):  # noqa: S104
        url = f"https://[{carriers(IPv4Address(private))[form]}]/"
        with pytest.raises(TargetRefused):
            check_target(url)
        check_target(url, (f"{private}/32",))
    check_target(f"https://[{carriers(IPv4Address(PUBLIC))[form]}]/")


@pytest.mark.parametrize(
    "url",
    [
        f"https://{PUBLIC}/",
        f"http://{PUBLIC}:80/a?b=c",
        f"https://{PUBLIC}:1024",
        f"HTTPS://{PUBLIC}:65535/",
        "https://[2606:4700::11]/",
    ],
)
def test_public_addresses_are_taken(url: str) -> None:
    check_target(url)


@pytest.mark.parametrize("host", ["metadata.google.internal", "a.localhost", "printer.local", "nas.home.arpa", "internal"])
def test_names_that_are_private_by_their_ending_are_refused_whatever_they_resolve_to(host: str, resolves: Resolver) -> None:
    resolves(host, [[PUBLIC]])
    for send in (check_target, lambda url: post(url, b"{}", {})):
        with pytest.raises(TargetRefused, match="unknown or not public"):
            send(f"https://{host}/")
    check_target(f"https://{host}/", (host,))
    check_target(f"https://{host}/", (PUBLIC,))


def test_one_private_address_among_several_is_enough_to_refuse(resolves: Resolver, listener: socket.socket) -> None:
    resolves(NAME, [[PUBLIC, "127.0.0.1"]])
    url = f"http://{NAME}:{listener.getsockname()[1]}/"
    for send in (check_target, lambda url: post(url, b"{}", {})):
        with pytest.raises(TargetRefused):
            send(url)
    assert not was_reached(listener)


def test_a_name_that_turns_private_after_the_check_is_not_connected_to(resolves: Resolver, listener: socket.socket) -> None:
    resolves(NAME, [[PUBLIC], ["127.0.0.1"]])
    url = f"http://{NAME}:{listener.getsockname()[1]}/"
    check_target(url)
    with pytest.raises(TargetRefused):
        post(url, b"{}", {})
    assert not was_reached(listener)


def test_a_name_that_turns_private_between_check_and_connection_is_not_asked_again(
    resolves: Resolver, listener: socket.socket
) -> None:
    asked = resolves(NAME, [[UNREACHED], ["127.0.0.1"]])
    with pytest.raises(DeliveryFailed):
        post(f"http://{NAME}:{listener.getsockname()[1]}/", b"{}", {}, (UNREACHED,), SOON_SECONDS)
    assert asked == [NAME]
    assert not was_reached(listener)


@contextmanager
def full(address: str, port: int) -> Iterator[None]:
    """Have an address of the loopback interface take no connections and refuse none, as a filtered one does."""
    with socket.create_server((address, port), backlog=0), ExitStack() as waiting:
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex((address, port))
        yield


def test_an_address_that_does_not_answer_leaves_time_for_the_next(resolves: Resolver) -> None:
    resolves(NAME, [["127.0.0.2", "127.0.0.1"]])
    with receiving(status(200)) as receiver, full("127.0.0.2", receiver.port):
        with pytest.raises(DeliveryFailed, match="gave no answer within"):
            post(f"http://127.0.0.2:{receiver.port}/", b"{}", {}, LOOPBACK, SOON_SECONDS)
        assert post(f"http://{NAME}:{receiver.port}/", b"{}", {}, LOOPBACK, 2) == 200
    assert [headers["host"] for _, headers, _ in receiver.got] == [f"{NAME}:{receiver.port}"]


def test_the_operator_opens_networks_addresses_and_exact_names(resolves: Resolver) -> None:
    resolves(NAME, [["10.1.2.3"]])
    url = f"https://{NAME}/"
    for allowed in ("10.0.0.0/8", " 10.1.2.3 ", "10.9.9.9/8", "Receiver.Example"):
        check_target(url, ("192.168.0.0/16", allowed))
    for other in ("192.168.0.0/16", "10.1.2.4", "example", "other.example", "receiver", "10.0.0.0/33", "", "*"):
        with pytest.raises(TargetRefused, match="BITWRIGHT_WEBHOOK_TARGETS"):
            check_target(url, (other,))


def test_an_unknown_name_and_a_private_one_get_the_same_answer(monkeypatch: pytest.MonkeyPatch, resolves: Resolver) -> None:
    resolves(NAME, [["10.1.2.3"]])
    with pytest.raises(TargetRefused) as private:
        check_target(f"https://{NAME}/")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    with pytest.raises(TargetRefused) as unknown:
        check_target(f"https://{NAME}/")
    assert str(private.value) == str(unknown.value)


REFUSED_URLS = {
    "user": (f"https://hush@{PUBLIC}/", "user name"),
    "password": (f"https://me:hush@{PUBLIC}/", "user name"),
    "another host before the at": (f"https://example.com:443@{PUBLIC}/", "user name"),
    "ftp": (f"ftp://{PUBLIC}/", "scheme 'ftp'"),
    "file": ("file:///etc/passwd", "scheme 'file'"),
    "gopher": (f"gopher://{PUBLIC}:6379/_x", "scheme 'gopher'"),
    "no scheme": (f"//{PUBLIC}/", "scheme ''"),
    "port 0": (f"https://{PUBLIC}:0/", "port 0 "),
    "port 22": (f"https://{PUBLIC}:22/", "port 22 "),
    "port 1023": (f"https://{PUBLIC}:1023/", "port 1023 "),
    "port 65536": (f"https://{PUBLIC}:65536/", "port 65536 "),
    "negative port": (f"https://{PUBLIC}:-1/", "port -1 "),
    "port of other digits": (f"https://{PUBLIC}:٤٤٣/", "plain ASCII"),
    "unicode host": ("https://exämple.com/", "plain ASCII"),
    "fullwidth digits": ("https://\uff11\uff12\uff17.0.0.1/", "plain ASCII"),
    "unicode dots": ("https://127。0。0。1/", "plain ASCII"),
    "short form": ("https://127.1/", "host '127.1'"),
    "one number": ("https://2130706433/", "host '2130706433'"),
    "hexadecimal": ("https://0x7f.0.0.1/", "host '0x7f.0.0.1'"),
    "octal": ("https://0177.0.0.1/", "plain ASCII"),
    "number as last label": ("https://example.1/", "host 'example.1'"),
    "empty host": ("https:///x", "host ''"),
    "only a port": ("https://:443/", "host ''"),
    "no slashes": ("https:example.com", "host ''"),
    "empty": ("", "scheme ''"),
    "empty label": ("https://a..example/", "host 'a..example'"),
    "long label": (f"https://{'a' * 64}.example/", "host 'aaa"),
    "long name": (f"https://{'a.' * 130}example/", "host 'a.a"),
    "backslash": (f"https://{PUBLIC}\\@127.0.0.1/", "plain ASCII"),
    "space": (f"https://{PUBLIC} /", "plain ASCII"),
    "line break": (f"https://{PUBLIC}/\r\nx: y", "plain ASCII"),
    "open bracket": ("https://[::1", "plain ASCII"),
}


@pytest.mark.parametrize("case", list(REFUSED_URLS))
def test_urls_of_other_kinds_are_refused_with_the_reason_though_all_is_open(case: str) -> None:
    url, reason = REFUSED_URLS[case]
    for send in (check_target, lambda url, allowed: post(url, b"{}", {}, allowed, SOON_SECONDS)):
        with pytest.raises(TargetRefused) as caught:
            send(url, ("0.0.0.0/0", "::/0"))
        assert reason in str(caught.value)
        assert "hush" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `NAME` that signs itself, with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
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


def test_tls_is_verified_for_the_name_in_the_url(certificate: Path, resolves: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with receiving(status(200)) as receiver, pytest.raises(DeliveryFailed, match="did not agree on TLS"):
        post(f"https://127.0.0.1:{receiver.port}/", b"{}", {}, LOOPBACK, 2)
    assert not receiver.got


def test_attempts_span_a_day_at_the_shortest_and_then_end() -> None:
    for draw, factor in ((0.0, 0.8), (0.5, 1.0), (1.0, 1.2)):
        delays = [delay_before(attempt, lambda draw=draw: draw) for attempt in range(1, len(RETRY_SECONDS) + 1)]
        assert delays == pytest.approx([factor * wait for wait in RETRY_SECONDS])
        assert sum(delay for delay in delays if delay is not None) >= 24 * 3600
    assert delay_before(0, lambda: 0.9) == 0
    assert delay_before(len(RETRY_SECONDS) + 1, lambda: 0.5) is None


def test_sending_loads_no_heavy_library() -> None:
    loaded = run_python("import sys, service.outbound; print(*sys.modules)").split()
    assert not {"torch", "transformers", "cvxpy", "numpy"} & set(loaded)
