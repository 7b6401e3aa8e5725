"""Whether the device that is here computes the codes that the formats' own packages do.

    python -m benchmarks.formats_on_device      # from the root of a checkout, as it reads what tests keep

The tests compare on CPU. Compilers for other devices take other liberties, and one bit decides where a number
lies halfway between two codes: run this where models will be trained. One row for each preset and package:
how many scales and codes differ from the kept results (tests/formats/golden), on numbers that hold many
near-ties; for packages that tell only what numbers become, how many of those.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.formats.coding import decode, encode, fake_quant
from slmjax.formats.presets import PRESETS
from tests.formats.make_golden import GOLDEN, PACKAGES, of_one_size


def differing(a: Any, b: Any) -> int:
    a = np.asarray(a)
    b = np.asarray(b)
    return int(np.sum(~((a == b) | (np.isnan(a) & np.isnan(b)))))


def main() -> None:
    numbers = np.load(GOLDEN / "numbers.npz")["x"]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        "| package | format | scales that differ | codes that differ | of | numbers that differ "
        "|\n|---|---|---|---|---|---|"
    )
    wrong = 0
    for package in PACKAGES:
        kept = dict(np.load(GOLDEN / f"{package}.npz"))
        for name, ending in sorted(key.split("/") for key in kept if key.endswith(("/codes", "/decoded"))):
            spec = PRESETS[name]
            x = jnp.asarray(of_one_size(numbers) if spec.is_two_level else numbers)
            encoded, rounded = jax.jit(lambda x, spec=spec: (encode(x, spec), fake_quant(x, spec)))(x)
            decoded = jax.jit(lambda encoded, spec=spec: decode(encoded, spec))(encoded)
            if ending == "decoded":
                row = (
                    "",
                    "",
                    max(
                        differing(decoded, kept[f"{name}/decoded"]),
                        differing(rounded, kept[f"{name}/decoded"]),
                    ),
                )
            else:
                scale = kept[f"{name}/scale"]
                # without one, packages divide by zero
                has_scale = np.repeat(scale != 0, x.shape[-1] // scale.shape[-1], axis=-1)
                row = (
                    differing(encoded.scale, scale),
                    int(np.sum(has_scale & (np.asarray(encoded.codes) != kept[f"{name}/codes"]))),
                    differing(decoded, rounded),
                )
            wrong += sum(int(count or 0) for count in row)
            print(f"| {package} | {name} | {row[0]} | {row[1]} | {x.size} | {row[2]} |")
    sys.exit(f"{wrong} numbers differ" if wrong else 0)


if __name__ == "__main__":
    main()
