"""Optimizers: schedules by hand, groups by path, the mathematics of separate layers whatever the stacking."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slmjax.training.optim import (
    Group,
    OptimConfig,
    Optimizer,
    Schedule,
    learning_rate,
    make_optimizer,
    num_warmup_steps,
    parameter_groups,
    restarted,
    warn_of_shortened_warmup,
)

BLOCK = "blocks/0"
# Unstacked shapes; the matrices are wide enough (128) for Adafactor to factor them, the experts too narrow.
LAYER_SHAPES = {
    f"{BLOCK}/mixer/query/weight": (130, 128),
    f"{BLOCK}/mixer_norm/scale": (130,),
    f"{BLOCK}/ffn/router/weight": (130, 2),
    f"{BLOCK}/ffn/experts/up": (2, 8, 24),
}
OTHER_SHAPES = {"embed/table": (140, 130), "head/weight": (8, 130)}
NUM_LAYERS = 2


def per_layer_tree(seed, *, scale=1.0):
    """Arrays as separate layers: {("layer", path): array} and the rest by path."""
    rng = np.random.default_rng(seed)

    def draw(shape, factor):
        return factor * scale * rng.standard_normal(shape).astype(np.float32)

    # Layers of very different size: statistics that mix them would show.
    layers = [
        {path: draw(shape, 10.0**layer) for path, shape in LAYER_SHAPES.items()}
        for layer in range(NUM_LAYERS)
    ]
    return layers, {path: draw(shape, 1.0) for path, shape in OTHER_SHAPES.items()}


def segmented(tree, sizes):
    """The flat dict for a model whose layers are cut into segments of these sizes."""
    layers, others = tree
    assert sum(sizes) == len(layers)
    starts = np.cumsum([0, *sizes])
    stacks = {
        f"segments/{index}/{path}": jnp.stack([layer[path] for layer in layers[start : start + size]])
        for index, (start, size) in enumerate(zip(starts, sizes, strict=False))
        for path in LAYER_SHAPES
    }
    return stacks | {path: jnp.asarray(array) for path, array in others.items()}


def per_layer(tree, sizes):
    """Back to separate layers, any leaves: {"layers/1/...": ...}."""
    starts = np.cumsum([0, *sizes])
    result = {}
    for path, leaf in tree.items():
        if not path.startswith("segments/"):
            result[path] = leaf
            continue
        _, index, own_path = path.split("/", 2)
        for layer in range(sizes[int(index)]):
            result[f"layers/{starts[int(index)] + layer}/{own_path}"] = jax.tree.map(
                lambda x, layer=layer: x[layer], leaf
            )
    return result


@functools.partial(jax.jit, static_argnames="optimizer")
def updated(params, gradients, optimizer):
    """Parameters and state after an update per leading index of the gradients."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0]


def gradients_of_steps(layout):
    return jax.tree.map(
        lambda *xs: jnp.stack(xs), *[layout(per_layer_tree(seed, scale=0.1)) for seed in (1, 2, 3)]
    )


def run(config, sizes):
    params = segmented(per_layer_tree(0), sizes)
    gradients = gradients_of_steps(lambda tree: segmented(tree, sizes))
    params, state = updated(params, gradients, make_optimizer(config, params, total_steps=10))
    return per_layer(params, sizes), per_layer(state[1], sizes)


def optax_reference(config):
    """The same three updates by optax's own optimizers, on separate layers, each expert apart."""

    def separate(tree):
        layers, others = tree
        flat = {
            f"{layer}/{path}": array for layer, own in enumerate(layers) for path, array in own.items()
        } | others
        experts = {
            f"{path}/{e}": array[e]
            for path, array in flat.items()
            if "experts" in path
            for e in range(len(array))
        }
        return {
            path: jnp.asarray(array)
            for path, array in (flat | experts).items()
            if path in experts or "experts" not in path
        }

    def is_muon(path):
        return not any(name in path for name in ("scale", "bias", "embed", "head", "router"))

    schedule = functools.partial(learning_rate, config, total_steps=10)
    params = separate(per_layer_tree(0))
    masked = {
        path: config.weight_decay > 0 and "scale" not in path and "bias" not in path and "embed" not in path
        for path in params
    }
    adamw = optax.adamw(schedule, 0.9, 0.95, weight_decay=config.weight_decay, mask=masked)
    optimizer = {
        Optimizer.ADAMW: adamw,
        Optimizer.LION: optax.lion(schedule, 0.9, 0.95, weight_decay=config.weight_decay, mask=masked),
        Optimizer.ADAFACTOR: optax.adafactor(schedule),
        Optimizer.MUON: optax.partition(
            {
                True: optax.contrib.muon(
                    lambda step: schedule(step) * config.muon_lr / config.lr, weight_decay=config.weight_decay
                ),
                False: optax.adamw(
                    schedule,
                    0.9,
                    0.95,
                    weight_decay=config.weight_decay,
                    mask=lambda tree: {path: masked[path] for path in tree},
                ),
            },
            {path: is_muon(path) for path in params},
        ),
    }[config.kind]
    return updated(params, gradients_of_steps(separate), optimizer)[0]


