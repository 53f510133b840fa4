"""What becomes of a command whose output nobody reads any more."""

import os
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Let this process go on quietly where the reader of its output goes away, as ``| head`` does.

    A run is not lost, and its exit status is its own.
    """
    sys.stdout, sys.stderr = _Unheard(sys.stdout), _Unheard(sys.stderr)  # type: ignore[assignment]


class _Unheard:
    """A stream that drops what it is given once its pipe is broken."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Send what is left in the buffers, and all to come, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
