"""Modules that predict the tokens after the next one, in training and as drafts in decoding.

- h_0 = decoder(tokens): the state at position t predicts token t + 1
- h_k = module_k(h_(k-1), embedded token t + k): the state at position t predicts token t + 1 + k

A module is a layer of its own between a projection and a norm; the embedding and the head are those of the
model (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.2). Each reads what the head reads: hidden
states after the final norm, or after the norm of the module before.

Dims: B batch, T time, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slmjax.models.architecture import ModelConfig, Remat
from slmjax.models.blocks import Block, LayerInputs, layer_constants, run_block
from slmjax.models.layers import Linear
from slmjax.models.protocols import FfnAux
from slmjax.parallel import communication


class MultiTokenModule(nnx.Module):
    """`h = norm(block(projection([norm(hidden), norm(embedded)])))`."""

    def __init__(self, model: ModelConfig, *, key: Array) -> None:
        dims = model.layer_dims()
        width = dims.embed_dim
        projection_key, block_key = jax.random.split(key)
        self.hidden_norm = dims.norm(width)
        self.embed_norm = dims.norm(width)
        self.projection = Linear(2 * width, width, std=dims.init_std, rngs=nnx.Rngs(params=projection_key))
        # What depends on a layer's place in the model is that of the last layer.
        stacked = layer_constants(model.multi_token_block, model, [model.num_layers - 1])
        constants = jax.tree.map(lambda leaf: leaf[0], stacked)
        self.block = Block(
            model.multi_token_block, model, rngs=nnx.Rngs(params=block_key), constants=constants
        )
        self.norm = dims.norm(width)
        self.model = model

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        *,
        inputs: LayerInputs,
        state: Any,
        key: Array | None,
        remat: Remat,
    ) -> tuple[Float[Array, "B T D"], FfnAux, Any]:
        """Return hidden states one token further, the report of the feed-forward layer, the decoding state.

        Args:
          hidden: hidden states that the head reads.
          embedded: embeddings of the tokens that they predict.
          inputs: of the layer.
          state: decoding state of the layer; None for whole sequences.
          key: randomness of dropout; None for evaluation.
          remat: what the backward pass recomputes of the layer.
        """
        joined = jnp.concatenate([self.hidden_norm(hidden), self.embed_norm(embedded)], axis=-1)
        x = communication.constrain(self.projection(joined), ("batch", "time", None))
        constants = layer_constants(self.block.config, self.model, [self.model.num_layers - 1])["mixer"]
        x, state, aux = run_block(
            self.block,
            x,
            inputs=inputs,
            state=state,
            key=key,
            constants=jax.tree.map(lambda leaf: leaf[0], constants),
            remat=remat,
        )
        return self.norm(x), aux, state