@pytest.mark.parametrize("kind", Optimizer, ids=lambda kind: kind.value)
def test_stacks_are_updated_as_separate_layers(kind):
    # optax's Adafactor does not scale the decay by the rate
    weight_decay = 0.0 if kind is Optimizer.ADAFACTOR else 0.1
    config = OptimConfig(
        kind=kind,
        lr=0.01,
        warmup_steps=2,
        weight_decay=weight_decay,
        grad_clip=None,
        muon_bias_correction=True,
    )
    params, state = run(config, (2,))
    other_params, other_state = run(config, (1, 1))
    assert params.keys() == other_params.keys() and state.keys() == other_state.keys()
    # Batched and single products are summed in another order, which five Newton-Schulz iterations carry on.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if kind is Optimizer.MUON else {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance),
        (params, state),
        (other_params, other_state),
    )
    for path, expected in optax_reference(config).items():
        path, _, expert = path.partition("/experts/up/")
        path = path if path in OTHER_SHAPES else f"layers/{path}"
        actual = params[f"{path}/experts/up"][int(expert)] if expert else params[path]
        np.testing.assert_allclose(actual, expected, **tolerance, err_msg=path)


@pytest.mark.parametrize("kind", Optimizer, ids=lambda kind: kind.value)
def test_state_of_a_stack_is_found_by_path_and_has_the_layers_first(kind):
    params = jax.eval_shape(lambda: segmented(per_layer_tree(0), (2,)))
    params["segments/0/blocks/0/ffn/down/weight"] = jax.ShapeDtypeStruct((2, 128, 130), jnp.bfloat16)
    state = jax.eval_shape(make_optimizer(OptimConfig(kind=kind), params, total_steps=1000).init, params)
    num_found = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        owners = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey) and key.key in params]
        assert len(owners) <= 1
        if owners and owners[0].startswith("segments/"):
            num_found += 1
            assert leaf.shape[0] == 2, f"{jax.tree_util.keystr(keys)} is {leaf.shape}"
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32, (
            jax.tree_util.keystr(keys)
        )
    assert num_found >= 6


def test_adafactor_keeps_factored_moments():
    params = jax.eval_shape(lambda: segmented(per_layer_tree(0), (2,)))
    state = jax.eval_shape(
        make_optimizer(OptimConfig(kind=Optimizer.ADAFACTOR), params, total_steps=1000).init, params
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(state[1]["segments/0/blocks/0/mixer/query/weight"])}
    assert {(2, 130), (2, 128)} <= shapes and (2, 130, 128) not in shapes


def test_groups():
    params = segmented(per_layer_tree(0), (2,)) | {"head/bias": jnp.zeros(8)}
    groups = parameter_groups(OptimConfig(kind=Optimizer.MUON, weight_decay=0.2), params)
    block = f"segments/0/{BLOCK}"
    assert groups == {
        f"{block}/mixer/query/weight": Group(optimizer=Optimizer.MUON, weight_decay=0.2),
        f"{block}/mixer_norm/scale": Group(optimizer=Optimizer.ADAMW, weight_decay=0.0),
        f"{block}/ffn/router/weight": Group(optimizer=Optimizer.ADAMW, weight_decay=0.2),
        f"{block}/ffn/experts/up": Group(optimizer=Optimizer.MUON, weight_decay=0.2),
        "embed/table": Group(optimizer=Optimizer.ADAMW, weight_decay=0.0),
        "head/weight": Group(optimizer=Optimizer.ADAMW, weight_decay=0.2),
        "head/bias": Group(optimizer=Optimizer.ADAMW, weight_decay=0.0),
    }
    without_rule = parameter_groups(OptimConfig(kind=Optimizer.LION, no_decay=()), params)
    assert without_rule["embed/table"] == Group(optimizer=Optimizer.LION, weight_decay=0.1)
    assert without_rule[f"{block}/mixer_norm/scale"].weight_decay == 0.0  # a stack of vectors stays a vector


