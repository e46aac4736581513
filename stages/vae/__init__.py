"""The VAE in tiles (independent or shared statistics) and exactly, layer by layer over files."""
