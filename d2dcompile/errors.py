"""Every error and warning that a user can cause, as a class: what was seen, expected, and to do.

All errors derive from `D2DError`; those about a bad value derive from `ValueError` too, so that
plain `except ValueError` keeps working. Warnings are classes, so that they can be filtered by name.
"""


class D2DError(Exception):
    """Base of all errors of this package."""


class ConfigError(D2DError, ValueError):
    """A field of `Config`, or a `D2D_*` variable, has an impossible value or an unknown name."""


class OptionError(D2DError, ValueError):
    """`torch.compile(backend="d2dmoe", options=..., mode=...)` got an option it does not know."""


class NoConversionError(D2DError, RuntimeError):
    """A graph has convertible sites but no conversion belongs to its weights."""


class PlanError(D2DError, ValueError):
    """The asked-for split into experts is impossible, for example E does not divide H."""


class CalibrationError(D2DError, ValueError):
    """Calibration data is missing, or holds NaN or infinity."""


class WeightsChangedError(D2DError, RuntimeError):
    """Weights of a converted site were edited or swapped after the conversion."""


class ConversionMismatchError(D2DError, ValueError):
    """A conversion was made for other weights than those it is asked to attach to."""


class ArtifactError(D2DError, ValueError):
    """A saved conversion is damaged, incomplete, of another format, or reaches out of its folder."""


class TauError(D2DError, ValueError):
    """A threshold is not a finite number in 0..1, or names a site that does not exist."""


class RuleError(D2DError, ValueError):
    """A selection rule is unknown or its number impossible, or a graph routes sites in another way."""


class BudgetError(D2DError, ValueError):
    """`fit_tau` was given no budget, several, or one that no threshold reaches."""


class SparsifyError(D2DError, ValueError):
    """`sparsify` or `relufy` got an impossible argument, or a site whose activation it cannot reach."""


class FinetuneError(D2DError, ValueError):
    """`finetune` got an impossible argument, a foreign conversion, or a model that is in it already."""


class ProjectionError(D2DError, ValueError):
    """`replace_projections` got an impossible argument, or a model without projections to replace."""


class ExpressionError(D2DError, ValueError):
    """An activation text is not an elementwise expression over known operators."""


class KernelError(D2DError, RuntimeError):
    """An op was asked for an implementation that does not exist or refuses the arguments."""


class TuningError(D2DError, ValueError):
    """A tuning run was asked for what it cannot measure, or a file of schedules is damaged."""


class VerifyError(D2DError, RuntimeError):
    """A graph breaks an invariant after a pass; a defect of this package, please report it."""


class D2DWarning(UserWarning):
    """Base of all warnings of this package."""


class CalibrationWarning(D2DWarning):
    """The data is too small, or a metric too coarse, for what is fitted to it to be trusted."""


class DenseFallbackWarning(D2DWarning):
    """A graph or a call runs dense although it has convertible sites; the message says why."""