def test_numbers_of_channels_are_no_matrices():
    """Taps of a convolution and rates of a recurrence: Muon leaves them, and nothing decays them."""
    mixer = "segments/0/blocks/0/mixer"
    params = {
        f"{mixer}/{name}": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32)
        for name in ("conv_taps", "log_rates", "inner/weight")
    }
    groups = parameter_groups(OptimConfig(kind=Optimizer.MUON, weight_decay=0.2), params)
    assert groups.pop(f"{mixer}/inner/weight") == Group(optimizer=Optimizer.MUON, weight_decay=0.2)
    assert set(groups.values()) == {Group(optimizer=Optimizer.ADAMW, weight_decay=0.0)}


@pytest.mark.parametrize("kind", Optimizer, ids=lambda kind: kind.value)
def test_weight_decay_shrinks_the_decayed_parameters_alone(kind):
    # Without a gradient, decoupled decay is all that moves a parameter: by its learning rate times the decay.
    config = OptimConfig(
        kind=kind, lr=0.1, muon_lr=0.5, warmup_steps=0, schedule=Schedule.CONSTANT, weight_decay=0.2
    )
    params = {
        "segments/0/ffn/up/weight": jnp.ones((2, 4, 6)),
        "segments/0/norm/scale": jnp.ones((2, 4)),
        "head/weight": jnp.ones((6, 4)),
    }
    gradients = jax.tree.map(lambda x: jnp.zeros_like(x)[None], params)
    after, _ = updated(params, gradients, make_optimizer(config, params, total_steps=10))
    for path, group in parameter_groups(config, params).items():
        assert group.weight_decay == (0.0 if "scale" in path else 0.2)
        rate = 0.5 if group.optimizer is Optimizer.MUON else 0.1
        np.testing.assert_allclose(
            after[path], (1 - rate * group.weight_decay) * params[path], rtol=1e-5, err_msg=path
        )


@pytest.mark.smoke
@pytest.mark.parametrize("schedule", Schedule, ids=lambda schedule: schedule.value)
def test_schedules_by_hand(schedule):
    config = OptimConfig(lr=2.0, min_lr_ratio=0.1, schedule=schedule, warmup_steps=4, decay_fraction=0.4)
    expected = {0: 0.4, 1: 0.8, 3: 1.6, 4: 2.0}  # (step + 1) / 5 of the peak
    expected |= {
        # 16 steps remain: a quarter, half and three quarters of the way, the end, and after it.
        Schedule.COSINE: {
            8: 0.2 + 1.8 * 0.8535533906,
            12: 1.1,
            16: 0.2 + 1.8 * 0.1464466094,
            20: 0.2,
            25: 0.2,
        },
        Schedule.LINEAR: {8: 1.55, 12: 1.1, 16: 0.65, 20: 0.2, 25: 0.2},
        Schedule.CONSTANT: {8: 2.0, 20: 2.0, 25: 2.0},
        Schedule.WSD: {11: 2.0, 12: 2.0, 13: 1.775, 16: 1.1, 19: 0.425, 20: 0.2, 25: 0.2},
    }[schedule]
    traced = jax.jit(lambda step: learning_rate(config, step, total_steps=20))
    for step, value in expected.items():
        np.testing.assert_allclose(
            learning_rate(config, step, total_steps=20), value, rtol=1e-6, err_msg=str(step)
        )
        np.testing.assert_allclose(traced(step), value, rtol=1e-6, err_msg=str(step))


