"""Every knob of conversion and lowering, documented, typed and overridable by `D2D_*` variables.

    D2D_<FIELD>=value    overrides the default of that field of `Config`, e.g. D2D_EXPERT_SIZE=64
    D2D_DUMP=folder      writes each captured and rewritten graph there
    D2D_CACHE=folder     keeps measured schedules there
    D2D_IMPL=op:name,..  picks an implementation, e.g. D2D_IMPL=expert_mlp:reference

A `D2D_*` variable with another name is an error, so that a misspelt one is never ignored.
"""

import os
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError, TauError

RUNTIME_VARIABLES = ("D2D_DUMP", "D2D_IMPL", "D2D_CACHE")


@dataclass(frozen=True)
class Config:
    """How a dense model becomes experts: sizes, router, calibration, seed.

    Attributes:
        experts: experts per site; None derives it from `expert_size`. Must divide the hidden size.
        expert_size: hidden neurons per expert aimed at when `experts` is None; the nearest divisor
            of the hidden size within a factor of two is taken (32 neurons: see the README's table).
        router_width: hidden units of each router (the paper uses 128, Szatkowski et al. 2024).
        router_epochs: passes over the kept calibration tokens when fitting a router.
        tau: threshold stored as the default of every site, 0 <= tau <= 1; 0 runs all experts.
        clustering: "kmeans" (balanced k-means on the up- or gate-rows) or "random" (a baseline).
        calibration_tokens: tokens kept per site for fitting routers, a uniform sample of the stream.
        calibration_bytes: memory for kept tokens over all sites; lowers the former when exceeded.
        seed: of clustering, sampling and router fitting; same seed, same artifact.
    """

    experts: int | None = None
    expert_size: int = 32
    router_width: int = 128
    router_epochs: int = 30
    tau: float = 0.0
    clustering: str = "kmeans"
    calibration_tokens: int = 65536
    calibration_bytes: int = 4 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts is not None:
            _positive("experts", self.experts)
        for name in ("expert_size", "router_width", "router_epochs", "calibration_tokens"):
            _positive(name, getattr(self, name))
        _positive("calibration_bytes", self.calibration_bytes)
        if not _is_tau(self.tau):
            raise ConfigError(
                f"Config.tau is {self.tau!r}; expected a number in 0..1 (0 is dense)."
            )
        if self.clustering not in ("kmeans", "random"):
            raise ConfigError(
                f"Config.clustering is {self.clustering!r}; expected 'kmeans' or 'random'."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"Config.seed is {self.seed!r}; expected an integer >= 0.")

    @classmethod
    def from_env(cls, **given: Any) -> "Config":
        """The configuration from `D2D_<FIELD>` variables, overridden by the given fields.

        Raises ConfigError for a variable that no field has, or whose text has the wrong type.
        """
        known = {f"D2D_{field.name.upper()}": field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in sorted(os.environ.items()):
            if variable.startswith("D2D_") and variable not in RUNTIME_VARIABLES:
                if variable not in known:
                    names = ", ".join([*known, *RUNTIME_VARIABLES])
                    raise ConfigError(f"Unknown variable {variable}; expected one of: {names}.")
                values[known[variable]] = _parse(variable, known[variable], text)
        return cls(**{**values, **given})


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"Config.{name} is {value!r}; expected an integer >= 1.")


def check_tau(value: Any) -> float:
    """The threshold as a float; TauError unless it is a finite number in 0..1."""
    if not _is_tau(value):
        raise TauError(f"tau is {value!r}; expected a finite number in 0..1 (0 runs all experts).")
    return float(value)


def _is_tau(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0.0 <= value <= 1.0


def _parse(variable: str, name: str, text: str) -> Any:
    """The typed value of one variable; None is spelt 'none'."""
    if name == "clustering":
        return text
    if name == "experts" and text.lower() == "none":
        return None
    try:
        return float(text) if name == "tau" else int(text)
    except ValueError:
        kind = "a number" if name == "tau" else "an integer"
        raise ConfigError(f"{variable} is {text!r}; expected {kind}.") from None
