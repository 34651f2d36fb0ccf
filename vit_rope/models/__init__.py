"""Models with positions: `vit`, timm's VisionTransformer, and `dit`, a diffusion transformer that needs diffusers."""
