"""Train a denoiser, a DDPM (arXiv:2006.11239) whose attention has positions, on any set of images.

Shapes   B images, C channels, (H, W) height and width of an image
"""

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import sampling
from ..files import one_line, replacing_folder
from ..positions import Position
from .learner import Learner, NonFinite
from .objective import make_noise, make_target, snr_weight
from .optim import OptimConfig, ScheduleConfig

OPTIM, SCHEDULE = OptimConfig(weight_decay=0.0), ScheduleConfig()
MODELS = ("RopeUNet2DModel", "RopeDiT")
PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon", "sample": "sample"}
LEVELS = 10  # equal parts of the noise schedule; the loss of each is logged


class Diffusion(Learner):
    """Training and evaluation of a denoiser.

    Logs `val/loss`, and `val/loss_t000` to `val/loss_t900` for tenths of the timesteps (of 1000).
    The validation loss is the plain squared error of the prediction, with the same noise every
    time; `val/loss_t000` is that of the least noisy tenth. Losses of different kinds of predictions
    are not comparable.

    Args:
        model: RopeUNet2DModel, diffusers' U-Net with positions, or RopeDiT, a transformer
        model_args: keyword arguments of that class, such as
            {position: "axial(base=100)", layers_per_block: 2}
        num_classes: number of classes; set from the data, as are `in_chans` and `img_size`
        in_chans: channels of an image
        img_size: side of an image in pixels, or [height, width]
        conditional: give the class of an image to the model, so that it can sample a given class
        label_dropout: fraction of images whose class is hidden from the model, for guidance
        timesteps: number of noise levels
        beta_schedule: how the noise grows, by diffusers' names; squaredcos_cap_v2 is the cosine
            schedule
        prediction: what the model predicts: v (arXiv:2202.00512), the noise (epsilon) or the image
            (sample)
        snr_gamma: gamma of min-SNR loss weighting (arXiv:2303.09556), 5 in the paper; 0 is off
        sample_every: epochs between two grids of samples in samples/; 0 is off
        sample_count: images in a grid, always from the same noise
        sample_steps: sampling steps of a grid
        sample_scheduler: sampler of a grid, any of `vit-rope sample`
        compile: run the model through torch.compile
        nonfinite: for a loss that is nan or infinite: stop the run, skip the batch, or ignore it
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
                "Diffusion needs 0 <= label_dropout < 1, snr_gamma and sample_every >= 0, sample_count and "
                f"sample_steps >= 1, got {label_dropout}, {snr_gamma}, {sample_every}, {sample_count}, {sample_steps}"
            )
        if conditional and num_classes < 2:
            raise ValueError(f"a conditional model needs at least 2 classes, the data have {num_classes}")
        self.noise = make_noise(timesteps, beta_schedule, PREDICTIONS[prediction])
        self.classes = num_classes if conditional else 0
        self.null_label = num_classes if conditional and label_dropout else None
        labels = self.classes + (self.null_label is not None) or None
        facts = {"in_channels": in_chans, "out_channels": in_chans, "sample_size": img_size, "num_class_embeds": labels}
        self.model = create_denoiser(model, model_args or {}, facts)
        self.denoiser = sampling.Denoiser(self.model, self.noise, self.classes, self.null_label)
        self.label_dropout, self.snr_gamma = label_dropout, snr_gamma
        self.sample_every, self.sample_count = sample_every, sample_count
        self.sample_steps, self.sample_scheduler = sample_steps, sample_scheduler
        sampling.check(self.denoiser, sample_scheduler, sample_steps, self.denoiser.size, self._sample_labels())
        if compile:
            self.model.compile()  # in place, which keeps the names in checkpoints

    def forward(self, noisy: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predictions (B, C, H, W) for noisy images (B, C, H, W), times (B,) and labels (B,)."""
        return self.model(noisy, time, *(() if labels is None else (labels,))).sample

    def loss(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of images (B, C, H, W) and labels (B,), a scalar, at random timesteps."""
        images, labels = self._check(batch, batch_idx)
        # seeded by the step only: all models get the same noise, whatever else they draw
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
        """Reset the sum of errors, and their number, of each noise level."""
        self.scores = torch.zeros(2, LEVELS, dtype=torch.float64)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the errors of a batch, and write a grid of samples after the last batch."""
        self._score(batch, batch_idx)
        # not in on_validation_epoch_end: by then EMA has put the trained weights back
        if batch_idx + 1 == self.trainer.num_val_batches[0] and not self.trainer.sanity_checking:
            self._draw()

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and the loss of each noise level."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Reset the sum of errors, and their number, of each noise level."""
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the errors of a batch."""
        self._score(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and the loss of each noise level."""
        self._log_scores("test")

    def trainable_module(self) -> nn.Module:
        """This module itself, whose `no_weight_decay()` knows the parameters of positions."""
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: those of positions and of label embeddings."""
        undecayed = [name for name, module in self.named_modules() if isinstance(module, (Position, nn.Embedding))]
        prefixes = tuple(f"{name}." for name in undecayed)
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the configuration of the denoiser, which `sampling.load` reads."""
        checkpoint["denoiser"] = sampling.describe(self.denoiser)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError for a checkpoint of a model with a different kind of prediction."""
        match checkpoint.get("denoiser"):
            case {"noise": {"prediction_type": str(learned)}} if learned != self.noise.config.prediction_type:
                names = {kind: name for name, kind in PREDICTIONS.items()}
                trained, configured = names.get(learned, learned), names[self.noise.config.prediction_type]
                raise ValueError(
                    f"the checkpoint's model was trained to predict {trained}, not {configured}: "
                    f"set prediction: {trained}, or train from scratch"
                )

    def export(self, folder: Path, state_dict: dict[str, Tensor], extra: dict[str, Any]) -> Path:
        """Write a diffusers pipeline with the weights of this module's `state_dict` to a folder."""
        model = type(self.model).from_config(self.model.config)  # self.model may be sharded
        model.load_state_dict({key.removeprefix("model."): value for key, value in state_dict.items()})
        with replacing_folder(folder) as temporary:
            sampling.save(self.denoiser._replace(model=model), temporary)
        return folder

    def _check(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        shape = (self.model.config.in_channels, *self.denoiser.size)
        if images.shape[1:] != shape:
            raise ValueError(f"{self.name} was built for images {shape}, the data have {tuple(images.shape[1:])}")
        # in the first batch only, because it waits for the device
        if batch_idx == 0 and (largest := float(images.abs().max())) > 1.01:
            raise ValueError(f"a DDPM needs images in [-1, 1], the data reach {largest:.2f}; use mean and std 0.5")
        return images, labels if self.classes else None

    def _errors(self, images: Tensor, noise: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Squared errors (B,) of the predictions, averaged over each image."""
        prediction = self(self.noise.add_noise(images, noise, time), time, labels)
        target = make_target(self.noise, images, noise, time)
        return (prediction.float() - target).square().flatten(1).mean(dim=1)

    def _score(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add up the errors of a batch.

        Successive images of the set get successive noise levels, whatever the batch size and the
        number of processes, of which each has every `world_size`-th image.
        """
        images, labels = self._check(batch, batch_idx)
        steps, count = len(self.noise.betas), int(self.scores[1].sum())
        number = torch.arange(len(images), device=self.device) + count
        level = (number * self.trainer.world_size + self.global_rank) % LEVELS
        generator = self._generator(0, 0, batch_idx, self.global_rank)
        noise = torch.randn(images.shape, generator=generator, device=self.device)
        offset = torch.rand(len(images), generator=generator, device=self.device)  # within the level
        errors = self._errors(images, noise, ((level + offset) * steps / LEVELS).long(), labels)
        errors_and_counts = torch.stack((errors, torch.ones_like(errors))).double().cpu()
        self.scores.index_add_(1, level.cpu(), errors_and_counts)

    def _log_scores(self, split: str) -> None:
        """Log the mean error of each noise level and of all, over all processes."""
        errors, counts = self.total(self.scores)
        for level in counts.nonzero()[:, 0].tolist():
            name = f"{split}/loss_t{level * len(self.noise.betas) // LEVELS:03}"
            self.log(name, errors[level] / counts[level], sync_dist=True)
        self.log(f"{split}/loss", errors.sum() / counts.sum(), sync_dist=True)

    def _draw(self) -> None:
        """Write a grid of samples, every `sample_every` epochs and after the last."""
        trainer: Any = self.trainer
        epoch, checkpoints = self.current_epoch + 1, getattr(trainer.checkpoint_callback, "dirpath", None)
        due = self.sample_every and (epoch % self.sample_every == 0 or epoch == trainer.max_epochs)
        fitting = trainer.state.fn == "fit" and not trainer.fast_dev_run
        if due and fitting and checkpoints:
            path = Path(checkpoints).parent / "samples" / f"epoch_{epoch:04}.png"
            images = sampling.sample(  # in all processes, which together gather sharded weights
                self.denoiser, self.sample_count, self.sample_steps, self.sample_scheduler, labels=self._sample_labels()
            )
            if trainer.is_global_zero:
                sampling.write_png(sampling.image_grid(images, self.classes), path)

    def _sample_labels(self) -> list[int] | None:
        """All classes, or None for an unconditional model."""
        return list(range(self.classes)) or None

    def _generator(self, seed: int, epoch: int, batch_idx: int, rank: int) -> torch.Generator:
        """A random generator on the device that is seeded with these numbers."""
        number = ((seed * 1_000_003 + epoch) * 1_000_003 + batch_idx) * 1_003 + rank
        return torch.Generator(self.device).manual_seed(number % 2**63)


def create_denoiser(name: str, args: dict[str, Any], facts: dict[str, Any]) -> Any:
    """A model of the class `name` with the arguments `args` and `facts`.

    `facts` are the arguments that the data determine. Raises ValueError or TypeError, of one line,
    for arguments that do not fit.
    """
    # these imports load diffusers, which takes seconds
    if name == "RopeDiT":
        from ..models.dit import RopeDiT as cls
    elif name == "RopeUNet2DModel":
        from ..unet.classes import RopeUNet2DModel as cls
    else:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    parameters = list(inspect.signature(cls.__init__).parameters)[1:]
    for key in args:
        if key in facts:
            raise ValueError(f"model_args give {key}, which comes from the data; leave it out")
        if key not in parameters:
            near = get_close_matches(key, parameters, n=3) or parameters
            raise TypeError(f"{name} has no argument {key!r}; did you mean {', '.join(near)}?")
    try:
        return cls(**args, **facts)
    except (ValueError, TypeError):
        raise  # from this library or diffusers, with a message that explains it
    except Exception as error:  # for arguments it does not expect, a constructor may raise any exception
        raise ValueError(f"{name} with {args}: {one_line(error)}") from error
