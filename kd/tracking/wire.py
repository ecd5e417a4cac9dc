"""One JSON object a line, over a socket: how a stage and the recorder talk."""

import json
import select
import socket
from collections.abc import Mapping
from typing import Any


class Line:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        """Args: connection: A connected stream socket; the line owns it."""
        self._socket = connection
        self._reader = connection.makefile("rb")

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; OSError if the other end is gone."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """The next message; ConnectionError if the other end hung up, TimeoutError if it is slow.

        Args:
            timeout: Seconds to wait; None for as long as it takes.
        """
        self._socket.settimeout(timeout)
        try:
            text = self._reader.readline()
        finally:
            self._socket.settimeout(None)
        if not text.endswith(b"\n"):
            raise ConnectionError("the other end hung up")
        message: dict[str, Any] = json.loads(text)
        return message

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        return not select.select([self._socket], [], [], seconds)[0]

    def close(self) -> None:
        """Hang up."""
        self._reader.close()
        self._socket.close()
