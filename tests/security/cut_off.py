"""Runs a command with the loopback device and no other, so that no route leads anywhere else.

unshare --map-root-user --net python cut_off.py COMMAND ...
"""

import errno
import fcntl
import os
import socket
import struct
import sys

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def loopback_up():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def check_cut_off():
    with socket.socket() as client:
        found = client.connect_ex(("192.0.2.1", 80))
    assert found == errno.ENETUNREACH, os.strerror(found)


if __name__ == "__main__":
    loopback_up()
    check_cut_off()
    os.execvp(sys.argv[1], sys.argv[1:])
