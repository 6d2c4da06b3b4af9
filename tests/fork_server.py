"""Forked processes begin from the test process itself, as it is before its first test: everything is imported there."""

import io
import os
import sys
from multiprocessing import connection, forkserver, resource_tracker
from socket import AF_UNIX, socket


def start() -> None:
    """What multiprocessing would start with an interpreter that imports all of it again."""
    server = forkserver._forkserver
    if server._forkserver_pid is not None or sys.version_info >= (3, 14):  # there it is started in another way
        return
    resource_tracker.ensure_running()
    with socket(AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")
        listener.bind(address)
        listener.listen()
        alive_r, alive_w = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(alive_w)
                _be_the_server(listener.detach(), alive_r)
            finally:
                os._exit(1)
        os.close(alive_r)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid


def _be_the_server(listener: int, alive: int) -> None:
    sys.stdout, sys.stderr = (  # pytest has put others in their place
        io.TextIOWrapper(io.FileIO(number, "w"), write_through=True) for number in (1, 2)
    )
    import forked_imports  # noqa: F401 - what no test file has imported yet

    try:
        forkserver.main(listener, alive, [])
    except SystemExit:  # the test process has ended
        os._exit(0)
