"""The header of a manifest: everything that a step says besides its arrays and files, as Python and as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from griffin.parallel.config import ModelConfig
from griffin.trainer.checkpoint.manifest_check import check_header, model_of
from griffin.trainer.checkpoint.zarr_io import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Header:
    """The state of a training besides its tensors, and where it comes from.

    State that a later feature adds goes into `extras`, by name: readers carry along the names that they do not know.
    """

    step: int
    samples: int  # training samples consumed
    attempt: int  # of the run, counted from its first start
    created: str  # ISO 8601
    config: dict[str, Any]  # dataclasses.asdict of the run's; config["model"] is the architecture
    layout: dict[str, Any]  # that it was saved from; nothing depends on it
    optimizer: dict[str, Any] | None  # its scalars; None for weights only
    random: dict[str, str]  # states of generators, base64
    spikes: dict[str, Any] | None = None  # state of `trainer.health.spikes.SpikeDetector`; None where it is off
    sources: tuple[str, ...] = ()  # what weights were made from: checkpoints that they are the mean of, or other files
    extras: dict[str, Any] = field(default_factory=dict)  # any other state, as JSON values by name

    @property
    def model(self) -> ModelConfig:
        """The architecture. CheckpointError where `config` lacks it, or has one that cannot be computed."""
        try:
            return model_of(self.config)
        except ValueError as error:
            raise CheckpointError(f"the manifest of step {self.step}: {error}") from None


_FIELDS = {field.name: field for field in fields(Header)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is field.default_factory is MISSING]


def header_fields(header: Header) -> dict[str, Any]:
    """The fields by name; of a Manifest those of its header alone."""
    return {name: getattr(header, name) for name in _FIELDS}


def header_to_json(header: Header) -> dict[str, Any]:
    """The keys of a header in a JSON object, in their order. Empty `extras` are left out, for readers without them."""
    return {name: value for name, value in header_fields(header).items() if name != "extras" or value}


def parse_header(values: Mapping[str, Any], besides: Collection[str]) -> Header:
    """Check the keys of a header in a JSON object, and build it. ValueError naming the key that is not accepted.

    The object must have the keys `besides` as well, which are left to the caller, and no others.
    """
    check_header(values, known=[*_FIELDS, *besides], required=[*_REQUIRED, *besides])
    found = {name: values[name] for name in _FIELDS if name in values}
    return Header(**found | {"sources": tuple(values.get("sources", ()))})
