"""Authenticated connections between the saving processes of a run, for messages and raw values.

Both sides of a connection prove that they know the run's key, by an HMAC of a nonce drawn by the other side. Messages
are JSON; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from griffin.parallel.world.axes import rank_name
from griffin.parallel.world.ranks import is_loopback, listen_on_loopback

CONTROL, VALUES = "control", "values"  # uses of a connection
CONNECT_SECONDS = 60.0  # to connect to a process that has just announced its address
_LENGTH = struct.Struct("!Q")
_LARGEST_GREETING = 1024  # bytes: bounds the memory that an unauthenticated peer can make this process allocate


class PeerTimeoutError(ConnectionError):
    """A process is connected but does not respond in time."""


class Channel:
    """A connection between two processes that send length-prefixed byte strings.

    One thread may receive; any thread may send. Raises ConnectionError naming `peer` when the connection is lost, and
    PeerTimeoutError when nothing can be sent or received for `timeout` seconds (None: no timeout).
    """

    def __init__(self, connection: socket.socket, peer: str, timeout: float | None):
        self.peer = peer
        self._socket = connection
        self._sending = threading.Lock()
        self.set_timeout(timeout)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def set_timeout(self, seconds: float | None) -> None:
        self._timeout = seconds
        self._socket.settimeout(seconds)

    def send(self, values: bytes | np.ndarray) -> None:
        """Send bytes, or a contiguous array that is not empty."""
        view = values.data.cast("B") if isinstance(values, np.ndarray) else memoryview(values)
        with self._sending:
            try:
                self._socket.sendall(_LENGTH.pack(view.nbytes))
                self._socket.sendall(view)
            except OSError as error:
                raise self._lost(error) from error

    def receive(self, largest: int | None = None) -> bytearray:
        data = bytearray(self._receive_length(largest))
        self._receive_into(memoryview(data))
        return data

    def receive_values(self, out: np.ndarray) -> None:
        """Fill the contiguous array `out`."""
        view = out.data.cast("B")
        size = self._receive_length(None)
        if size != view.nbytes:
            raise ConnectionError(f"{self.peer} sent {size} bytes where {view.nbytes} were expected")
        self._receive_into(view)

    def send_message(self, message: dict[str, Any]) -> None:
        self.send(json.dumps(message).encode())

    def receive_message(self, largest: int | None = None) -> dict[str, Any]:
        return json.loads(self.receive(largest))

    def shut_down(self) -> None:
        """Shut the connection down for both sides: a thread that sends or receives gets an error."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, which no thread may use any longer."""
        self.shut_down()
        self._socket.close()

    def _receive_length(self, largest: int | None) -> int:
        header = bytearray(_LENGTH.size)
        self._receive_into(memoryview(header))
        (length,) = _LENGTH.unpack(header)
        if largest is not None and length > largest:
            raise ConnectionError(f"{self.peer} sent a message of {length} bytes, of at most {largest}")
        return length

    def _receive_into(self, view: memoryview) -> None:
        while view.nbytes > 0:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise self._lost(error) from error
            if count == 0:
                raise self._lost(None)
            view = view[count:]

    def _lost(self, error: OSError | None) -> ConnectionError:
        if isinstance(error, TimeoutError) and self._timeout is not None:
            return PeerTimeoutError(f"no answer from {self.peer} within {self._timeout:g} s")
        return ConnectionError(f"lost {self.peer}" + (f" ({error})" if error is not None else ""))


