"""The errors that bigseg raises, as one tree.

Every message is one sentence in three parts: what was given, the rule it breaks, what to do. Each
leaf is also a builtin, so that callers who know nothing of bigseg can catch it.

    BigsegError                                   exit code 1
    ├── UsageError          (ValueError)          2   wrong usage
    │   └── ConfigError                           2   wrong configuration
    ├── InputError          (ValueError)          3   the input cannot be used
    │   ├── InputNotFoundError (FileNotFoundError)
    │   ├── NotOmeZarrError
    │   ├── BadChunkError
    │   └── ModelFileError
    ├── IncompleteError     (RuntimeError)        4   finished with blocks set aside
    └── ResourceError       (OSError)             5   no device, no space, no permission
        ├── StoreError                                a store that cannot be read
        └── OutputError
            └── LockedError
"""

from typing import ClassVar


class BigsegError(Exception):
    """Any error that bigseg raises on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(BigsegError, ValueError):
    """A command or function was called in a way it does not allow."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class InputError(BigsegError, ValueError):
    """The input exists but cannot be used."""

    exit_code = 3


class InputNotFoundError(InputError, FileNotFoundError):
    """The input is not there."""


class NotOmeZarrError(InputError):
    """What was given is not an OME-Zarr image."""


class BadChunkError(InputError):
    """A stored chunk of an image cannot be decoded."""


class ModelFileError(InputError):
    """A model file is truncated, foreign, or does not fit the image."""


class IncompleteError(BigsegError, RuntimeError):
    """Everything else is done, but some blocks were set aside; a rerun does only those."""

    exit_code = 4


class ResourceError(BigsegError, OSError):
    """Something outside is missing: a device, space, a permission, a cluster."""

    exit_code = 5


class StoreError(ResourceError):
    """A store does not let its objects be read: no permission, or no answer."""


class OutputError(ResourceError):
    """The output cannot be written."""


class LockedError(OutputError):
    """Another run writes this output, or has taken it over."""
