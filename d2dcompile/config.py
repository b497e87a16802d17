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

from .errors import ConfigError, D2DError
from .rules import RULES, check_value

RUNTIME_VARIABLES = ("D2D_DUMP", "D2D_IMPL", "D2D_CACHE")
CHOICES = {
    "rule": RULES,
    "router": ("norms", "classify", "centroid"),
    "clustering": ("kmeans", "coactivation", "random"),
}


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
        rule: which experts a token runs by their scores, "max" (the paper's tau), "top_k" or "top_p" (see
            `kernels.gate`); `set_rule` changes it later.
        rule_value: k or p, stored as the default where the rule is "top_k" or "top_p"; None runs all.
        shared_experts: experts per site that are always on, those of the largest mean target.
        router: what predicts the experts' scores: "norms" (trained on their output norms, the paper's),
            "classify" (trained on their activations, MoEfication's) or "centroid" (untrained: cosine to
            the mean up- or gate-row); see `d2dcompile.router`.
        share_routers: whether projections that read the same x, such as the blocks that replaced Q, K and V,
            get one first router layer, fitted for all of them together; not with "centroid". Saves a tenth
            to a third of their time on CPUs, and costs quality at the same width: at tau .3 a mean IoU with
            the exact choice of .750 instead of .789 in MiniLM.
        router_patience: epochs without a better validation after which a fit ends; 0 never ends early.
        clustering: "kmeans" (balanced k-means on the up- or gate-rows), "coactivation" (on which tokens
            of the first calibration batches activate a neuron) or "random" (a baseline).
        calibration_tokens: tokens kept per site for fitting routers, a uniform sample of the stream.
        calibration_bytes: memory for kept tokens over all sites; lowers the former when exceeded.
        exclude: patterns, as of a shell ("layers.0.*"), of the names of sites to leave dense.
        seed: of clustering, sampling and router fitting; same seed, same artifact.
    """

    experts: int | None = None
    expert_size: int = 32
    router_width: int = 128
    router_epochs: int = 30
    tau: float = 0.0
    rule: str = "max"
    rule_value: float | None = None
    shared_experts: int = 0
    router: str = "norms"
    share_routers: bool = False
    router_patience: int = 0
    clustering: str = "kmeans"
    calibration_tokens: int = 65536
    calibration_bytes: int = 4 << 30
    exclude: tuple[str, ...] = ()
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
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                listed = " or ".join(map(repr, known))
                raise ConfigError(f"Config.{name} is {getattr(self, name)!r}; expected {listed}.")
        if not isinstance(self.share_routers, bool):
            raise ConfigError(
                f"Config.share_routers is {self.share_routers!r}; expected True or False."
            )
        self._check_rule()
        patterns = isinstance(self.exclude, (tuple, list))
        if not (patterns and all(isinstance(p, str) for p in self.exclude)):
            raise ConfigError(
                f"Config.exclude is {self.exclude!r}; expected a tuple of patterns of site names, such as "
                '("layers.0.*",).'
            )
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for name in ("seed", "shared_experts", "router_patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"Config.{name} is {value!r}; expected an integer >= 0.")

    def _check_rule(self) -> None:
        """Raise ConfigError for a number that the rule cannot have."""
        if self.rule == "max" and self.rule_value is not None:
            raise ConfigError(
                f"Config.rule_value is {self.rule_value!r} with rule 'max'; expected None. Set tau."
            )
        if self.rule != "max" and self.tau != 0:
            raise ConfigError(
                f"Config.tau is {self.tau!r} with rule {self.rule!r}; expected 0. Set rule_value."
            )
        if self.rule_value is not None:
            try:
                check_value(self.rule, self.rule_value)
            except D2DError as error:
                raise ConfigError(f"Config.rule_value: {error}") from None

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
    return check_value("max", value)


def _is_tau(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0.0 <= value <= 1.0


def _parse(variable: str, name: str, text: str) -> Any:
    """The typed value of one variable; None is spelt 'none'."""
    if name in CHOICES:
        return text
    if name in ("experts", "rule_value") and text.lower() == "none":
        return None
    if name == "share_routers":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"{variable} is {text!r}; expected true or false.")
        return text.lower() in ("true", "1")
    if name == "exclude":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    number = name in ("tau", "rule_value")
    try:
        return float(text) if number else int(text)
    except ValueError:
        kind = "a number" if number else "an integer"
        raise ConfigError(f"{variable} is {text!r}; expected {kind}.") from None