class Listener:
    """Accepts connections from the saving processes of other ranks, and keeps each until `take` asks for it."""

    def __init__(self, host: str, key: bytes, timeout: float):
        """`host` is the name at which other ranks reach this machine."""
        if is_loopback(host):
            self._socket = listen_on_loopback(host, 0, backlog=1024)
        elif socket.has_dualstack_ipv6():
            self._socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        self._key, self._timeout = key, timeout
        self._waiting: dict[tuple[int, int, str], Channel] = {}  # by (save, rank, use)
        self._ended = 0  # the last save that has ended
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def take(self, save: int, rank: int, use: str, peer: str, seconds: float | None) -> Channel:
        """Wait for the connection of `rank` for one use in a save.

        Raises ConnectionError after `seconds` (None: no limit) or when the save has ended.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while (save, rank, use) not in self._waiting:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise ConnectionError(f"{peer} did not connect within {seconds:g} s")
                if save <= self._ended:
                    raise ConnectionError("the save was aborted")
                self._changed.wait(left)
            channel = self._waiting.pop((save, rank, use))
        channel.peer = peer
        return channel

    def end(self, save: int) -> None:
        """Close connections of this save and of earlier ones, and refuse later ones."""
        with self._changed:
            self._ended = save
            for place in [place for place in self._waiting if place[0] <= save]:
                self._waiting.pop(place).close()
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:  # that peer is gone already, or too many files are open
                time.sleep(0.1)
                continue
            threading.Thread(target=self._welcome, args=(connection, str(address)), daemon=True).start()

    def _welcome(self, connection: socket.socket, address: str) -> None:
        channel = Channel(connection, address, CONNECT_SECONDS)
        try:
            nonce = secrets.token_bytes(32)
            channel.send(nonce)
            greeting = bytes(channel.receive(_LARGEST_GREETING))
            if not hmac.compare_digest(
                channel.receive(_LARGEST_GREETING), _proof(self._key, b"client", nonce, greeting)
            ):
                raise ConnectionError(f"{address} does not know the key")
            hello = json.loads(greeting)
            channel.send(_proof(self._key, b"server", bytes.fromhex(hello["nonce"]), greeting))
        except (OSError, ValueError):
            channel.close()
            return
        channel.set_timeout(_timeout_for(hello["use"], self._timeout))
        place = (hello["save"], hello["rank"], hello["use"])
        with self._changed:
            if place[0] > self._ended:
                self._waiting[place] = channel
                self._changed.notify_all()
                return
        channel.close()


class Exchange:
    """The connections that this rank makes and accepts in one save."""

    def __init__(
        self,
        listener: Listener | None,
        key: bytes,
        *,
        save: int,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        timeout: float,
    ):
        """`addresses` are (host, port) of every rank. A single rank needs no listener."""
        self.save, self.rank = save, rank
        self._listener, self._key, self._addresses, self._timeout = listener, key, addresses, timeout
        self._channels: dict[tuple[str, int, str], Channel] = {}
        self._is_aborted = False
        self._lock = threading.Lock()

    def peer(self, rank: int) -> str:
        return f"the saving process of {rank_name(rank, self._addresses[rank][0])}"

    def connect(self, rank: int, use: str) -> Channel:
        """The connection from this rank to another; made at the first call."""
        place = ("to", rank, use)
        if place not in self._channels:
            self._keep(place, self._connect(rank, use))
        return self._channels[place]

    def accept(self, rank: int, use: str, seconds: float | None = None) -> Channel:
        """The connection from another rank to this one; the first call waits for it.

        A control connection is waited for `seconds` (default: the timeout). One for values has no time limit, as the
        peer connects when it has values to send.
        """
        place = ("from", rank, use)
        if place not in self._channels:
            assert self._listener is not None
            limit = _timeout_for(use, self._timeout if seconds is None else seconds)
            self._keep(place, self._listener.take(self.save, rank, use, self.peer(rank), limit))
        return self._channels[place]

    def abort(self) -> None:
        """Make every thread that sends or awaits values fail with a ConnectionError, now and later."""
        with self._lock:
            self._is_aborted = True
            for (_, _, use), channel in self._channels.items():
                if use == VALUES:
                    channel.shut_down()
        if self._listener is not None:
            self._listener.end(self.save)

    def close(self) -> None:
        """Close all connections, which no thread may use any longer."""
        self.abort()
        for channel in self._channels.values():
            channel.close()

    def _connect(self, rank: int, use: str) -> Channel:
        peer, timeout = self.peer(rank), min(CONNECT_SECONDS, self._timeout)
        try:
            connection = socket.create_connection(self._addresses[rank], timeout=timeout)
        except OSError as error:
            raise ConnectionError(f"cannot reach {peer} at port {self._addresses[rank][1]}: {error}") from error
        channel = Channel(connection, peer, timeout)
        try:
            nonce = bytes(channel.receive(_LARGEST_GREETING))
            mine = secrets.token_bytes(32)
            hello = {"save": self.save, "rank": self.rank, "use": use, "nonce": mine.hex()}
            greeting = json.dumps(hello).encode()
            channel.send(greeting)
            channel.send(_proof(self._key, b"client", nonce, greeting))
            if not hmac.compare_digest(
                channel.receive(_LARGEST_GREETING), _proof(self._key, b"server", mine, greeting)
            ):
                raise ConnectionError(f"{peer} does not know the key")
        except BaseException:
            channel.close()
            raise
        channel.set_timeout(_timeout_for(use, self._timeout))
        return channel

    def _keep(self, place: tuple[str, int, str], channel: Channel) -> None:
        with self._lock:
            self._channels[place] = channel
            if self._is_aborted and place[2] == VALUES:
                channel.shut_down()


def _timeout_for(use: str, timeout: float) -> float | None:
    """No timeout for values, which a rank may await for as long as another writes: `Exchange.abort` ends the wait."""
    return None if use == VALUES else timeout


def _proof(key: bytes, side: bytes, nonce: bytes, greeting: bytes) -> bytes:
    return hmac.digest(key, side + nonce + greeting, hashlib.sha256)
