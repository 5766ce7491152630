"""Connections between the saving processes of a run, which hand each other messages and raw values.

Only processes that know the run's key are let in: each side of a connection proves it by a keyed hash of a number that
the other has drawn. Messages are JSON, and nothing is unpickled.
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

CONTROL, VALUES = "control", "values"  # what a connection is for
CONNECT_SECONDS = 60.0  # patience with a process that has just said where it is reached
_LENGTH = struct.Struct("!Q")
_LARGEST_GREETING = 1024  # bytes: a stranger cannot make this process reserve memory


class NoAnswerError(ConnectionError):
    """A process is connected but says nothing."""


class Channel:
    """A connection over which two processes send each other byte strings, each after its length.

    One thread may receive; any may send. ConnectionError naming `peer` where it is gone, NoAnswerError where it neither
    takes nor gives anything within `timeout` seconds; None waits until the connection ends.
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
        """Send bytes, or an array that is contiguous and not empty."""
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
        """Receive as many values as the contiguous array `out` takes."""
        view = out.data.cast("B")
        size = self._receive_length(None)
        if size != view.nbytes:
            raise ConnectionError(f"{self.peer} sent {size} bytes where {view.nbytes} were expected")
        self._receive_into(view)

    def send_message(self, message: dict[str, Any]) -> None:
        self.send(json.dumps(message).encode())

    def receive_message(self, largest: int | None = None) -> dict[str, Any]:
        return json.loads(self.receive(largest))

    def wake(self) -> None:
        """End the connection for both sides; a thread that sends or receives meets an error."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Once no thread uses the connection any longer."""
        self.wake()
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
            return NoAnswerError(f"no answer from {self.peer} within {self._timeout:g} s")
        return ConnectionError(f"lost {self.peer}" + (f" ({error})" if error is not None else ""))


class Listener:
    """Where the saving processes of other ranks reach this one: keeps each of their connections until it is taken."""

    def __init__(self, host: str, key: bytes, timeout: float):
        """`host` is the name by which others reach this machine."""
        if is_loopback(host):
            self._socket = listen_on_loopback(host, 0, backlog=1024)
        elif socket.has_dualstack_ipv6():
            self._socket = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]
        self._key, self._timeout = key, timeout
        self._waiting: dict[tuple[int, int, str], Channel] = {}  # by save, rank and use
        self._ended = 0  # the last save that has ended
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def take(self, save: int, rank: int, use: str, peer: str, seconds: float | None) -> Channel:
        """The connection that `rank` makes for a use in a save. ConnectionError after `seconds` or the save's end."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while (save, rank, use) not in self._waiting:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise ConnectionError(f"{peer} did not connect within {seconds:g} s")
                if save <= self._ended:
                    raise ConnectionError("the save was given up")
                self._changed.wait(left)
            channel = self._waiting.pop((save, rank, use))
        channel.peer = peer
        return channel

    def end(self, save: int) -> None:
        """Let go of what is connected for a save or earlier ones, now and later."""
        with self._changed:
            self._ended = save
            for place in [place for place in self._waiting if place[0] <= save]:
                self._waiting.pop(place).close()
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:  # that one is gone already, or there are too many open files for now
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
        channel.set_timeout(_patience(hello["use"], self._timeout))
        place = (hello["save"], hello["rank"], hello["use"])
        with self._changed:
            if place[0] > self._ended:
                self._waiting[place] = channel
                self._changed.notify_all()
                return
        channel.close()


class Exchange:
    """The connections of one save."""

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
        """`addresses` are (host, port) of every rank; a rank alone has no listener."""
        self.save, self.rank = save, rank
        self._listener, self._key, self._addresses, self._timeout = listener, key, addresses, timeout
        self._channels: dict[tuple[str, int, str], Channel] = {}
        self._given_up = False
        self._lock = threading.Lock()

    def peer(self, rank: int) -> str:
        return f"the saving process of {rank_name(rank, self._addresses[rank][0])}"

    def connect(self, rank: int, use: str) -> Channel:
        """The connection from this rank to another, made when it is first asked for."""
        place = ("to", rank, use)
        if place not in self._channels:
            self._keep(place, self._connect(rank, use))
        return self._channels[place]

    def accept(self, rank: int, use: str, seconds: float | None = None) -> Channel:
        """The connection from another rank to this one, waited for when it is first asked for.

        For `seconds` or the timeout if it is one for control; one for values is made only once there are some to send.
        """
        place = ("from", rank, use)
        if place not in self._channels:
            assert self._listener is not None
            patience = _patience(use, self._timeout if seconds is None else seconds)
            self._keep(place, self._listener.take(self.save, rank, use, self.peer(rank), patience))
        return self._channels[place]

    def give_up(self) -> None:
        """Wake every thread that sends or awaits values: it meets a ConnectionError, now and later."""
        with self._lock:
            self._given_up = True
            for (_, _, use), channel in self._channels.items():
                if use == VALUES:
                    channel.wake()
        if self._listener is not None:
            self._listener.end(self.save)

    def close(self) -> None:
        """Once no thread uses the connections any longer."""
        self.give_up()
        for channel in self._channels.values():
            channel.close()

    def _connect(self, rank: int, use: str) -> Channel:
        peer, patience = self.peer(rank), min(CONNECT_SECONDS, self._timeout)
        try:
            connection = socket.create_connection(self._addresses[rank], timeout=patience)
        except OSError as error:
            raise ConnectionError(f"cannot reach {peer} at port {self._addresses[rank][1]}: {error}") from error
        channel = Channel(connection, peer, patience)
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
        channel.set_timeout(_patience(use, self._timeout))
        return channel

    def _keep(self, place: tuple[str, int, str], channel: Channel) -> None:
        with self._lock:
            self._channels[place] = channel
            if self._given_up and place[2] == VALUES:
                channel.wake()


def _patience(use: str, timeout: float) -> float | None:
    """Values are awaited by who is early, however long: `Exchange.give_up` ends that, when control finds silence."""
    return None if use == VALUES else timeout


def _proof(key: bytes, side: bytes, nonce: bytes, greeting: bytes) -> bytes:
    return hmac.digest(key, side + nonce + greeting, hashlib.sha256)
