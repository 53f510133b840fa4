"""Keeps a command running when the reader of its output goes away."""

import os
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Let this process continue silently when the reader of its output goes away, as with ``| head``.

    The run is not lost, and keeps its own exit status.
    """
    sys.stdout, sys.stderr = _Unheard(sys.stdout), _Unheard(sys.stderr)  # type: ignore[assignment]


class _Unheard:
    """A stream that discards output once its pipe is broken."""

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
        """Discard buffered and all later output."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
