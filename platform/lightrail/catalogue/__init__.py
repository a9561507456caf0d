"""The catalogue: which plugins are installed, what they accept, and the loading of the one that is named."""

from lightrail.catalogue.plugin import Plugin, available, find, load, plugins
from lightrail.catalogue.target import import_target

__all__ = ["Plugin", "available", "find", "import_target", "load", "plugins"]
