"""Runs commands of Graft in processes that have its imports already, which take most of the time of
a short command.

    python -m tests.warm SOCKET             waits for commands
    python -S warm.py SOCKET graft WORDS...      runs one there, with this process's folder,
                                                 environment, standard streams and exit code
"""

from __future__ import annotations

import json
import os
import socket
import sys


def ask(path: str, words: list[str]) -> int:
    """Run a command in the process that waits at a socket, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        content = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(content).encode() + b"\n"], [0, 1, 2])
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(16) or b"1")


def serve(path: str) -> list[str]:
    """Wait for commands, and run each in a child. Returns the words, in the child only."""
    from trainer.assembly import quiet, trained
    from trainer.evaluation import run_metrics, streamed_answer
    from trainer.exporting import formats
    from trainer.session import inspect, session

    assert all((quiet, trained, run_metrics, streamed_answer, formats, inspect, session))
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen()
    os.rename(f"{path}.new", path)  # it is there once it listens
    while True:
        connection, _ = server.accept()
        text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while more := connection.recv(1 << 16):
            text += more
        content = json.loads(text)
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            connection.close()
            for stream in streams:
                os.close(stream)
            continue
        server.close()
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(content["folder"])
        os.environ.clear()
        os.environ.update(content["environment"])
        return content["words"]


if __name__ == "__main__":
    place, *rest = sys.argv[1:]
    if rest:
        sys.exit(ask(place, rest[1:]))
    sys.argv = ["graft", *serve(place)]
    from trainer.__main__ import main

    main()