def published_muon(gradients, weight, *, lr, weight_decay, momentum=0.95, iterations=5):
    """https://github.com/KellerJordan/Muon, its weights [outputs, inputs], in float64: the weight after each
    gradient.
    """
    buffer = np.zeros_like(weight)
    weights = []
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * buffer
        x = update.T if update.shape[0] > update.shape[1] else update
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(iterations):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if update.shape[0] > update.shape[1] else x
        weight = weight * (1 - lr * weight_decay) - lr * max(1, update.shape[0] / update.shape[1]) ** 0.5 * x
        weights.append(weight)
    return weights


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_is_the_published_one(shape):
    """Alone and in a stack; with optax's bias correction the second update is another one by a tenth, the
    tenth by less.
    """
    draws = np.random.default_rng(0)
    weight = draws.normal(size=shape)
    gradients = 1e-3 * draws.normal(size=(10, *shape))
    config = OptimConfig(
        kind=Optimizer.MUON,
        muon_lr=0.02,
        warmup_steps=0,
        schedule=Schedule.CONSTANT,
        weight_decay=0.1,
        grad_clip=None,
    )
    expected = published_muon([g.T for g in gradients], weight.T, lr=0.02, weight_decay=0.1)

    def weights_by(config, num_layers):
        params = {"segments/0/w": jnp.asarray(np.stack([weight] * num_layers), jnp.float32)}
        optimizer = make_optimizer(config, params, total_steps=10)
        gradient = {"segments/0/w": jnp.asarray(np.stack([gradients] * num_layers, axis=1), jnp.float32)}

        def step(carry, gradient):
            updates, state = optimizer.update(gradient, carry[1], carry[0])
            params = optax.apply_updates(carry[0], updates)
            return (params, state), params["segments/0/w"][-1]

        return np.asarray(
            jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), gradient)[1])()
        )

    found = weights_by(config, 2)
    for step, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(one, wanted.T, rtol=1e-5, atol=2e-6, err_msg=str(step))
    other = weights_by(dataclasses.replace(config, muon_bias_correction=True), 1)
    moves, others = (np.diff(np.concatenate([weight[None], weights]), axis=0) for weights in (found, other))
    apart = np.linalg.norm(moves - others, axis=(1, 2)) / np.linalg.norm(moves, axis=(1, 2))
    assert apart[0] < 1e-3 and 0.05 < apart[1] < 0.15 and apart[9] < 0.04, apart


def test_no_warmup_starts_at_the_peak():
    np.testing.assert_allclose(learning_rate(OptimConfig(lr=0.5, warmup_steps=0), 0, total_steps=1), 0.5)


