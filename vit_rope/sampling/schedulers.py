"""TODO sampling.schedulers from ['sampling.denoising']."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # by the names that samplers go by, diffusers' classes
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
KINDS = ("epsilon", "sample", "v_prediction")  # of predictions, by diffusers' names


def make_scheduler(name: str, noise: Any, steps: int, device: torch.device | None = None) -> Any:
    """diffusers' scheduler of a short name, ready for `steps` steps under the training's schedule `noise`.

    It expects velocities. Raises ValueError, with all names, for an unknown one.
    """
    import diffusers  # by now the slow import is worth its time

    check_scheduler(name)
    kind, own = SCHEDULERS[name]
    options = {
        "trained_betas": noise.betas.double().tolist(),  # numbers, for not every scheduler knows every schedule's name
        "num_train_timesteps": len(noise.betas),
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",  # near pure noise, Heun is unstable and Euler's ancestral step can be NaN
        "clip_sample": False,
    }
    cls = getattr(diffusers, kind)
    known = inspect.signature(cls.__init__).parameters
    with _no_deprecations():
        scheduler = cls(**{key: value for key, value in options.items() if key in known}, **own)
        scheduler.set_timesteps(steps, device=device)
    return scheduler


@contextmanager
def _no_deprecations() -> Iterator[None]:
    """Keep quiet about what diffusers' schedulers ask of NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def alpha_sigma(scheduler: Any, time: Tensor) -> tuple[float, float]:
    """How much of the image and how much noise the model sees at this time; their squares sum to 1."""
    if float(scheduler.init_noise_sigma) > 1:  # a scheduler that counts in noise for each unit of image
        sigma = float(scheduler.sigmas[scheduler.step_index])
        return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
    kept = float(scheduler.alphas_cumprod[int(time)])
    return kept**0.5, (1 - kept) ** 0.5


def predicted_x0(kind: str, noisy: Tensor, prediction: Tensor, signal: float, noise: float) -> Tensor:
    """The clean image that a prediction of this kind (diffusers' `prediction_type`) means."""
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (noisy - noise * prediction) / signal
    return signal * noisy - noise * prediction


def check_scheduler(name: str) -> None:
    """Raise a ValueError, with all names, for one that is not among `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}")
