"""Hosts of our own, for as long as they are needed: network namespaces on a bridge."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A network namespace with one address.

    Attributes:
        name: Of the namespace.
        address: Of its interface.
    """

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """What runs a command there; it replaces ``ip``, whose process it is."""
        return ["ip", "netns", "exec", self.name, *command]


def why_no_hosts() -> str | None:
    """Why there can be no hosts; ``None`` where there can."""
    if shutil.which("ip") is None:
        return "there is no ip (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"lc{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made.stderr.strip() or None


@contextlib.contextmanager
def hosts(count: int) -> Iterator[tuple[str, list[Host]]]:
    """Make namespaces that reach each other, and this one, through a bridge and nothing else.

    Args:
        count: How many, at most 250.

    Yields:
        This process's own address on the bridge, and the hosts.

    Raises:
        RuntimeError: If that is not possible here; says why.
    """
    reason = why_no_hosts()
    if reason is not None:
        raise RuntimeError(reason)
    mark, net = f"lc{os.getpid() % 100_000}", f"10.{200 + os.getpid() % 50}.0"
    with contextlib.ExitStack() as stack:
        _ip("link", "add", mark, "type", "bridge")
        stack.callback(_ip, "link", "delete", mark)
        _ip("address", "add", f"{net}.1/24", "dev", mark)
        _ip("link", "set", mark, "up")
        made = [Host(f"{mark}-{i}", f"{net}.{i + 2}") for i in range(count)]
        for i, host in enumerate(made):
            outside, inside = f"{mark}o{i}", f"{mark}i{i}"
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "delete", host.name)  # and the pair of interfaces with it
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
            _ip("link", "set", inside, "netns", host.name)
            _ip("link", "set", outside, "master", mark, "up")
            within = ("-n", host.name)
            _ip(*within, "address", "add", f"{host.address}/24", "dev", inside)
            _ip(*within, "link", "set", inside, "up")
            _ip(*within, "link", "set", "lo", "up")
        yield f"{net}.1", made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
