"""A ProxyCommand that connects to HOST PORT and delays every byte by SECONDS in each direction: a
far-away target on loopback.
"""

from __future__ import annotations

import collections
import os
import selectors
import socket
import sys
import time


def main() -> None:
    """Carry bytes both ways until either side ends."""
    host, port, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    peer = socket.create_connection((host, port))
    routes = {0: peer.fileno(), peer.fileno(): 1}
    waiting: collections.deque = collections.deque()  # (due, descriptor, data), in order
    with selectors.DefaultSelector() as selector:
        for descriptor in routes:
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, descriptor, data = waiting.popleft()
                if not data:
                    return
                while data:
                    data = data[os.write(descriptor, data) :]
            for key, _ in selector.select(
                max(waiting[0][0] - time.monotonic(), 0) if waiting else None
            ):
                data = os.read(key.fd, 65536)
                waiting.append((time.monotonic() + delay, routes[key.fd], data))
                if not data:
                    selector.unregister(key.fd)


if __name__ == "__main__":
    main()
