"""What can go wrong, each with a code, and what to do about it.

::

    SlideflowError
    ├── ConfigError          E_CONFIG        ValueError         nothing was started
    │   ├── CohortError      E_COHORT                           a row of the cohort cannot be used
    │   ├── SplitLeakError   E_SPLIT_LEAK                       one patient or file in two splits
    │   └── BundleError      E_BUNDLE                           a bundle is incomplete or does not fit
    ├── SlideError           E_SLIDE         ValueError         this slide, and only this slide
    │   ├── SlideNotFound    E_NOT_FOUND     FileNotFoundError
    │   ├── NotASlide        E_NOT_A_SLIDE                      refused
    │   ├── ReadError        E_READ          OSError
    │   ├── SourceChanged    E_CHANGED       OSError            a remote object changed while it was read
    │   ├── TruncatedSlide   E_TRUNCATED     OSError            refused
    │   ├── NoMpp            E_NO_MPP                           refused
    │   ├── BadMpp           E_BAD_MPP                          refused
    │   ├── BadDimensions    E_DIMENSIONS                       refused
    │   ├── MaskError        E_MASK                             the user's tissue mask
    │   ├── StainError       E_STAIN                            its stains cannot be told, or the model has none such
    │   └── AnnotationError  E_ANNOTATION
    ├── NanScore             E_NAN_SCORE     ArithmeticError    a model returned NaN
    ├── OutOfMemory          E_OUT_OF_MEMORY MemoryError
    ├── StoreError           E_STORE         RuntimeError
    │   └── CorruptStore     E_CHECKSUM                         bytes differ from their commit
    ├── InfrastructureError  E_INFRA         RuntimeError       resumable
    │   ├── WorkerLost       E_WORKER_LOST
    │   ├── Quarantined      E_QUARANTINE                       refused
    │   ├── ProfileError     E_PROFILE                          a worker cannot compute the same bytes
    │   ├── LeaseError       E_LEASE                            another run owns the output folder
    │   └── DiskFull         E_DISK          OSError
    └── UnexpectedError      E_BUG           RuntimeError       an exception nobody planned for

``refused`` errors describe the input: trying again without changing it cannot
help, so a rerun skips those slides unless it is told ``--retry``.
"""

from __future__ import annotations

from typing import ClassVar


class SlideflowError(Exception):
    """The root of the tree: a code for machines, a sentence and a next step for people."""

    code: ClassVar[str] = "E_SLIDEFLOW"
    refused: ClassVar[bool] = False
    next_step: ClassVar[str] = "See the message above."

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        self.message = _printable(message)
        super().__init__(self.message)
        self.step = next_step or type(self).next_step

    def __str__(self) -> str:
        return f"{self.code}: {self.message} Next: {self.step}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.step)


