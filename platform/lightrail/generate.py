"""The ``generate`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightrail.errors import PluginError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples from a trained run; says what it needs where no sampler is installed.

    Args:
        arguments: The words after ``generate``; those of the process by default.

    Returns:
        The exit status.
    """
    from lightrail import configuration
    from lightrail.catalogue import available
    from lightrail.command import reporting_errors

    words = list(sys.argv[1:] if arguments is None else arguments)
    with reporting_errors() as outcome:
        if {"-h", "--help"} & set(words):
            print(configuration.help_text("generate"))
            return 0
        samplers = available("sampler")
        raise PluginError(
            "nothing here can generate yet",
            found=f"samplers installed: {', '.join(samplers) or 'none'}",
            allowed="a run whose task is generative (it offers denoiser() and noise_path()), and a sampler plugin",
            remedy="Install a package that registers samplers under the entry-point group 'lightrail.sampler', "
            "then list them with `lightrail plugins --kind sampler`.",
        )
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
