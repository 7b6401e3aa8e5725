"""Factors of the learning rate, weight decay and eps of each parameter, by the parameterization of the model.

    multipliers_of("segments/0/blocks/0/ffn/up/weight", num_dims=2, scaling=model.scaling)

They depend on the role of a parameter: how its two dims grow with the width of the model. With m_N the width
and m_L the depth relative to the base (`models.parameterization.Scaling`), for AdamW and Lion:

    role                                  rate     weight decay   eps of CompleteP
    input: embeddings, positions          1        1              1 / m_N
    output: an untied head                1        1              1 / m_N
    hidden: matrices, experts             1 / m_N  m_N            1 / (m_N m_L)
    router, exit gate                     1 / m_N  m_N            1 / (m_N m_L)
    vector: norms, biases, sinks          1        1              1 / (m_N m_L); the final norm 1 / m_N
    quantizer: learned scales, offsets    1        1              1

The weight decay is multiplied with the rate, so that their product stays, as in Dey et al. 2025 (arXiv
2505.01618) and in the package of Yang et al. 2022. The table of CompleteP multiplies rates inside the blocks
by m_L**(alpha - 1), which is 1 for its alpha of 1. Its eps follows the size of gradients; muP leaves eps.

Muon's update of a matrix has the spectral norm sqrt(max(1, outputs / inputs)) at all widths, which meets the
spectral condition (Yang et al. 2023, arXiv 2310.17813) for matrices of a constant aspect ratio: all factors
are 1. That holds between hidden layers only, so that other roles must be left to AdamW.
"""

import dataclasses
import enum

from slmjax.models.parameterization import Parameterization, Scaling
from slmjax.models.paths import is_in_layers
from slmjax.quantization.quantizer_params import is_quantizer_param


class Role(enum.Enum):
    """How the dims of a parameter grow with the width of the model."""

    INPUT = "input"  # from a fixed number of inputs to the width
    HIDDEN = "hidden"  # from one width to another
    OUTPUT = "output"  # from the width to the vocabulary; its 1 / width is a factor of the logits
    ROUTER = "router"  # from the width to a fixed number of outputs, of a router or a gate
    VECTOR = "vector"  # a number for each unit
    QUANTIZER = "quantizer"  # numbers of a number format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors of a parameter's settings of the optimizer."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0  # of the decay that is multiplied with the learning rate
    eps: float = 1.0  # AdamW's


def role_of(path: str, *, num_dims: int) -> Role:
    """Return the role of a parameter.

    Args:
      path: stack path or logical path.
      num_dims: dims of one parameter, without those that count layers and experts.
    """
    # First: the parameters of a quantizer are below the path of the weight.
    if is_quantizer_param(path):
        return Role.QUANTIZER
    if path.startswith(("embed/", "positions/")):
        return Role.INPUT
    if path.startswith("head/"):
        return Role.OUTPUT
    if path == "exit_gate/direction":
        return Role.ROUTER
    if num_dims < 2:
        return Role.VECTOR
    return Role.ROUTER if "/router/" in path or "/shared_gate/" in path else Role.HIDDEN


def multipliers_of(
    path: str, *, num_dims: int, scaling: Scaling, is_orthogonalized: bool = False
) -> Multipliers:
    """Return the factors of a parameter; all are 1 for the standard parameterization, and at the base.

    Args:
      path: stack path or logical path.
      num_dims: dims of one parameter, without those that count layers and experts.
      scaling: the model's size relative to its base.
      is_orthogonalized: whether Muon takes the parameter.

    Raises:
      ValueError: the parameter's role is unknown, or Muon takes one that is no matrix between two hidden
        layers.
    """
    if scaling.kind is Parameterization.STANDARD:
        return Multipliers()
    role = role_of(path, num_dims=num_dims)
    is_in_block = is_in_layers(path)
    if role is Role.HIDDEN and not is_in_block:
        # Another table outside the layers would silently train with the rate of a hidden matrix.
        raise ValueError(
            f"parameterization={scaling.kind.value} has no rule for {path}: set "
            "model.parameterization=standard"
        )
    if is_orthogonalized:
        if role is not Role.HIDDEN:
            raise ValueError(
                f"parameterization={scaling.kind.value} has no rule for {path} with muon: add a pattern that "
                "matches it to optim.muon_exclude, whose default leaves it to AdamW"
            )
        return Multipliers()
    eps = 1.0
    if scaling.kind is Parameterization.COMPLETEP and role is not Role.QUANTIZER:
        eps = 1.0 / (scaling.width * scaling.depth) if is_in_block else 1.0 / scaling.width
    if role in (Role.HIDDEN, Role.ROUTER):
        return Multipliers(learning_rate=1.0 / scaling.width, weight_decay=scaling.width, eps=eps)
    return Multipliers(eps=eps)
