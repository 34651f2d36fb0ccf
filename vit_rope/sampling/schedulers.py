"""diffusers' schedulers under short names, made to work with every kind of prediction.

All of them are stepped with velocities: the sampler turns what a model predicts into the clean
image, and that into a velocity, so a scheduler need not know what kind of prediction a model makes.

Shapes   B images, C channels, H and W height and width in pixels
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # name: a class of diffusers, and its options
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++1s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # diffusers' names


def check_scheduler(name: str) -> None:
    """Raise ValueError, which lists all names, for a name that is not in `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}")


def make_scheduler(name: str, noise: Any, steps: int, device: torch.device | None = None) -> Any:
    """Make diffusers' scheduler for a short name, ready for `steps` steps.

    `noise` is the scheduler of the training, whose noise schedule it uses. It expects velocities.
    Raises ValueError, which lists all names, for an unknown name.
    """
    import diffusers  # slow to import, and not needed before

    check_scheduler(name)
    class_name, fixed = SCHEDULERS[name]
    options = {
        "trained_betas": noise.betas.double().tolist(),  # values, as not every scheduler knows every schedule's name
        "num_train_timesteps": len(noise.betas),
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",  # near pure noise, Heun is unstable and Euler's ancestral step can be NaN
        "clip_sample": False,
    }
    cls = getattr(diffusers, class_name)
    known = inspect.signature(cls.__init__).parameters
    with no_numpy_deprecations():
        scheduler = cls(**{key: value for key, value in options.items() if key in known}, **fixed)
        scheduler.set_timesteps(steps, device=device)
    return scheduler


@contextmanager
def no_numpy_deprecations() -> Iterator[None]:
    """Silence deprecation warnings about how diffusers' schedulers use NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def alpha_sigma(scheduler: Any, time: Tensor) -> tuple[float, float]:
    """The scales (alpha, sigma) of image and noise in what the model sees at this time.

    alpha² + sigma² = 1.
    """
    if float(scheduler.init_noise_sigma) > 1:  # its sigmas are noise per unit of image, sigma / alpha
        ratio = float(scheduler.sigmas[scheduler.step_index])
        return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
    alpha_squared = float(scheduler.alphas_cumprod[int(time)])
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5


def predicted_x0(prediction_type: str, noisy: Tensor, prediction: Tensor, alpha: float, sigma: float) -> Tensor:
    """The clean image (B, C, H, W) implied by a prediction of this type for a noisy image.

    With noisy = alpha x0 + sigma noise: "sample" is x0, "epsilon" the noise, and "v_prediction" the
    velocity alpha noise - sigma x0 (arXiv:2202.00512).
    """
    if prediction_type == "sample":
        return prediction
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha
    return alpha * noisy - sigma * prediction
