"""Parameterizations: how initial weights, multipliers and learning rates depend on width and depth.

    scaling = Scaling(kind=Parameterization.MUP, width=4.0)    # 4 times as wide as the base
    scaling.hidden_std, scaling.logits                         # 0.5, 0.25

Hyperparameters are tuned at a base model. A parameterization says how the settings of another width or depth
follow from those of the base, so that activations, their changes in training and the best learning rate stay
about the same. All factors are 1 at the base: there every parameterization is the standard one. This file has
the factors of the model; those of the optimizer are in `training.multipliers`.

Sources: muP is table 8 of Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466), whose multiplier of the
logits also suits tied embeddings. CompleteP is table 1 of Dey et al. 2025 (arXiv 2505.01618) with alpha = 1.

Dims: D model, H head dim.
"""

import dataclasses
import enum


class Parameterization(enum.Enum):
    """How settings that were tuned at one size apply to another."""

    STANDARD = "standard"  # as they are
    MUP = "mup"  # across widths: maximal update parameterization
    COMPLETEP = "completep"  # across widths and depths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """The size of a model relative to its base, and the factors that follow from it."""

    kind: Parameterization = Parameterization.STANDARD
    width: float = 1.0  # width of the residual stream over that of the base; 1 for the standard one
    depth: float = 1.0  # layers over those of the base; 1 except for CompleteP
    base_head_dim: int | None = None  # dims of a head of the base (None: those of the model)

    @property
    def hidden_std(self) -> float:
        """Factor of the initial deviation of matrices between two widths that grow: width**-1/2."""
        # The output is a sum over the inputs: its variance stays.
        return self.width**-0.5

    @property
    def router_std(self) -> float:
        """Factor of the initial deviation of matrices from a width that grows to a fixed one: 1 / width."""
        # A readout, like the head, whose factor is in the logits instead because its table may be tied.
        return 1.0 / self.width

    @property
    def logits(self) -> float:
        """Factor of the logits: 1 / width."""
        # In training, hidden states and rows of the head align: the sum over D grows with D, not its root.
        return 1.0 / self.width

    @property
    def residual(self) -> float:
        """Factor of what a sublayer adds to the residual stream: 1 / depth."""
        # Updates of all layers point the same way, so that their sum grows with depth, not its root.
        return 1.0 / self.depth

    def score_scale(self, head_dim: int, scale: float | None) -> float:
        """Return the factor of attention scores: `scale`, or H**-1/2, at the base, and with 1 / H elsewhere.

        Args:
          head_dim: dims of a query, H.
          scale: the setting of the mixer; None for its default.
        """
        base = head_dim if self.base_head_dim is None else self.base_head_dim
        at_base = base**-0.5 if scale is None else scale
        # Trained queries and keys align: their product grows with H, not with its root.
        return at_base * (base / head_dim)


UNSCALED = Scaling()  # the standard parameterization, and every other at its base
