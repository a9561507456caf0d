"""What was measured of a method, on the card that ``lightrail plugins NAME`` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lightrail.files import replacing

__all__ = ["update_cards"]


def update_cards(path: Path, sentences: Mapping[str, list[str]]) -> None:
    """Writes sentences by class into a package's ``measured.json``; what it says of other classes stays.

    Args:
        path: The file.
        sentences: By the dotted path of a class.
    """
    before: dict[str, list[str]] = json.loads(path.read_text()) if path.exists() else {}
    text = json.dumps(dict(sorted({**before, **sentences}.items())), indent=1, ensure_ascii=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")
