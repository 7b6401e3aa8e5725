"""Comparison of the codes that this device computes with those of the formats' own packages.

    python -m benchmarks.formats_on_device      # from the root of a checkout, as it reads files of the tests

The tests compare on CPU. Compilers for other devices may reorder operations, and the last bit decides where a
value is halfway between two codes: run this where models will be trained. Prints one row for each preset and
package: how many scales and codes differ from the stored results (tests/formats/golden), on values with many
near-ties. Packages that return only dequantized values have the number of values that differ.
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
    values = np.load(GOLDEN / "numbers.npz")["x"]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        "| package | format | scales that differ | codes that differ | of | values that differ "
        "|\n|---|---|---|---|---|---|"
    )
    wrong = 0
    for package in PACKAGES:
        golden = dict(np.load(GOLDEN / f"{package}.npz"))
        for name, ending in sorted(key.split("/") for key in golden if key.endswith(("/codes", "/decoded"))):
            spec = PRESETS[name]
            x = jnp.asarray(of_one_size(values) if spec.is_two_level else values)
            encoded, rounded = jax.jit(lambda x, spec=spec: (encode(x, spec), fake_quant(x, spec)))(x)
            decoded = jax.jit(lambda encoded, spec=spec: decode(encoded, spec))(encoded)
            if ending == "decoded":
                row = (
                    "",
                    "",
                    max(
                        differing(decoded, golden[f"{name}/decoded"]),
                        differing(rounded, golden[f"{name}/decoded"]),
                    ),
                )
            else:
                scale = golden[f"{name}/scale"]
                # Packages divide by zero where a scale is 0, so codes there mean nothing.
                has_scale = np.repeat(scale != 0, x.shape[-1] // scale.shape[-1], axis=-1)
                row = (
                    differing(encoded.scale, scale),
                    int(np.sum(has_scale & (np.asarray(encoded.codes) != golden[f"{name}/codes"]))),
                    differing(decoded, rounded),
                )
            wrong += sum(int(count or 0) for count in row)
            print(f"| {package} | {name} | {row[0]} | {row[1]} | {x.size} | {row[2]} |")
    sys.exit(f"{wrong} values differ" if wrong else 0)


if __name__ == "__main__":
    main()
