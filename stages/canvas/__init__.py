"""The canvas: tiles, blend weights, regions, the Mixture of Diffusers step, and the tiled VAE."""
