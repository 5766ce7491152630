"""Messages between ranks besides tensors: JSON, parsed as the expected types, and signed.

The store and peers are not trusted: nothing received from them is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from griffin.parallel.world.ranks import RunError

_DIGEST = hashlib.sha256().digest_size


class ForgedError(RunError):
    """A message from the store or a peer was not written by a rank of this run."""


def pack(value: Any) -> bytes:
    """Encode a value as JSON, including bytes, paths, sets and dataclasses. TypeError for other types."""
    return json.dumps(value, default=_plain).encode()


def unpack(text: bytes, kind: Any) -> Any:
    """Decode what `pack` encoded, as type `kind`, written like an annotation: `tuple[int, str | None]`.

    Raises ForgedError for a value of another type.
    """
    try:
        return _typed(json.loads(text), kind)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ForgedError(f"expected {getattr(kind, '__name__', kind)}, got {text[:60]!r} ({error})") from None


def seal(key: bytes, name: str, value: Any) -> bytes:
    """Return `pack(value)`, signed with the run's key for `name`."""
    text = pack(value)
    return _signature(key, name, text) + text


def unseal(key: bytes, name: str, sealed: bytes, kind: Any, source: str = "the rendezvous store holds") -> Any:
    """Return the sealed value. ForgedError if it was sealed with another key or name, or has another type."""
    signature, text = sealed[:_DIGEST], sealed[_DIGEST:]
    if not hmac.compare_digest(signature, _signature(key, name, text)):
        raise ForgedError(f"{name}: {source} a value that no rank of this run has signed")
    return unpack(text, kind)


def _signature(key: bytes, name: str, text: bytes) -> bytes:
    return hmac.digest(key, len(name.encode()).to_bytes(8, "big") + name.encode() + text, hashlib.sha256)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as a message: {value!r}")


def _typed(value: Any, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, args)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(_expect(value, dict), kind)
    if origin is tuple and args[-1] is not Ellipsis:
        return tuple(_typed(item, each) for item, each in zip(_expect(value, list), args, strict=True))
    if origin in (list, tuple, set, frozenset):
        return origin(_typed(item, args[0]) for item in _expect(value, list))
    if origin in (dict, Mapping):
        return {_typed(name, args[0]): _typed(item, args[1]) for name, item in _expect(value, dict).items()}
    if kind is float:
        return float(value) if type(value) is int else _expect(value, float)
    if kind is bytes:
        return bytes.fromhex(_expect(value, str))
    if kind is Path:
        return Path(_expect(value, str))
    if kind is None or kind is types.NoneType:
        return _expect(value, types.NoneType)
    return _expect(value, {bool: bool, int: int, str: str}[kind])


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:  # type(), because a bool is an int
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return value


def _one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return the value as the first of the types that matches."""
    for kind in kinds:
        try:
            return _typed(value, kind)
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    raise TypeError(f"none of {kinds}")


def _dataclass(values: dict[str, Any], kind: type) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    if values.keys() != fields:
        raise TypeError(f"{kind.__name__} has other fields")
    hints = get_type_hints(kind)
    return kind(**{name: _typed(value, hints[name]) for name, value in values.items()})
