"""The checkpoint with the best score, wherever its run lies by now."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, keeping checkpoints/best.ckpt alone, also in a folder that was moved or copied.

    Lightning forgets the best score where the folder has another name than before, and overwrites a better checkpoint.
    Raises ValueError for another `filename` and for other numbers of checkpoints, which nothing here would find again.
    """

    def __init__(self, dirpath: str | None = None, filename: str = "best", save_top_k: int = 1, **kwargs: Any):
        if save_top_k != 1 or filename != "best":
            raise ValueError(
                "a run keeps its best checkpoint as best.ckpt, and last.ckpt: leave out checkpoint.save_top_k and "
                f"checkpoint.filename, got {save_top_k} and {filename!r} for 1 and 'best'"
            )
        super().__init__(dirpath=dirpath, filename=filename, save_top_k=save_top_k, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._check_monitors(trainer, type(pl_module).__name__)
        super().on_validation_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the files of the run that goes on to lie where its checkpoint does now, and what is gone for gone."""
        state = checkpoint["callbacks"].get(self.state_key)
        if not state or not state["best_model_path"]:
            return
        here = Path(trainer.ckpt_path).resolve().parent
        best = str(here / Path(state["best_model_path"]).name)
        if Path(best).is_file():
            scores = {best: state["best_model_score"]} if state["best_k_models"] else {}
            moved = {"dirpath": str(here), "best_k_models": scores, "kth_best_model_path": best if scores else ""}
            state |= moved | {"best_model_path": best}
        else:
            state |= {"dirpath": None, "best_model_path": ""}

    def _check_monitors(self, trainer: Any, name: str) -> None:
        """Look, first before the first epoch, whether the scores come that this and stopping early wait for."""
        scores = sorted(score for score in trainer.callback_metrics if score.startswith("val/"))
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None) if getattr(callback, "strict", True) else None
            if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in scores:
                setting = "checkpoint.monitor" if callback is self else f"the monitor of {type(callback).__name__}"
                raise ValueError(
                    f"{setting} is {monitor}, which {name} does not log: "
                    f"choose one of {', '.join(scores)}, and the mode for it, min or max"
                )
