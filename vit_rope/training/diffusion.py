"""Train a denoiser: a DDPM (arXiv:2006.11239) whose attention has positions, on any set of images."""

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import sampling
from ..files import one_line, replacing_folder
from ..positions import Position
from .learner import Learner, NonFinite
from .optim import OptimConfig, ScheduleConfig

OPTIM, SCHEDULE = OptimConfig(weight_decay=0.0), ScheduleConfig()
MODELS = ("RopeUNet2DModel", "RopeDiT")
PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon", "sample": "sample"}
LEVELS = 10  # parts of the noise schedule for which the loss is logged


class Diffusion(Learner):
    """A denoiser, what it predicts and how it learns: logs `val/loss` and `val/loss_t000` and so on.

    The validation loss is the plain squared error of the prediction, under the same noise every time; `val/loss_t000`
    is that of the least noisy tenth of the steps. Losses of different predictions do not compare.

    Args:
        model: RopeUNet2DModel, diffusers' U-Net with positions, or RopeDiT, a transformer
        model_args: keyword arguments of that class, such as {position: "axial(base=100)", layers_per_block: 2}
        num_classes: from the data, as are `in_chans` and `img_size`
        in_chans: channels of an image
        img_size: pixels along a side of an image, or [height, width]
        conditional: tell the model the class of an image, so that it can be asked for one
        label_dropout: share of the images whose class is kept from a conditional model, for guidance
        timesteps: levels of noise
        beta_schedule: how noise grows over them, by diffusers' names; squaredcos_cap_v2 is the cosine schedule
        prediction: what the model predicts: v (arXiv:2202.00512), the noise (epsilon) or the image (sample)
        snr_gamma: min-SNR weighting of the loss (arXiv:2303.09556), of which the paper's choice is 5; 0 is off
        sample_every: epochs between two pictures in samples/; 0 draws none
        sample_count: images in such a picture, always from the same noise
        sample_steps: steps of its sampler
        sample_scheduler: any sampler of `vit-rope sample`
        compile: run the model through torch.compile
        nonfinite: what a batch with a loss that is nan or infinite does: stop the run, be skipped, or (ignore) nothing
        optim: optimizer, learning rate, weight and layer decay
        schedule: warm-up and course of the learning rate
    """

    def __init__(
        self,
        model: Literal["RopeUNet2DModel", "RopeDiT"] = "RopeUNet2DModel",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: int | list[int] = 32,
        conditional: bool = False,
        label_dropout: float = 0.1,
        timesteps: int = 1000,
        beta_schedule: Literal["squaredcos_cap_v2", "linear", "sigmoid"] = "squaredcos_cap_v2",
        prediction: Literal["v", "epsilon", "sample"] = "v",
        snr_gamma: float = 0.0,
        sample_every: int = 10,
        sample_count: int = 64,
        sample_steps: int = 50,
        sample_scheduler: str = "ddim",
        compile: bool = False,
        nonfinite: NonFinite = "stop",
        optim: OptimConfig = OPTIM,
        schedule: ScheduleConfig = SCHEDULE,
    ):
        super().__init__(model, optim, schedule, nonfinite)
        if not 0 <= label_dropout < 1 or snr_gamma < 0 or min(sample_every, sample_count - 1, sample_steps - 1) < 0:
            raise ValueError(
                "Diffusion wants 0 <= label_dropout < 1, snr_gamma and sample_every >= 0, sample_count and "
                f"sample_steps >= 1, got {label_dropout}, {snr_gamma}, {sample_every}, {sample_count}, {sample_steps}"
            )
        if conditional and num_classes < 2:
            raise ValueError(f"a conditional model needs at least 2 classes, the data have {num_classes}")
        self.noise = make_noise(timesteps, beta_schedule, PREDICTIONS[prediction])
        self.classes = num_classes if conditional else 0
        self.null_label = num_classes if conditional and label_dropout else None
        labels = self.classes + (self.null_label is not None) or None
        facts = {"in_channels": in_chans, "out_channels": in_chans, "sample_size": img_size, "num_class_embeds": labels}
        self.model = create(model, model_args or {}, facts)
        self.denoiser = sampling.Denoiser(self.model, self.noise, self.classes, self.null_label)
        self.label_dropout, self.snr_gamma = label_dropout, snr_gamma
        self.sample_every, self.sample_count = sample_every, sample_count
        self.sample_steps, self.sample_scheduler = sample_steps, sample_scheduler
        sampling.check(self.denoiser, sample_scheduler, sample_steps, self.denoiser.size, self._sample_labels())
        if compile:
            self.model.compile()  # in place: the names in checkpoints stay

    def forward(self, noisy: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predictions (B, C, H, W) for noisy images (B, C, H, W) at times (B,)."""
        return self.model(noisy, time, *(() if labels is None else (labels,))).sample

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = self._check(batch, batch_idx)
        # of the step's seed alone, so that all models see the same noise, whatever else they draw
        generator = self._generator(torch.initial_seed(), self.current_epoch, batch_idx, self.global_rank)
        time = torch.randint(len(self.noise.betas), (len(images),), generator=generator, device=self.device)
        noise = torch.randn(images.shape, generator=generator, device=self.device)
        if labels is not None and self.null_label is not None:
            hidden = torch.rand(len(images), generator=generator, device=self.device) < self.label_dropout
            labels = labels.masked_fill(hidden, self.null_label)
        errors = self._errors(images, noise, time, labels)
        if self.snr_gamma:
            errors = errors * snr_weight(self.noise, time, self.snr_gamma)
        return errors.mean()

    def on_validation_epoch_start(self) -> None:
        self.scores = torch.zeros(2, LEVELS, dtype=torch.float64)  # of each level the sum of errors, and their number

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score(batch, batch_idx)
        # here and not when validation ends, for by then a moving average has given way to the weights in training
        if batch_idx + 1 == self.trainer.num_val_batches[0] and not self.trainer.sanity_checking:
            self._draw()

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def learning(self) -> nn.Module:
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone: what positions learn, and what labels mean."""
        spared = [name for name, module in self.named_modules() if isinstance(module, (Position, nn.Embedding))]
        return {name for name, _ in self.named_parameters() if name.startswith(tuple(f"{part}." for part in spared))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["denoiser"] = sampling.describe(self.denoiser)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match checkpoint.get("denoiser"):
            case {"noise": {"prediction_type": str(learned)}} if learned != self.noise.config.prediction_type:
                names = {kind: name for name, kind in PREDICTIONS.items()}
                was, wanted = names.get(learned, learned), names[self.noise.config.prediction_type]
                raise ValueError(
                    f"the checkpoint's model has learned to predict {was}, not {wanted}: "
                    f"set prediction: {was}, or train anew"
                )

    def export(self, folder: Path, state_dict: dict[str, Tensor], extra: dict[str, Any]) -> Path:
        """Write a diffusers pipeline's folder with the weights of this `state_dict`."""
        model = type(self.model).from_config(self.model.config)  # this one may lie in shards by now
        model.load_state_dict({key.removeprefix("model."): value for key, value in state_dict.items()})
        with replacing_folder(folder) as beside:
            sampling.save(self.denoiser._replace(model=model), beside)
        return folder

    def _check(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        wanted = (self.model.config.in_channels, *self.denoiser.size)
        if images.shape[1:] != wanted:
            raise ValueError(f"{self.name} was built for images {wanted}, the data have {tuple(images.shape[1:])}")
        if batch_idx == 0 and (most := float(images.abs().max())) > 1.01:  # not each time, for it waits for the device
            raise ValueError(f"a DDPM wants images in [-1, 1], the data reach {most:.2f}; give them mean and std 0.5")
        return images, labels if self.classes else None

    def _errors(self, images: Tensor, noise: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Squared errors (B,) of the predictions, each the mean over an image."""
        prediction = self(self.noise.add_noise(images, noise, time), time, labels)
        target = make_target(self.noise, images, noise, time)
        return (prediction.float() - target).square().flatten(1).mean(dim=1)

    def _score(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the errors of a batch; one image after another is seen at the next level, whatever a batch's size."""
        images, labels = self._check(batch, batch_idx)
        steps, seen = len(self.noise.betas), int(self.scores[1].sum())
        level = (torch.arange(len(images), device=self.device) + seen) % LEVELS
        generator = self._generator(0, 0, batch_idx, self.global_rank)
        noise = torch.randn(images.shape, generator=generator, device=self.device)
        within = torch.rand(len(images), generator=generator, device=self.device)
        errors = self._errors(images, noise, ((level + within) * steps / LEVELS).long(), labels)
        found = torch.stack((errors, torch.ones_like(errors))).double().cpu()
        self.scores.index_add_(1, level.cpu(), found)

    def _log_scores(self, split: str) -> None:
        totals = self.trainer.strategy.reduce(self.scores.to(self.device, torch.float32), reduce_op="sum")
        errors, counts = cast(Tensor, totals).cpu()
        for level in counts.nonzero()[:, 0].tolist():
            name = f"{split}/loss_t{level * len(self.noise.betas) // LEVELS:03}"
            self.log(name, errors[level] / counts[level], sync_dist=True)
        self.log(f"{split}/loss", errors.sum() / counts.sum(), sync_dist=True)

    def _draw(self) -> None:
        """Every so many epochs, and after the last, a picture of samples into the run's folder."""
        trainer: Any = self.trainer
        epoch, folder = self.current_epoch + 1, getattr(trainer.checkpoint_callback, "dirpath", None)
        due = self.sample_every and (epoch % self.sample_every == 0 or epoch == trainer.max_epochs)
        fitting = trainer.state.fn == "fit" and not trainer.fast_dev_run
        if due and fitting and folder:  # the run's folder is the one with its checkpoints
            path = Path(folder).parent / "samples" / f"epoch_{epoch:04}.png"
            chosen = (self.sample_count, self.sample_steps, self.sample_scheduler, None, self._sample_labels())
            images = sampling.sample(self.denoiser, *chosen)  # by every process: sharded weights are gathered by all
            if trainer.is_global_zero:
                sampling.write_png(sampling.image_grid(images, self.classes), path)

    def _sample_labels(self) -> list[int] | None:
        return list(range(self.classes)) or None

    def _generator(self, seed: int, epoch: int, batch_idx: int, rank: int) -> torch.Generator:
        number = ((seed * 1_000_003 + epoch) * 1_000_003 + batch_idx) * 1_003 + rank
        return torch.Generator(self.device).manual_seed(number % 2**63)


def make_noise(timesteps: int, beta_schedule: str, prediction_type: str) -> Any:
    """diffusers' DDPMScheduler; ValueError where its last level still shows the image, which sampling could not."""
    from diffusers import DDPMScheduler  # seconds of import that a classifier's training need not wait for

    if timesteps < 2:
        raise ValueError(f"a DDPM wants at least 2 timesteps, got {timesteps}")
    noise: Any = DDPMScheduler(timesteps, beta_schedule=beta_schedule, prediction_type=prediction_type)
    left = math.sqrt(float(noise.alphas_cumprod[-1]))
    if left > 0.05:
        raise ValueError(
            f"after {timesteps} timesteps the {beta_schedule} schedule leaves {left:.0%} of the image, but sampling "
            f"starts from none; take squaredcos_cap_v2, which fits any number of steps, or 1000 timesteps"
        )
    return noise


def create(name: str, args: dict[str, Any], facts: dict[str, Any]) -> Any:
    """The model of this class for the data's facts; ValueError or TypeError for arguments that do not fit."""
    import inspect

    if name == "RopeDiT":
        from ..models.dit import RopeDiT as cls
    elif name == "RopeUNet2DModel":
        from ..unet.classes import RopeUNet2DModel as cls
    else:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    for key in args:
        if key in facts:
            raise ValueError(f"model_args give {key}, which comes from the data; leave it out")
        if key not in known:
            near = get_close_matches(key, known, n=3) or known
            raise TypeError(f"{name} has no argument {key!r}; did you mean {', '.join(near)}?")
    try:
        return cls(**args, **facts)
    except (ValueError, TypeError):
        raise  # in words of our own or diffusers'
    except Exception as error:  # a model's constructor raises about anything at arguments that it does not expect
        raise ValueError(f"{name} with {args}: {one_line(error)}") from error


def make_target(noise: Any, images: Tensor, drawn: Tensor, time: Tensor) -> Tensor:
    """What the model should predict for images under the noise `drawn`, by the kind of prediction of `noise`."""
    match noise.config.prediction_type:
        case "epsilon":
            return drawn
        case "sample":
            return images
        case _:
            return noise.get_velocity(images, drawn, time)


def snr_weight(noise: Any, time: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (B,) of squared errors (arXiv:2303.09556): min(SNR, gamma) of the image's own error.

    The error of the image is that of the noise divided by the SNR, and that of the velocity divided by SNR + 1.
    """
    kept = noise.alphas_cumprod.to(time.device)[time]
    snr = kept / (1 - kept)
    weight = snr.clamp(max=gamma)
    return weight / {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[noise.config.prediction_type]
