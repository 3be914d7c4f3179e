"""How large a fleet may be, and what each engine gets. Words of an operator; knows nothing of what carries them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.settings import Settings, SettingsError
from service.settings_sources import one_line

# The door does not listen itself: what carries HTTP to it does.
NOT_THE_DOORS = ("host", "port")
DRAIN_MARGIN_SECONDS = 15.0


class FleetOptions(BaseModel):
    """The size of a fleet.

    Attributes:
        min_replicas, max_replicas: engines; between them, demand decides.
        target_ongoing_requests: running and waiting requests an engine, on average, that the fleet is scaled to; None:
            three quarters of what an engine computes at once.
        num_cpus: cores an engine is given, and on a CPU its threads.
        num_gpus: GPUs an engine is given: 1, or 0 on a CPU.
        upscale_delay_s, downscale_delay_s: how long demand must last before the fleet follows it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    max_replicas: Annotated[int | None, Field(ge=1, le=10_000)] = None
    target_ongoing_requests: Annotated[float | None, Field(gt=0)] = None
    num_cpus: Annotated[float, Field(gt=0, le=4096)] = 1
    num_gpus: Annotated[int, Field(ge=0, le=1)] = 0
    upscale_delay_s: Annotated[float, Field(ge=0, le=86400)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0, le=86400)] = 600.0

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} must be at least min_replicas={self.min_replicas}")
        return self


def read_arguments(arguments: Mapping[str, Any]) -> tuple[FleetOptions, Settings]:
    """`name=value` arguments as the fleet's options and the service's settings, by the settings' own names.

    Raises:
        SettingsError: a value that is not possible, or a name that neither knows.
    """
    mine = {name: value for name, value in arguments.items() if name in FleetOptions.model_fields}
    rest = {name: value for name, value in arguments.items() if name not in mine}
    for name in rest:
        if name in NOT_THE_DOORS:
            raise SettingsError(f"{name}: the address is the proxy's: `serve start --http-host --http-port`")
        if name not in Settings.model_fields:
            known = ", ".join([*FleetOptions.model_fields, *Settings.model_fields])
            raise SettingsError(f"{name} is unknown; there are {known}")
    try:
        return FleetOptions.model_validate(mine), Settings(**rest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if error.title == FleetOptions.__name__:
            where = "".join(f"{part}: " for part in first["loc"])
            raise SettingsError(f"{where}{first['msg']}") from None
        raise SettingsError(one_line(first, Settings, rest)) from None
