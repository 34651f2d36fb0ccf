"""Which noise levels a scheduler visits for every number of steps, and how bright images get."""

import itertools
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from vit_rope.sampling import SCHEDULERS, Denoiser, denoise, make_scheduler
from vit_rope.training.objective import make_noise

COUNTS = [(levels, steps) for levels in (10, 25, 64) for steps in range(1, levels + 1)]
COUNTS += [(1000, steps) for steps in (7, 30, 50, 100, 250, 300, 400, 499, 501, 600, 999, 1000)]


class Uniform(nn.Module):
    """The best denoiser of images (B, 1, 8, 8) of one brightness, uniform in [-1, 1]."""

    config = SimpleNamespace(in_channels=1)

    def __init__(self, noise):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.noise, self.seen = noise, []

    def forward(self, x, time):
        self.seen.append(int(time))
        alpha = self.noise.alphas_cumprod[int(time)].double().sqrt()
        sigma = (1 - alpha**2).sqrt()
        x = x.double()
        brightness = torch.linspace(-1, 1, 2001).double()
        found = x.mean(dim=(1, 2, 3))[:, None]
        odds = -((found - alpha * brightness) ** 2) / (2 * sigma**2 / x[0].numel())
        image = (odds.softmax(dim=1) @ brightness)[:, None, None, None]
        return SimpleNamespace(sample=((alpha * x - image) / sigma).float())


def drawn(name, noise, steps, count=200):
    """Images (count, 1, 8, 8) of the exact denoiser of a noise schedule, and the levels it saw.

    The means of the initial noise are normal quantiles.
    """
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    start = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators])
    means = torch.special.ndtri((torch.arange(count) + 0.5) / count) / 8
    start += means[:, None, None, None] - start.mean(dim=(1, 2, 3), keepdim=True)
    model = Uniform(noise)
    return denoise(Denoiser(model, noise), make_scheduler(name, noise, steps), start, generators), model.seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_number_of_steps_begins_near_pure_noise(name):
    noises = {levels: make_noise(levels, "squaredcos_cap_v2", "v_prediction") for levels in (10, 25, 64, 1000)}
    for levels, steps in COUNTS:
        times = make_scheduler(name, noises[levels], steps).timesteps.tolist()
        assert times == sorted(times, reverse=True), (levels, steps)
        assert len(set(times)) == steps, (levels, steps)
        assert levels - 1 - times[0] <= levels // steps, (levels, steps)
        assert 0 <= times[-1] <= levels // steps, (levels, steps)
        strides = {before - after for before, after in itertools.pairwise(times)} - {0}
        assert strides <= {levels // steps, levels // steps + 1}, (levels, steps)
    with pytest.raises(ValueError, match="10 noise levels, so steps are 1 to 10, not 11"):
        make_scheduler(name, noises[10], 11)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_are_as_bright_as_the_data_for_every_number_of_steps(name):
    """Their deviation is 1 / sqrt(3), but for the error of few steps.

    From the middle of the schedule it was as low as 0.1.
    """
    noise_left = 0.05 if name == "pndm" else 0.005  # it overshoots in its last step
    for levels, steps in [(10, 10), *((25, steps) for steps in range(5, 26, 2)), (64, 50), (1000, 30), (1000, 300)]:
        images, seen = drawn(name, make_noise(levels, "squaredcos_cap_v2", "v_prediction"), steps)
        brightness = images.mean(dim=(1, 2, 3))
        assert len(set(seen)) == steps
        assert abs(brightness.mean()) < 0.12, (levels, steps)  # of 200 images with noise of their own
        assert abs(brightness.std() - 3**-0.5) < 0.03 + 1 / steps, (levels, steps)
        assert (images - brightness[:, None, None, None]).abs().mean() < noise_left, (levels, steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_that_end_without_any_signal(name):
    """As arXiv:2305.08891 rescales them; their ratio of noise and signal ends at infinity."""
    noise = diffusers.DDPMScheduler(25, beta_end=0.5, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert noise.alphas_cumprod[-1] < 1e-6
    for steps in (1, 24, 25):
        images, _ = drawn(name, noise, steps)
        assert images.isfinite().all(), steps
    assert abs(images.mean(dim=(1, 2, 3)).std() - 3**-0.5) < 0.1
