"""The header of a manifest: the state of a training besides its tensors, as a dataclass and as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from griffin.parallel.config import ModelConfig
from griffin.trainer.checkpoint.manifest_check import check_header, model_of
from griffin.trainer.checkpoint.zarr_io import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything that a manifest holds besides arrays and files.

    A feature that adds state to checkpoints puts it in `extras` under a name of its own (see `checkpoints.Stateful`).
    Code that does not know a name carries its value along unchanged.
    """

    step: int
    samples: int  # training samples consumed
    attempt: int  # of the run, counted from its first start
    created: str  # ISO 8601
    config: dict[str, Any]  # dataclasses.asdict of the run's; config["model"] is the architecture
    layout: dict[str, Any]  # of the run that saved; for information only
    optimizer: dict[str, Any] | None  # scalars of its state; None for weights only
    random: dict[str, str]  # states of random generators, base64
    spikes: dict[str, Any] | None = None  # state of `trainer.health.spikes.SpikeDetector`; None where it is off
    sources: tuple[str, ...] = ()  # what the weights were made from: averaged checkpoints, or converted files
    extras: dict[str, Any] = field(default_factory=dict)  # any other state, as JSON values by name

    @property
    def model(self) -> ModelConfig:
        """The architecture. CheckpointError if `config` lacks it, or has one that cannot be built."""
        try:
            return model_of(self.config)
        except ValueError as error:
            raise CheckpointError(f"the manifest of step {self.step}: {error}") from None


_FIELDS = {field.name: field for field in fields(Header)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is field.default_factory is MISSING]


def header_fields(header: Header) -> dict[str, Any]:
    """The header's fields by name, also of a Manifest."""
    return {name: getattr(header, name) for name in _FIELDS}


def header_to_json(header: Header) -> dict[str, Any]:
    """The JSON keys of a header, in order. Leaves out empty `extras`, which earlier versions would refuse."""
    return {name: value for name, value in header_fields(header).items() if name != "extras" or value}


def parse_header(values: Mapping[str, Any], besides: Collection[str]) -> Header:
    """Check and build the header of a JSON object. ValueError naming the first key that is not accepted.

    The object must also have the keys `besides`, which the caller checks, and no others.
    """
    check_header(values, known=[*_FIELDS, *besides], required=[*_REQUIRED, *besides])
    found = {name: values[name] for name in _FIELDS if name in values}
    return Header(**found | {"sources": tuple(values.get("sources", ()))})
