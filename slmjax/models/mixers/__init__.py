"""Token mixers, one file each: softmax attention and latent attention."""
