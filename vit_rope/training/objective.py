"""The training objective of a DDPM: the noise schedule, the target of a prediction, the weight of
an error.

Shapes   B samples, C channels, H and W pixels
"""

import math
from typing import Any

from torch import Tensor


def make_noise(timesteps: int, beta_schedule: str, prediction_type: str) -> Any:
    """diffusers' DDPMScheduler.

    Raises ValueError for a schedule whose last noise level still shows the image: sampling starts
    from pure noise, which the model would never have seen.
    """

    from diffusers import DDPMScheduler  # takes seconds, which training a classifier should not wait for

    if timesteps < 2:
        raise ValueError(f"a DDPM needs at least 2 timesteps, got {timesteps}")
    noise: Any = DDPMScheduler(timesteps, beta_schedule=beta_schedule, prediction_type=prediction_type)
    remaining = math.sqrt(float(noise.alphas_cumprod[-1]))
    if remaining > 0.05:
        raise ValueError(
            f"after {timesteps} timesteps the {beta_schedule} schedule leaves {remaining:.0%} of the image, but "
            "sampling starts from pure noise; use squaredcos_cap_v2, which fits any number of steps, or 1000 timesteps"
        )
    return noise


def make_target(scheduler: Any, images: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """What the model should predict, by the `prediction_type` of diffusers' scheduler.

    Args:
        scheduler: diffusers' DDPMScheduler
        images: (B, C, H, W)
        noise: standard normal noise (B, C, H, W)
        time: timesteps (B,)
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return images
        case _:
            return scheduler.get_velocity(images, noise, time)


def snr_weight(scheduler: Any, time: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (B,) of the squared errors at timesteps (B,) (arXiv:2303.09556).

    The weight of an error in the image is min(SNR, gamma). An error in the image is the error in
    the noise divided by the SNR, and the error in the velocity divided by SNR + 1.
    """
    alpha_bar = scheduler.alphas_cumprod.to(time.device)[time]
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=gamma)
    return weight / {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[scheduler.config.prediction_type]
