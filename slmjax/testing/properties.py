"""The properties of a mixer: each function compares two ways to the same numbers, and returns its checks.

Bounds are relative to the largest number of what is compared (`report.largest_error`): in float32 sums of
another order differ by 1e-6 or so, and a mistake by 1e-2.

Dims: B rows, T time, D model.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from slmjax.models.architecture import ModelConfig, Precision, Remat
from slmjax.models.definition import define, restack, unstack
from slmjax.models.paths import is_multiplied
from slmjax.models.protocols import MixerConfig
from slmjax.models.zoo import state_size
from slmjax.parallel.mesh import MeshConfig
from slmjax.quantization.plan import assign_model_formats, shapes_of
from slmjax.quantization.rules import quant_of
from slmjax.testing.operations import count_operations
from slmjax.testing.report import Check, count_not_finite, largest_error, largest_tree_error
from slmjax.testing.subject import (
    DOCUMENTS,
    LENGTH,
    PROMPTS,
    ROWS,
    VOCAB,
    Rows,
    Subject,
    Values,
    hidden_states,
    packed_rows,
)

CLOSE = 3e-5  # float32, sums of another order
CLOSE_GRADIENT = 3e-4  # sums of more numbers, some of which cancel
SAME = 1e-5  # what may not depend on the changed numbers at all, in the same program
BFLOAT16 = 5e-2  # 8 bits, through a few products and a norm
FORMAT = "int8_row"  # fits matrices of any width
LEAST_EFFECT = 1e-3  # of a token on later ones


def weights_of(rows: Rows, dim: int, *, seed: int = 7) -> np.ndarray:
    """Return weights [B, T, D] of hidden states in a loss: random, and 0 for padding."""
    draws = np.random.default_rng(seed).standard_normal((*rows.tokens.shape, dim)).astype(np.float32)
    return draws * rows.is_real[..., None]


# Tokens and documents ---------------------------------------------------------------------------------------
def check_causality(subject: Subject, whole: Values, rows: Rows, weights: np.ndarray) -> list[Check]:
    """Later tokens change nothing before them, and something after them."""
    first = LENGTH // 2 + 1
    changed_tokens = rows.tokens.copy()
    changed_tokens[:, first] = (changed_tokens[:, first] + 1) % VOCAB
    changed = subject.values(dataclasses.replace(rows, tokens=changed_tokens), weights)
    error, where = largest_error(changed.hidden[:, :first], whole.hidden[:, :first])
    effect, _ = largest_error(changed.hidden[:, first + 1 :], whole.hidden[:, first + 1 :])
    return [
        Check(
            name="no token sees a later one",
            error=error,
            bound=SAME,
            detail=f"token {first} changed; {where} of [row, token, dim]",
        ),
        Check(
            name="a token is seen by later ones (missing effect)",
            error=max(0.0, LEAST_EFFECT - effect),
            bound=0.0,
            detail=f"later tokens change by {effect:.2g}, and should by {LEAST_EFFECT:.2g}",
        ),
    ]


def check_documents(subject: Subject, params: Mapping[str, Array], *, kind: str) -> list[Check]:
    """Documents packed into a row have the values and the gradient that each has alone.

    Args:
      params: parameters to check with.
      kind: what they are, for the report.
    """
    draws = np.random.default_rng(3)
    documents = [draws.integers(0, VOCAB, length).astype(np.int32) for length in DOCUMENTS]
    packed = packed_rows([documents])
    alone = packed_rows([[document] for document in documents])
    dim = subject.config.embed_dim
    weights = weights_of(packed, dim)
    # The same weights for the same tokens, wherever they are.
    weights_alone = np.zeros_like(weights)
    together = np.zeros((len(documents), LENGTH, dim), np.float32)
    packed_values = subject.values(packed, weights, params=params)
    start = 0
    for row, length in enumerate(DOCUMENTS):
        weights_alone[row, :length] = weights[0, start : start + length]
        together[row, :length] = packed_values.hidden[0, start : start + length]
        start += length
    values = subject.values(alone, weights_alone, params=params)
    # Padding of the shorter documents does not count.
    is_real = alone.is_real[: len(documents)]
    error, where = largest_error(together, values.hidden[: len(documents)], where=is_real)
    grad_error, parameter = largest_tree_error(packed_values.grads, values.grads)
    # Of the first document another token: the others may not change at all.
    others = [(documents[0] + 1) % VOCAB, *documents[1:]]
    moved = subject.values(packed_rows([others]), weights, params=params)
    after = slice(DOCUMENTS[0], sum(DOCUMENTS))
    leak, place = largest_error(moved.hidden[:1, after], packed_values.hidden[:1, after])
    bad = count_not_finite([packed_values.hidden, packed_values.grads])
    return [
        Check(
            name=f"a packed row equals its documents alone{kind}",
            error=error,
            bound=CLOSE,
            detail=f"{where} of [document, token, dim]",
        ),
        Check(
            name=f"the gradient of a packed row equals those of its documents{kind}",
            error=grad_error,
            bound=CLOSE_GRADIENT,
            detail=parameter,
        ),
        Check(
            name=f"a document changes no other of its row{kind}",
            error=leak,
            bound=SAME,
            detail=f"{place} of [row, token after the first document, dim]",
        ),
        Check(name=f"rows of padding give finite numbers{kind}", error=float(bad), bound=0.0),
    ]


# Decoding ---------------------------------------------------------------------------------------------------
def check_decoding(subject: Subject, whole: Values, rows: Rows) -> list[Check]:
    """Prompts of different lengths, padded on the right and read in two parts, then token by token."""
    decoded = subject.decoded(rows)
    # Prompts and later tokens apart: they fail for different reasons.
    positions = np.arange(LENGTH)[None]
    in_prompt = np.broadcast_to(positions < np.asarray(PROMPTS)[:, None], rows.tokens.shape)
    prompt_error, prompt_where = largest_error(decoded, whole.hidden, where=in_prompt)
    error, where = largest_error(decoded, whole.hidden, where=~in_prompt)
    lengths = f"prompts of {list(PROMPTS)} tokens; "
    return [
        Check(
            name="prompts of different lengths equal the full pass",
            error=prompt_error,
            bound=CLOSE,
            detail=f"{lengths}{prompt_where} of [row, token, dim]",
        ),
        Check(
            name="decoding token by token equals the full pass",
            error=error,
            bound=CLOSE,
            detail=f"{lengths}{where} of [row, token, dim]",
        ),
    ]


def check_state_size(config: ModelConfig) -> list[Check]:
    """The size of the state by kind is that of its arrays, in both precisions and for two lengths."""
    checks = []
    for precision in (Precision.FLOAT32, Precision.BFLOAT16):
        model_config = dataclasses.replace(config, precision=precision)
        itemsize = np.dtype(model_config.layer_dims().dtype).itemsize
        definition = define(model_config)
        for length in (LENGTH, 3 * LENGTH):
            state = jax.eval_shape(
                lambda params, length=length, definition=definition: definition.merge(params, {}).init_state(
                    1, max_length=length
                ),
                definition.params,
            )
            actual = sum(
                leaf.size * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(state)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            )
            stated = state_size(model_config, length=length).bytes(itemsize)
            checks.append(
                Check(
                    name=f"state_size counts the bytes of the state ({precision.value}, {length} tokens)",
                    error=float(abs(actual - stated)),
                    bound=0.0,
                    detail=f"init_state has {actual} bytes of floating-point numbers, state_size {stated}",
                )
            )
    return checks


# Costs ------------------------------------------------------------------------------------------------------
def check_flops(config: ModelConfig, mixers: Sequence[MixerConfig]) -> list[Check]:
    """`mixing_flops` is near the products between activations that are traced.

    A causal mixer may compute masked pairs in a full pass, and fewer or more products in decoding; what one
    elementwise operation is differs between formulas. A wrong factor (heads, tokens, chunk) is larger.
    """
    definition = define(config)

    def full(params: Any, *row: Any) -> Array:
        return hidden_states(definition, params, *row)

    def decode(params: Any, *row: Any) -> Array:
        model = definition.merge(params, {})
        tokens, segment_ids, positions = row
        state = model.init_state(1, max_length=LENGTH)
        return model(tokens, segment_ids=segment_ids, positions=positions, state=state).hidden

    counts = [
        _mixing_operations(fn, definition.params, length=length)
        for fn, length in ((full, LENGTH), (decode, 1))
    ]
    least = min(products for products, _ in counts) / 2.5
    most = 1.5 * max(products + elementwise for products, elementwise in counts)
    stated = sum(mixer.mixing_flops(config.layer_dims(), length=LENGTH) for mixer in mixers)
    return [
        Check(
            name="mixing_flops is the cost of mixing",
            error=max(0.0, least - stated, stated - most),
            bound=0.0,
            detail=f"it returns {stated:.4g} for a token of {LENGTH}; from what is traced it must be at "
            f"least {least:.4g} and at most {most:.4g}",
        )
    ]


def _mixing_operations(fn: Any, params: Mapping[str, Any], *, length: int) -> tuple[float, float]:
    """Return products without weights, and all else, for each token of a function of a row."""
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    counted = count_operations(fn, params, ids, ids, ids)
    with_weights = sum(
        2.0 * math.prod(leaf.shape) for path, leaf in params.items() if is_multiplied(path, leaf.shape)
    )
    return max(counted.products / length - with_weights, 0.0), counted.elementwise / length


# Programs ---------------------------------------------------------------------------------------------------
def check_chunks(
    subject: Subject, whole: Values, rows: Rows, mixer: Any, sizes: Sequence[int]
) -> list[Check]:
    """The size of the chunks changes nothing; chunks of one token are the recurrence itself."""
    checks = []
    for size in sizes:
        other = Subject(
            _with_mixer(subject.config, dataclasses.replace(mixer, chunk_size=size)), params=subject.params
        )
        error, where = largest_error(other.hidden(rows), whole.hidden)
        checks.append(
            Check(
                name=f"chunk_size={size} equals chunk_size={mixer.chunk_size}",
                error=error,
                bound=CLOSE,
                detail=f"{where} of [row, token, dim]",
            )
        )
    return checks


def check_bfloat16(subject: Subject, whole: Values, rows: Rows) -> list[Check]:
    """Values in bfloat16 are those in float32 to the rounding of 8 bits."""
    config = dataclasses.replace(subject.config, precision=Precision.BFLOAT16)
    error, where = largest_error(Subject(config, params=subject.params).hidden(rows), whole.hidden)
    return [
        Check(
            name="bfloat16 is close to float32",
            error=error,
            bound=BFLOAT16,
            detail=f"{where} of [row, token, dim]",
        )
    ]


def check_rematerialisation(subject: Subject, whole: Values, rows: Rows, weights: np.ndarray) -> list[Check]:
    """Recomputing in the backward pass changes no gradient."""
    config = dataclasses.replace(subject.config, remat=Remat.FULL)
    # The same parameters in another program.
    values = Subject(config, params=subject.params).values(rows, weights)
    return _equal_values("rematerialisation", values, whole)


def check_accumulation(subject: Subject, whole: Values, rows: Rows, weights: np.ndarray) -> list[Check]:
    """The gradients of two parts of a batch add up to that of the batch."""
    parts = []
    for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
        # The rows of the other part are padding, so that the program is the same.
        segment_ids = np.zeros_like(rows.segment_ids)
        segment_ids[part] = rows.segment_ids[part]
        only = dataclasses.replace(rows, segment_ids=segment_ids)
        parts.append(subject.values(only, weights * only.is_real[..., None]).grads)
    added = {path: parts[0][path] + parts[1][path] for path in parts[0]}
    error, parameter = largest_tree_error(added, whole.grads)
    return [
        Check(
            name="gradients of parts of a batch add up",
            error=error,
            bound=CLOSE_GRADIENT,
            detail=parameter,
        )
    ]


def check_formats(config: ModelConfig) -> list[Check]:
    """A rule for all matrices gives every linear map of the mixer a number format."""
    rules = quant_of(FORMAT).phases[0].rules
    assignments = assign_model_formats(rules, config, shapes_of(config))
    left_out = [
        path
        for path, assignment in assignments.items()
        if "/mixer/" in path and path.endswith("weight") and assignment.weight is None
    ]
    return [
        Check(
            name="every linear map can be rounded",
            error=float(len(left_out)),
            bound=0.0,
            detail=", ".join(left_out),
        )
    ]


def check_scan(config: ModelConfig, rows: Rows) -> list[Check]:
    """Two repeats of a group, which a scan runs, have the values of the same layers in two groups."""
    (group,) = config.stack
    together = Subject(dataclasses.replace(config, stack=(dataclasses.replace(group, repeats=2),)))
    apart_config = dataclasses.replace(config, stack=(group, group))
    params = restack(
        apart_config, unstack(together.config, together.params), like=define(apart_config).params
    )
    apart = Subject(apart_config, params=params)
    error, where = largest_error(together.hidden(rows), apart.hidden(rows))
    return [
        Check(
            name="layers in a scan equal layers one after another",
            error=error,
            bound=CLOSE,
            detail=f"{where} of [row, token, dim]",
        )
    ]


def check_mesh(
    subject: Subject, whole: Values, rows: Rows, weights: np.ndarray, mesh: MeshConfig, *, remat: Remat
) -> tuple[list[Check], list[str]]:
    """Values and gradients on a mesh equal those on one device.

    A mixer may refuse to shard sequences, with a ValueError: this is returned as what is not checked.
    """
    sizes = {axis: size for axis, size in dataclasses.asdict(mesh).items() if size != 1}
    name = "the mesh " + " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    other = Subject(dataclasses.replace(subject.config, remat=remat), params=subject.params)
    try:
        values = other.values_on(mesh, rows, weights)
    except ValueError as error:
        if mesh.context == 1:
            raise
        # Some mixers need all of a sequence on one device.
        return [], [f"sharded sequences, which it refuses: {error}"]
    return _equal_values(name if remat is Remat.NONE else f"{name} with rematerialisation", values, whole), []


def _equal_values(what: str, values: Values, expected: Values) -> list[Check]:
    error, where = largest_error(values.hidden, expected.hidden)
    grad_error, parameter = largest_tree_error(values.grads, expected.grads)
    return [
        Check(name=f"{what}: same values", error=error, bound=CLOSE, detail=where),
        Check(name=f"{what}: same gradient", error=grad_error, bound=CLOSE_GRADIENT, detail=parameter),
    ]


# Extremes ---------------------------------------------------------------------------------------------------
def check_extremes(subject: Subject, rows: Rows, weights: np.ndarray) -> list[Check]:
    """Values and gradients are finite for saturated gates, large and zero inputs."""
    checks = []
    for name, vector, matrix in (
        ("vectors of +20", 20.0, 1.0),
        ("vectors of -20", -20.0, 1.0),
        ("matrices times 100", None, 100.0),
        ("matrices of 0", None, 0.0),
    ):
        params = {
            path: _extreme(path, leaf, vector=vector, matrix=matrix) for path, leaf in subject.params.items()
        }
        values = subject.values(rows, weights, params=params)
        bad = count_not_finite(values.hidden)
        bad_grads = [path for path, leaf in values.grads.items() if count_not_finite(leaf)]
        checks.append(
            Check(
                name=f"finite values and gradients with {name}",
                error=float(bad + len(bad_grads)),
                bound=0.0,
                detail=f"{bad} hidden states, gradients of {bad_grads or 'no parameter'}",
            )
        )
    return checks


def _extreme(path: str, leaf: Array, *, vector: float | None, matrix: float) -> Array:
    if "/mixer/" not in path:
        return leaf
    if leaf.ndim > 2:
        return matrix * leaf
    return leaf if vector is None or path.endswith("scale") else jnp.full_like(leaf, vector)


def check_gradients_reach(subject: Subject, whole: Values) -> list[Check]:
    """The gradient of every parameter is not 0 throughout."""
    dead = [path for path, leaf in whole.grads.items() if "/mixer/" in path and not np.any(np.asarray(leaf))]
    return [
        Check(
            name="every parameter has a gradient",
            error=float(len(dead)),
            bound=0.0,
            detail=", ".join(dead),
        )
    ]


# Of the model -----------------------------------------------------------------------------------------------
def _with_mixer(config: ModelConfig, mixer: MixerConfig) -> ModelConfig:
    """Return the model with another mixer in its last layer."""
    group = config.stack[-1]
    block = dataclasses.replace(group.pattern[-1], mixer=mixer)
    group = dataclasses.replace(group, pattern=(*group.pattern[:-1], block))
    return dataclasses.replace(config, stack=(*config.stack[:-1], group))
