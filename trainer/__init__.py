"""Graft: parameter-efficient fine-tuning from one Hydra config. `python -m trainer
+experiment=NAME` is the program."""

import os
import sys

# Ctrl-C during the imports of the program, which take a second: no traceback. argv[0] is -m while
# Python looks for the program; importing this package elsewhere changes no handler. _signal is the
# part of signal that imports nothing. exit_with puts Python's own handler back.
if sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) == "graft":
    import _signal

    _signal.signal(_signal.SIGINT, lambda *_: os._exit(130))

import logging
from importlib import metadata

# bitsandbytes warns at import of an optional kernel package, at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# PyPI has other projects that install packages of these names. pip overwrites one with the other
# without a word, and uninstalling theirs removes our files. So no run starts if they are there.
for _name in ("adapters", "trainer", "tasks"):
    try:
        _version = metadata.version(_name)
    except metadata.PackageNotFoundError:
        continue
    raise ImportError(
        f"the package {_name} {_version} from PyPI is installed and puts its files where Graft's"
        f" own package '{_name}' belongs. Remove it with: pip uninstall -y {_name}  and then"
        " install Graft again."
    )