def _printable(text: str) -> str:
    """Write out what would move a terminal's cursor: a message may quote a stranger's file."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _rebuild(kind: type[SlideflowError], message: str, step: str) -> SlideflowError:
    return kind(message, next_step=step)


class ConfigError(SlideflowError, ValueError):
    code = "E_CONFIG"
    next_step = "Correct the setting and start again; nothing was started."


class CohortError(ConfigError):
    code = "E_COHORT"
    next_step = "Correct the named row of the cohort and start again."


class SplitLeakError(ConfigError):
    code = "E_SPLIT_LEAK"
    next_step = "Put every row of the patient (or file) into one split."


class BundleError(ConfigError):
    code = "E_BUNDLE"
    next_step = "Point --model at a folder with bundle.json and weights.safetensors."


class SlideError(SlideflowError, ValueError):
    code = "E_SLIDE"
    next_step = "Look at the slide; the others went on without it."


class SlideNotFound(SlideError, FileNotFoundError):
    code = "E_NOT_FOUND"
    next_step = "Correct the uri in the cohort, or restore the file, and run again."


class NotASlide(SlideError):
    code = "E_NOT_A_SLIDE"
    refused = True
    next_step = "Replace the file by a slide in a supported format, or drop its row."


class ReadError(SlideError, OSError):
    code = "E_READ"
    next_step = "Copy the slide again from its source and run again."


class SourceChanged(SlideError, OSError):
    """A remote object is no longer what it was when its reading began."""

    code = "E_CHANGED"
    next_step = "Wait until it is written whole, then run again."


class TruncatedSlide(SlideError, OSError):
    code = "E_TRUNCATED"
    refused = True
    next_step = "The file is incomplete: copy it again from its source and run with --retry."


class NoMpp(SlideError):
    code = "E_NO_MPP"
    refused = True
    next_step = "Add a column `mpp` (um per pixel of level 0) to the cohort and run with --retry."


class BadMpp(SlideError):
    code = "E_BAD_MPP"
    refused = True
    next_step = "Give the true um per pixel in the cohort's column `mpp` and run with --retry."


class BadDimensions(SlideError):
    code = "E_DIMENSIONS"
    refused = True
    next_step = "The file's header is not credible; copy it again or drop its row."


class MaskError(SlideError):
    code = "E_MASK"
    next_step = "Correct the tissue mask named in the cohort's column `mask`, or empty the cell, and run again."


class StainError(SlideError):
    code = "E_STAIN"
    next_step = "Look at the slide's staining and its columns `stain` and `modality`, then run again."


class AnnotationError(SlideError):
    code = "E_ANNOTATION"
    next_step = "Correct the annotation file named above and evaluate again."


class NanScore(SlideflowError, ArithmeticError):
    code = "E_NAN_SCORE"
    next_step = "Try the model in fp32 (--precision fp32); if it still returns NaN, the weights are broken."


class OutOfMemory(SlideflowError, MemoryError):
    code = "E_OUT_OF_MEMORY"
    next_step = "Use fewer workers or a smaller micro-batch; the geometry of the results stays as it is."


class StoreError(SlideflowError, RuntimeError):
    code = "E_STORE"
    next_step = "Run `slideflow-ray verify OUT` to see what is wrong with the output folder."


class CorruptStore(StoreError):
    code = "E_CHECKSUM"
    next_step = "The bytes changed after they were written: run `slideflow-ray repair OUT`, then the same run again."


class InfrastructureError(SlideflowError, RuntimeError):
    code = "E_INFRA"
    next_step = "Run the same command again: it resumes where this one stopped."


class WorkerLost(InfrastructureError):
    code = "E_WORKER_LOST"


class Quarantined(InfrastructureError):
    code = "E_QUARANTINE"
    refused = True
    next_step = "This slide killed its worker twice while alone in it; look at the file, then run with --retry."


class ProfileError(InfrastructureError):
    code = "E_PROFILE"
    next_step = "Run on machines like the first, or choose another --precision, which makes new results beside the old."


class LeaseError(InfrastructureError):
    code = "E_LEASE"
    next_step = "Wait for the other run, or choose another --out."


class DiskFull(InfrastructureError, OSError):
    code = "E_DISK"
    next_step = 'Free space, choose another --out, or set store.tiles = "none".'


class UnexpectedError(SlideflowError, RuntimeError):
    code = "E_BUG"
    next_step = "Please report this with the traceback above; a rerun tries the slide again."


def as_slideflow_error(error: BaseException, about: str) -> SlideflowError:
    """Return `error` itself if it is one of ours, else the nearest of ours with the cause in its text."""
    if isinstance(error, SlideflowError):
        return error
    text = f"{about}: {type(error).__name__}: {error}".rstrip(". ") + "."
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return OutOfMemory(text)
    if isinstance(error, OSError) and error.errno == 28:  # ENOSPC
        return DiskFull(text)
    return UnexpectedError(text)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that a GPU's memory, or the host's, is used up; no torch is loaded to learn that."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
