"""Reads the schemas of plugins by importing them; run as a module, it does so in a process of its own.

The command line must answer without torch, and a plugin that ends its process must not end the user's.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from lightrail.catalogue.signature import schema_of, source_files
from lightrail.catalogue.stamps import stamped
from lightrail.catalogue.target import import_target
from lightrail.errors import UserError

__all__ = ["main", "read_plugin"]


def read_plugin(kind: str, target: str) -> dict[str, Any]:
    """Imports a plugin and says what there is to know: its schema or why it is broken, and the files it came from."""
    try:
        plugin = import_target(target)
        schema = schema_of(kind, target, plugin).to_dict()
        json.dumps(schema)
    except (Exception, SystemExit) as error:
        return {"schema": None, "reason": _reason(error), "files": stamped(_files_of_failure(error, target))}
    return {"schema": schema, "reason": "", "files": stamped(source_files(plugin))}


def _reason(error: BaseException) -> str:
    return error.found if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _files_of_failure(error: BaseException, target: str) -> set[str]:
    """Where a mended plugin would show: the files that the failure passed through, and the folders of its package."""
    files: set[str] = set()
    chain: BaseException | None = error
    while chain is not None:
        files.update(frame.filename for frame in traceback.extract_tb(chain.__traceback__))
        if isinstance(chain, SyntaxError) and chain.filename:
            files.add(chain.filename)
        chain = chain.__cause__ or chain.__context__
    parts = target.split(".")
    for depth in range(1, len(parts)):
        module = sys.modules.get(".".join(parts[:depth]))
        files.update(getattr(module, "__path__", ()))
        if file := getattr(module, "__file__", None):
            files.add(file)
    return files


def main(request_file: str, answer_file: str) -> None:
    """Answers a request, one line a plugin, so that the answer shows at which one a process ended."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    with Path(answer_file).open("a", encoding="utf-8") as answer:
        for kind, target in request:
            answer.write(json.dumps(read_plugin(kind, target)) + "\n")
            answer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Threads that a plugin started at import are not waited for.
    os._exit(0)
