"""The protocol between a stage and the recorder: one JSON object per line, over a socket."""

import json
import select
import socket
from collections.abc import Mapping
from typing import Any


class Line:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        """Args: connection: A connected stream socket, owned by this object."""
        self._socket = connection
        self._reader = connection.makefile("rb")

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; raises OSError if the other end is gone."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Receive a message.

        Args:
            timeout: Seconds to wait; None waits indefinitely.

        Raises:
            ConnectionError: the other end closed the connection.
            TimeoutError: no message came in time.
        """
        self._socket.settimeout(timeout)
        try:
            text = self._reader.readline()
        finally:
            self._socket.settimeout(None)
        if not text.endswith(b"\n"):
            raise ConnectionError("the other end closed the connection")
        message: dict[str, Any] = json.loads(text)
        return message

    def is_silent(self, seconds: float) -> bool:
        """Whether no message arrives within so many seconds."""
        return not select.select([self._socket], [], [], seconds)[0]

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()
        self._socket.close()