def test_updates_follow_the_schedule_and_the_clip():
    config = OptimConfig(
        kind=Optimizer.LION,
        lr=1.0,
        schedule=Schedule.LINEAR,
        min_lr_ratio=0.0,
        warmup_steps=0,
        weight_decay=0.0,
    )
    params = {"w": jnp.zeros((1, 2))}
    optimizer = make_optimizer(config, params, total_steps=4)
    state = optimizer.init(params)
    rates = []
    for _ in range(4):
        updates, state = optimizer.update({"w": jnp.ones((1, 2))}, state, params)
        rates.append(-float(updates["w"][0, 0]))  # Lion's direction is a sign
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.5, 0.25])

    # A gradient of norm 50 is clipped to 5: Adam's first moment is a tenth of it.
    config = OptimConfig(betas=(0.9, 0.95), grad_clip=5.0, warmup_steps=0)
    optimizer = make_optimizer(config, params, total_steps=4)
    _, state = optimizer.update({"w": jnp.array([[30.0, 40.0]])}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state[1]["w"], "mu"), [[0.3, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("kind", Optimizer, ids=lambda kind: kind.value)
def test_every_optimizer_solves_a_quadratic(kind):
    target = {"segments/0/w": jnp.linspace(-1, 1, 2 * 4 * 6).reshape(2, 4, 6), "b": jnp.array([0.5, -0.5])}
    lr = 0.2 if kind is Optimizer.ADAFACTOR else 0.05
    config = OptimConfig(kind=kind, lr=lr, muon_lr=0.1, min_lr_ratio=0.0, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(config, target, total_steps=200)

    def loss_fn(params):
        return sum(jnp.mean((params[path] - target[path]) ** 2) for path in target)

    def step(carry, _):
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    start = jax.tree.map(lambda x: jnp.full_like(x, 0.1), target)
    (params, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200))(
        (start, optimizer.init(start))
    )
    assert losses[0] > 0.3 and loss_fn(params) < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "optim.lr is 0.0: it must be greater than 0"),
        ({"warmup_steps": -1}, "optim.warmup_steps"),
        ({"warmup_steps": 2.5}, "optim.warmup_steps is 2.5: give a whole number"),
        ({"min_lr_ratio": 1.5}, "optim.min_lr_ratio is 1.5: it must be between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"muon_momentum": 1.0}, "optim.muon_momentum"),
        ({"grad_clip": 0.0}, "or None for no clipping"),
        ({"ema_decay": 1.0}, "or None for no average"),
        ({"no_decay": ("(",)}, r"optim.no_decay: '\(' is not a valid regular expression"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


# warm-up, steps of the run, steps of the warm-up, and whether it is shorter than was asked for
WARMUPS = [
    (100, 2000, 100, False),
    (0.05, 2000, 100, False),
    (0.05, 30, 2, False),  # 1.5, rounded to even
    (0.5, 1, 0, False),
    (0, 1, 0, False),
    (1, 2, 1, False),  # a step, not all of the run
    (19, 20, 19, False),
    (20, 20, 2, True),
    (1000, 10, 1, True),
    (5, 3, 0, True),
    (0.99, 10, 1, True),  # rounded to all 10
]
# The same with half of the run, or all of it, as the decay of wsd.
WSD_WARMUPS = [(5, 10, 5, False, 0.5), (8, 10, 1, True, 0.5), (8, 10, 0, True, 1.0)]


@pytest.mark.parametrize(
    ("asked", "total_steps", "warmup", "is_shortened", "decay"),
    [*((*case, None) for case in WARMUPS), *WSD_WARMUPS],
)
def test_a_warmup_fits_every_run(asked, total_steps, warmup, is_shortened, decay, caplog):
    wsd = {} if decay is None else {"schedule": Schedule.WSD, "decay_fraction": decay}
    config = OptimConfig(lr=0.5, min_lr_ratio=0.0, warmup_steps=asked, **wsd)
    assert num_warmup_steps(config, total_steps=total_steps) == warmup
    rates = learning_rate(config, jnp.arange(total_steps), total_steps=total_steps)
    assert rates[warmup] == np.max(rates) == 0.5 and np.all(np.diff(rates[: warmup + 1]) > 0)
    warn_of_shortened_warmup(config, total_steps=total_steps)
    assert (f"the warm-up is shortened to {warmup}" in caplog.text) == is_shortened


def test_other_parameters_are_refused():
    optimizer = make_optimizer(OptimConfig(), {"a": jnp.zeros((2, 2))}, total_steps=1000)
    with pytest.raises(ValueError, match="added or missing: a, b"):
        optimizer.init({"b": jnp.zeros((2, 2))})


def test_config_stays_small():
    assert len(dataclasses.fields(OptimConfig)) <= 20


@pytest.mark.parametrize("kind", [Optimizer.ADAMW, pytest.param(Optimizer.MUON, marks=pytest.mark.nightly)])
def test_learned_scales_have_a_rate_of_their_own_and_signs_none(kind):
    name = "segments/0/blocks/0/ffn/up/weight"
    params = {
        name: jnp.ones((1, 4, 3)),
        f"{name}/log_scale": jnp.full((1, 2, 3), -5.0),
        f"{name}/sign": -jnp.ones((1, 2, 3)),
    }
    grads = {path: jnp.full(leaf.shape, 0.1) for path, leaf in params.items()} | {
        f"{name}/sign": jnp.zeros((1, 2, 3))
    }
    common = OptimConfig(kind=kind, lr=0.01, warmup_steps=2, weight_decay=0.2)
    optimizers = {
        rate: make_optimizer(dataclasses.replace(common, scale_lr=rate), params, total_steps=10)
        for rate in (None, 0.01, 0.04)
    }

    @jax.jit
    def results():
        made = {rate: one.update(grads, one.init(params), params) for rate, one in optimizers.items()}
        again = optimizers[0.04].update(grads, restarted(optimizers[0.04], made[0.04][1], params), params)[0]
        return [made[rate][0] for rate in optimizers], [made[rate][1] for rate in optimizers], again

    (updates, same, faster), states, again = results()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, same)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), states[0], states[2])
    np.testing.assert_allclose(faster[f"{name}/log_scale"], 4 * updates[f"{name}/log_scale"], rtol=1e-6)
    assert np.all(updates[f"{name}/log_scale"] != 0)
    np.testing.assert_allclose(faster[name], updates[name], rtol=1e-6)
    assert np.all(updates[f"{name}/sign"] == 0) and not jax.tree.leaves(states[0][1][f"{name}/sign"])
    # The moments begin again, and the schedule goes on: the second update is the first one at the second
    # rate.
    np.testing.assert_allclose(again[f"{name}/log_scale"], 2 * faster[f"{name}/log_scale"], rtol=1e-6)
    with pytest.raises(
        ValueError, match=r"optim.scale_lr is 0.0: it must be greater than 0; none stands for optim.lr"
    ):
        OptimConfig(scale_lr=0.0)
