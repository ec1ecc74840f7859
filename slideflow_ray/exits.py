"""How commands and job scripts end: the exit code of an error, said in one line."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable

from slideflow_ray.errors import ConfigError, CorruptStore, InfrastructureError, SlideflowError

EXIT_OK, EXIT_CONFIG, EXIT_FAILURES, EXIT_INFRA, EXIT_VERIFY, EXIT_DRIFT = 0, 2, 3, 4, 5, 6
EXIT_BUG, EXIT_INTERRUPTED = 70, 130

SURROUNDINGS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
"""What a folder or a disk may answer, whoever asks."""


def code_of(error: SlideflowError) -> int:
    """Return the exit code that an error of ours ends a command with."""
    if isinstance(error, CorruptStore):
        return EXIT_VERIFY
    if isinstance(error, InfrastructureError):
        return EXIT_INFRA
    return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILURES


def ending(work: Callable[[], int]) -> int:
    """Do a script's work and return its exit code; what goes wrong is said on standard error."""
    try:
        return work()
    except SlideflowError as error:
        sys.stderr.write(f"{error}\n")
        return code_of(error)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; run the same command again to resume.\n")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever nobody planned for ends with its own code
        if isinstance(error, OSError) and error.errno in SURROUNDINGS:
            sys.stderr.write(f"E_INFRA: {error}. Next: look at that folder or disk, then run the same again.\n")
            return EXIT_INFRA
        traceback.print_exc()
        sys.stderr.write("E_BUG: this should not happen. Next: please report it with the lines above.\n")
        return EXIT_BUG
