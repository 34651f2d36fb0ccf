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
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
}
ENDS_BELOW = {"dpm++", "dpm++sde", "dpm++1s", "unipc", "deis"}  # they need a level below those that they visit
CLEAN = 1e-6  # the variance of the noise of that level
LEAST_KEPT = {"heun": 1 / 16}  # of the signal's variance by one level: after a larger change it overshoots
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # diffusers' names


def check_scheduler(name: str) -> None:
    """Raise ValueError, which lists all names, for a name that is not in `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}")


def noise_levels(name: str, count: int, steps: int) -> Tensor:
    """The noise levels (steps,) of `count` that a scheduler visits, ascending and all different.

    They are the middles of equal intervals, so the first step is half a stride from pure noise:
    any closer, and Heun and Euler's ancestral steps are unstable. ddpm takes the lower ends, as
    diffusers' pipeline of that name does. Raises ValueError if `steps` is not 1 to `count`.
    """
    if not 1 <= steps <= count:
        raise ValueError(f"the model was trained with {count} noise levels, so steps are 1 to {count}, not {steps}")
    halves = 2 * torch.arange(steps) + (name != "ddpm")
    return halves * count // (2 * steps)


class Spaced:
    """A scheduler of diffusers that takes one step from each of some noise levels of a training.

    diffusers' spacings need a number of steps that divides that of the levels: with others they
    begin in the middle of the schedule, and DDIM and PNDM step over levels that they do not visit.
    So the scheduler inside is made for a schedule of only these levels (section 4 of
    arXiv:2102.09672) and takes all of its steps, while `timesteps` are levels of the training.

    Args:
        name: a key of `SCHEDULERS`
        betas: those of the training (levels,)
        levels: those to visit, ascending, as from `noise_levels`
        device: that of `timesteps`
    """

    def __init__(self, name: str, betas: Tensor, levels: Tensor, device: torch.device | None = None) -> None:
        import diffusers  # slow to import, and not needed before

        class_name, fixed = SCHEDULERS[name]
        below = [1 - CLEAN] if name in ENDS_BELOW else []
        signal = (1 - betas.double().cpu()).cumprod(0)[levels]
        signal = torch.cat((torch.tensor([1.0, *below], dtype=torch.float64), signal))
        kept = (signal[1:] / signal[:-1]).clamp(min=LEAST_KEPT.get(name, 2**-16))
        options = {
            "trained_betas": (1 - kept).tolist(),  # values, as not every scheduler knows every schedule's name
            "num_train_timesteps": len(kept),
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "clip_sample": False,
        }
        cls = getattr(diffusers, class_name)
        known = inspect.signature(cls.__init__).parameters
        with no_numpy_deprecations():
            self.inner: Any = cls(**{key: value for key, value in options.items() if key in known}, **fixed)
            self.inner.set_timesteps(len(levels), device=device)
        numbers = [int(time) - len(below) for time in self.inner.timesteps]
        self.timesteps = levels[numbers].to(device)
        self._times = dict(zip(self.timesteps.tolist(), self.inner.timesteps, strict=True))
        self._takes_generator = "generator" in inspect.signature(self.inner.step).parameters

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise to start from."""
        return float(self.inner.init_noise_sigma)

    def alpha_sigma(self, time: Tensor) -> tuple[float, float]:
        """The scales (alpha, sigma) of image and noise in what the model sees at this level.

        alpha² + sigma² = 1.
        """
        alpha_squared = float(self.inner.alphas_cumprod[int(self._times[int(time)])])
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def scale_model_input(self, x: Tensor, time: Tensor) -> Tensor:
        """What the model sees (B, C, H, W): alpha times the image plus sigma times noise."""
        return self.inner.scale_model_input(x, self._times[int(time)])

    def step(self, velocity: Tensor, time: Tensor, x: Tensor, generator: Any = None) -> Any:
        """Step from this level to the next; the field `prev_sample` of the result is (B, C, H, W).

        `generator`, or a list of one for each image, draws the noise of schedulers that add some.
        """
        options = {"generator": generator} if self._takes_generator else {}
        with no_numpy_deprecations():
            return self.inner.step(velocity, self._times[int(time)], x, **options)


def make_scheduler(name: str, noise: Any, steps: int, device: torch.device | None = None) -> Spaced:
    """Make diffusers' scheduler for a short name, ready for `steps` steps.

    `noise` is the scheduler of the training, whose noise schedule it uses. It expects velocities.
    Raises ValueError for an unknown name, and for more steps than there are noise levels.
    """
    check_scheduler(name)
    return Spaced(name, noise.betas, noise_levels(name, len(noise.betas), steps), device)


@contextmanager
def no_numpy_deprecations() -> Iterator[None]:
    """Silence deprecation warnings about how diffusers' schedulers use NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


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
