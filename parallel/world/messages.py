"""What ranks tell each other besides tensors: JSON, read back as the types that are expected, and signed in the store.

A store or a peer may be anybody's: nothing that comes from one is unpickled.
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
    """Something in the store or from a peer is not what a rank of this run writes."""


def pack(value: Any) -> bytes:
    """JSON of what JSON knows, and of bytes, paths, sets and dataclasses. TypeError for anything else."""
    return json.dumps(value, default=_plain).encode()


def unpack(text: bytes, kind: Any) -> Any:
    """What `pack` was given, where that was a `kind`: a type as annotations write it, say `tuple[int, str | None]`.

    ForgedError where it is of another kind.
    """
    try:
        return _typed(json.loads(text), kind)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ForgedError(f"expected {getattr(kind, '__name__', kind)}, got {text[:60]!r} ({error})") from None


def seal(key: bytes, name: str, value: Any) -> bytes:
    """`pack(value)` to be put into the store as `name`, signed with the run's key."""
    text = pack(value)
    return _signature(key, name, text) + text


def unseal(key: bytes, name: str, sealed: bytes, kind: Any, source: str = "the rendezvous store holds") -> Any:
    """What was sealed. ForgedError where it was with another key, for another name, or is of another kind."""
    signature, text = sealed[:_DIGEST], sealed[_DIGEST:]
    if not hmac.compare_digest(signature, _signature(key, name, text)):
        raise ForgedError(f"{name}: {source} what no rank of this run has written")
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
    raise TypeError(f"{type(value).__name__} is no message: {value!r}")


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
    if type(value) is not kind:  # a bool is no integer
        raise TypeError(f"{kind.__name__} expected, not {type(value).__name__}")
    return value


def _one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    """As the first of the kinds that fits."""
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
