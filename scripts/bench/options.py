"""What benchmarks are given on the command line."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import OmegaConf


def given(defaults: dict[str, Any], usage: str | None) -> dict[str, Any]:
    """The options, from the KEY=VALUE words of the command line; the program ends with code 2 where
    one is unknown."""
    found: Any = OmegaConf.to_container(
        OmegaConf.from_dotlist([word for word in sys.argv[1:] if "=" in word])
    )
    if unknown := set(found) - set(defaults):
        print(f"no option {', '.join(sorted(unknown))}\n\n{usage}", file=sys.stderr)
        raise SystemExit(2)
    return defaults | found
