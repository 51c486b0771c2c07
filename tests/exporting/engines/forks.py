"""Run scripts of this folder in forks of one process that has imported an engine: an import takes
10 s, and a fork milliseconds. Run in an engine's own environment: python forks.py MODULE ...

Each line of standard input is a job in JSON: the words of a command, and the environment, folder
and log of its process. The answer is the exit code on a line of its own.
"""

import importlib
import json
import os
import runpy
import sys
import traceback


def run(job):
    """Run a job in this process, and end it."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["place"])
    sys.argv = job["words"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)  # tidying an engine away takes seconds
