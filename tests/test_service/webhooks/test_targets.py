"""Promises of service.webhooks.sending: webhooks reach checked addresses only."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address

import pytest

from service.errors import DeliveryFailed, TargetRefused
from service.webhooks.sending import post
from service.webhooks.targets import check_target
from tests.support.web_server import (
    LOOPBACK,
    NAME,
    PUBLIC,
    SOON_SECONDS,
    UNREACHED,
    Resolver,
    receiving,
    status,
    was_reached,
)

PRIVATE_HOSTS = [
    *(
        "localhost",
        "LOCALHOST",
        "127.0.0.1",
        "127.1",
        "127.255.255.254",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
    ),
    *(
        "0",
        "0.0.0.0",  # noqa: S104
        "127.0.0.1.",
        "localhost.",
        "[::1]",
        "[::]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
    ),
    *(
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[::ffff:10.0.0.1]",
        "[fe80::1]",
        "[fe80::1%25lo]",
        "[fc00::1]",
    ),
    *(
        "[ff02::1]",
        "[fec0::1]",
        "[2001:db8::1]",
        "[3fff::1]",
        "[100::1]",
        "[64:ff9b:1::1]",
        "10.0.0.1",
        "172.16.0.1",
    ),
    *(
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.8",
        "192.0.2.1",
        "198.18.0.1",
        "203.0.113.9",
        "224.0.0.1",
    ),
    *(
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "%31%32%37.0.0.1",
        "127.0.0.1%2f",
        "127.0.0.1\t",
    ),
]


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_hosts_in_every_form_are_refused_without_a_connection(
    host: str, listener: socket.socket
) -> None:
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


@pytest.mark.parametrize(
    "form", range(5), ids=["mapped", "nat64", "6to4", "teredo server", "teredo client"]
)
def test_an_address_that_carries_another_counts_as_that_one(form: int) -> None:
    for private in (
        "10.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104
        "224.0.0.1",
    ):
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


@pytest.mark.parametrize(
    "host",
    ["metadata.google.internal", "a.localhost", "printer.local", "nas.home.arpa", "internal"],
)
def test_names_that_are_private_by_their_ending_are_refused_whatever_they_resolve_to(
    host: str, resolves: Resolver
) -> None:
    resolves(host, [[PUBLIC]])
    for send in (check_target, lambda url: post(url, b"{}", {})):
        with pytest.raises(TargetRefused, match="unknown or not public"):
            send(f"https://{host}/")
    check_target(f"https://{host}/", (host,))
    check_target(f"https://{host}/", (PUBLIC,))


def test_one_private_address_among_several_is_enough_to_refuse(
    resolves: Resolver, listener: socket.socket
) -> None:
    resolves(NAME, [[PUBLIC, "127.0.0.1"]])
    url = f"http://{NAME}:{listener.getsockname()[1]}/"
    for send in (check_target, lambda url: post(url, b"{}", {})):
        with pytest.raises(TargetRefused):
            send(url)
    assert not was_reached(listener)


def test_a_name_that_turns_private_after_the_check_is_not_connected_to(
    resolves: Resolver, listener: socket.socket
) -> None:
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
    """Have a loopback address take no connections and refuse none, as a filtered one does."""
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
    for other in (
        "192.168.0.0/16",
        "10.1.2.4",
        "example",
        "other.example",
        "receiver",
        "10.0.0.0/33",
        "",
        "*",
    ):
        with pytest.raises(TargetRefused, match="BITWRIGHT_WEBHOOK_TARGETS"):
            check_target(url, (other,))


def test_an_unknown_name_and_a_private_one_get_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, resolves: Resolver
) -> None:
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
