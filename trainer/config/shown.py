"""Text from data, files and models as a terminal may print it.

A terminal obeys control characters: they can hide text, set the title, fill the clipboard or, in
old terminals, type commands. All printed text passes through `shown`, which writes them as
escapes: ESC becomes \\x1b. `say` prints, `protect_console` does it for what rich prints, and
`trainer.config.secrets.redact_logs` for logs.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# C0 without tab and new line, DEL, C1, marks that turn the direction of text, lone surrogates
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str) -> str:
    """Return a text with its control characters written as escapes. Tabs and new lines stay."""
    return _UNSAFE.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def shown_json(text: str) -> str:
    """Return JSON with the control characters of its strings as JSON's own escapes, so that what is
    printed can be read back."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def say(*parts: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Print as `print` does, with control characters shown."""
    text = shown(" ".join(str(part) for part in parts))
    print(text, end=end, file=sys.stdout if file is None else file, flush=flush)


def protect_console() -> None:
    """Show control characters in all that rich's own console prints. Rich's colours stay."""
    import rich
    from rich.console import Console, ConsoleOptions, RenderHook
    from rich.segment import Segment

    class Shown:
        """A renderable whose text is shown."""

        def __init__(self, renderable: Any):
            self.renderable = renderable

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
            for segment in console.render(self.renderable, options):
                control = segment.control  # rich's own, such as moving the cursor
                text = segment.text if control else shown(segment.text)
                yield Segment(text, segment.style, control)

    class Hook(RenderHook):
        """Passes everything that is printed through Shown."""

        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            return [Shown(renderable) for renderable in renderables]

    console: Any = rich.get_console()
    if not getattr(console, "shows_controls", False):
        console.shows_controls = True
        console.push_render_hook(Hook())
