"""Files that would run code, were they read as Python reads its own."""

from __future__ import annotations

import io
import pickle
import zipfile


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def hostile_files(canary):
    """Pickles with code, in each layout that torch.load reads."""
    import torch

    plain = io.BytesIO()
    torch.save({"adapter": Payload(canary)}, plain)
    yield "zip", plain.getvalue()
    old = io.BytesIO()
    torch.save({"adapter": Payload(canary)}, old, _use_new_zipfile_serialization=False)
    yield "legacy", old.getvalue()
    yield "bare", pickle.dumps(Payload(canary), protocol=2)
    yield "nothing", b""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/../../canary", "x")
        file.writestr("a/data.pkl", pickle.dumps({}))
    yield "climbing", archive.getvalue()
