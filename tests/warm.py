"""Runs commands of Graft in processes that have its imports already, which take most of the time of
a short command.

    python -m tests.warm SOCKET             waits for commands
    python -S warm.py SOCKET graft WORDS...      runs one there, with this process's folder,
                                                 environment, standard streams, signals and exit
                                                 code
    python -S warm.py SOCKET -m trainer[.VERB] WORDS...      the same as `python -m` names it; what
                                                 is not Graft's runs in a python of its own
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
POLL = 0.02  # s


def ask(path: str, module: str, words: list[str]) -> int:
    """Run a module in the process that waits at a socket, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        content = {
            "module": module,
            "words": words,
            "python": os.path.join(os.path.dirname(path), "python"),
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        socket.send_fds(connection, [json.dumps(content).encode() + b"\n"], [0, 1, 2])
        answers = connection.makefile("r")
        child = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(child, number))
        code = int(answers.readline() or "1")
    if code < 0:  # a signal ended it, and so it ends this process
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(path: str) -> dict[str, Any]:
    """Wait for commands, and run each in a child. Returns its request, in the child only."""
    from tests import quick
    from trainer.assembly import quiet, trained
    from trainer.evaluation import run_metrics, streamed_answer
    from trainer.exporting import formats
    from trainer.session import inspect, session

    assert all((quiet, trained, run_metrics, streamed_answer, formats, inspect, session))
    quick.install()
    quick.between_tests()
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen()
    os.rename(f"{path}.new", path)  # it is there once it listens
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children here
    while True:
        connection, _ = server.accept()
        text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while not text.endswith(b"\n"):
            text += connection.recv(1 << 16)
        if os.fork():
            connection.close()
            for stream in streams:
                os.close(stream)
            continue
        server.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if child := os.fork():
            for stream in streams:
                os.close(stream)
            watch(connection, child)
            os._exit(0)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        content: dict[str, Any] = json.loads(text)
        return content


def watch(connection: socket.socket, child: int) -> None:
    """Tell who asked which process runs and how it ends; it ends with who asked."""
    connection.send(f"{child}\n".encode())
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            connection.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            return
        if select.select([connection], [], [], POLL)[0] and not connection.recv(1):
            os.kill(child, signal.SIGKILL)
            return


def python(place: str) -> str:
    """Write a program that runs Graft's modules in the process at a socket, next to that; returns
    its path."""
    program = Path(place).with_name("python")
    program.write_text(
        f"#!{sys.executable} -S\n"
        f"import runpy, sys\n"
        f"sys.argv[1:1] = [{place!r}]\n"
        f"runpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def main(place: str, words: list[str]) -> int:
    """Run a command as another process."""
    if words[0] == "graft":
        return ask(place, "graft", words[1:])
    named = words[words[0] == "-u" :]
    if named[0] == "-m" and named[1].partition(".")[0] == "trainer":
        return ask(place, named[1], named[2:])
    os.execv(sys.executable, [sys.executable, *words])


def become(content: dict[str, Any]) -> None:
    """Run what was asked for, in this process."""
    import runpy

    os.chdir(content["folder"])
    os.environ.clear()
    os.environ.update(content["environment"])
    module = content["module"]
    sys.argv = [module, *content["words"]]
    if module == "graft":
        from trainer.__main__ import main

        main()
        return
    sys.executable = content["python"]  # of the processes that it starts
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    place, *rest = sys.argv[1:]
    if rest:
        sys.exit(main(place, rest))
    become(serve(place))
