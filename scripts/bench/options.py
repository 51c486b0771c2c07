"""The command line of benchmarks."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import OmegaConf


def parse(defaults: dict[str, Any], usage: str | None) -> dict[str, Any]:
    """Return the options, from the KEY=VALUE words of the command line. Exits with code 2 if one is
    unknown."""
    overrides: Any = OmegaConf.to_container(
        OmegaConf.from_dotlist([word for word in sys.argv[1:] if "=" in word])
    )
    if unknown := set(overrides) - set(defaults):
        print(f"no option {', '.join(sorted(unknown))}\n\n{usage}", file=sys.stderr)
        raise SystemExit(2)
    return defaults | overrides
