"""Models with positions: `vit`, timm's VisionTransformer, and `dit`, a diffusion transformer, which
needs diffusers."""
