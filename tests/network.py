"""Notices connections beyond this machine, and refuses them; of this process, not of others that it starts."""

import ipaddress
import socket
import sys

OWN = {None, "", "localhost", "ip6-localhost", socket.gethostname()}
_attempts: list[str] | None = None


class BeyondError(ConnectionRefusedError):
    """A test may connect to this machine only."""


def is_local(host: object) -> bool:
    host = host.decode("utf-8", "replace") if isinstance(host, bytes | bytearray) else host
    if host in OWN:
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) and address else None  # others are paths of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not is_local(host):
        assert _attempts is not None
        _attempts.append(f"{event} {host!r}")
        raise BeyondError(f"{event}: {host!r} is beyond this machine")


def watch() -> list[str]:
    """The attempts from now on. An audit hook stays as long as the process."""
    global _attempts
    if _attempts is None:
        _attempts = []
        sys.addaudithook(_hook)
    return _attempts
