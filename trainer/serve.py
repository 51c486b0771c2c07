"""Serve runs and their base on this machine, for programs that use OpenAI's API.

    graft serve run=FOLDER[@last|best|STEP] [port=8000] [OPTIONS]
    graft serve runs=[FOLDER,FOLDER] [OPTIONS]

The models are called `base` and by the names of the run folders. All share one loaded base, so that
switching takes no time. /v1/models lists them; /v1/chat/completions and /v1/completions answer,
whole or as a stream. The page at / shows the answers of two models side by side.

If a run has a drafter, it drafts what the model then verifies, which changes no text. draft=false
decodes without it.

It is for trying and evaluating on one machine: requests are decoded one after another. To serve
many users, export the run; docs/serve.md has the commands of other servers.

POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, load further runs of the
same base while it runs, and unload runs.

Only this machine can reach it, unless host= names another address, which also turns loading off.
Then set a key, which clients send as OPENAI_API_KEY: GRAFT_API_KEY in the environment, or api_key=,
which `ps` shows to others.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config import paths
from trainer.config.decoding_options import DrafterOptions, GrowthOptions
from trainer.config.errors import bad
from trainer.config.options import exit_with, option, parse
from trainer.config.shown import say

PACKAGES = ("starlette", "uvicorn", "pydantic")
# what the extra `serve` of pyproject.toml has
INSTALL = "pip install 'starlette>=1.10,<2' 'uvicorn>=0.54,<1' 'pydantic>=2.14,<3'"


def _runs_fault(text: str) -> str | None:
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        return "expected several runs as [FOLDER,FOLDER]"
    names = [name.strip() for name in inner[1:-1].split(",")]
    faults = (paths.saved_fault(name) for name in names)
    return next((fault for fault in faults if fault), None)


@dataclass(frozen=True)
class Options(GrowthOptions, DrafterOptions):
    """The options of the command line."""

    run: str | None = option(
        "the run folder", None, value="FOLDER[@last|best|STEP]", reads=paths.saved_fault
    )
    runs: str | None = option(
        "several runs of one base", None, value="[FOLDER,FOLDER]", reads=_runs_fault
    )
    draft: bool = option("let a drafter draft", True)
    host: str = option("the address to listen on", "127.0.0.1")
    port: int = option("port to listen on; 0 takes a free one", 8000, at_least=0, at_most=65535)
    api_key: str | None = option("what clients must send", None, value="KEY")
    max_tokens: int = option("most tokens of an answer, if the request names none", 512, at_least=1)
    queue: int = option("requests that may wait; beyond it they are refused", 64, at_least=1)

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        yield from super().faults()
        if (self.run is None) == (self.runs is None):
            yield "give either run=FOLDER or runs=[FOLDER,FOLDER]"


def main(argv: list[str]) -> int:
    """Run the command; see the module's text."""
    options = parse(Options, argv, __doc__, "graft serve")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        names = ", ".join(missing)
        return bad(f"graft serve needs {names}, which {verb} not installed here. Fix: {INSTALL}")
    from trainer.assembly import quiet
    from trainer.evaluation.decode_ways import DraftOptions
    from trainer.serving import listening, models
    from trainer.session import failures

    quiet.quiet()
    try:
        runs = models.paths_of(options.run, options.runs)
        models.check(runs, options)
        opened = listening.bound(options.host, options.port)
        strategy = DraftOptions.of(options).strategy()
        loader = models.Loader(options if options.draft else None, strategy)
        served = loader.start(runs)
        key = options.api_key or os.environ.get("GRAFT_API_KEY") or None
        limits = (options.max_tokens, options.queue)
        further = loader if _is_loopback(options.host) else None
        server = listening.make_server(served, options.host, key, *limits, further)
        for line in models.described(served):
            say(f"    {line}")
        _announce(options.host, opened.getsockname()[1], key)
        listening.serve(server, opened)
    except Exception as error:
        return failures.report_and_exit_code(error)
    return 0


def _announce(host: str, port: int, key: str | None) -> None:
    shown = f"[{host}]" if ":" in host else host
    if not _is_loopback(host):
        who = "anyone with the key" if key else "anyone"
        say(
            f"warning: host={host} is no loopback address: {who} on its network can use this server"
        )
    place = f"http://{shown}:{port}"
    say(f"{place}/ is the page, {place}/v1 the API. Ctrl-C ends it", flush=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    exit_with(main)
