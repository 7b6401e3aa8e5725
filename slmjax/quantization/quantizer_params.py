"""Paths of quantizer parameters: the only place that recognises them.

A weight's quantizer has its parameters below the weight's path (`.../query/weight/log_scale`), that of a
layer's inputs below its module's (`.../query/input_quantizer/log_scale`). Checkpoints call such a module
`input`, `hidden_input` or `head_input` (`definition.FORMER_MODULES`); both names are recognised.
"""

from slmjax.models.definition import FORMER_MODULES
from slmjax.quantization.estimators import SIGN

QUANTIZER_PARAMS = ("log_scale", SIGN, "offset")
# The names of now, and those in checkpoints.
_MODULES = frozenset({*FORMER_MODULES, *FORMER_MODULES.values()})


def is_quantizer_param(path: str) -> bool:
    """Whether this is a scale or an offset of a quantizer, and no parameter of a layer."""
    return is_weight_quantizer_param(path) or is_activation_quantizer_param(path)


def is_weight_quantizer_param(path: str) -> bool:
    """Whether this belongs to the quantizer of a weight."""
    return _has_quantizer_name(path) and not is_activation_quantizer_param(path)


def is_activation_quantizer_param(path: str) -> bool:
    """Whether this belongs to the quantizer of a layer's inputs."""
    return _has_quantizer_name(path) and path.split("/")[-2] in _MODULES


def is_sign(path: str) -> bool:
    """Whether this is the sign of trained scales, which no optimizer changes.

    Checkpoints written before signs were stored lack it, and all their scales are positive.
    """
    return path.rpartition("/")[2] == SIGN and is_quantizer_param(path)


def _has_quantizer_name(path: str) -> bool:
    # A norm's own parameter is `scale`: none of these names is a layer's.
    return "/" in path and path.rpartition("/")[2] in QUANTIZER_PARAMS
