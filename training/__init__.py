"""The embedded model: procedural scenes with captions, and a small Stable-Diffusion-family model trained on them."""
