"""The checkpoint with the best score, wherever its run lies by now."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, keeping checkpoints/best.ckpt alone, also in a folder that was moved or copied.

    Lightning forgets the best score where the folder has another name than before, and overwrites a better checkpoint.
    """

    def on_load_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the files of the run that goes on to lie where its checkpoint does now, and what is gone for gone."""
        state = checkpoint["callbacks"].get(self.state_key)
        if not state or not state["best_model_path"]:
            return
        here = Path(trainer.ckpt_path).resolve().parent
        best = str(here / Path(state["best_model_path"]).name)
        if Path(best).is_file():
            scores = {best: score for score in state["best_k_models"].values()}
            moved = {"dirpath": str(here), "best_k_models": scores, "kth_best_model_path": best if scores else ""}
            state |= moved | {"best_model_path": best}
        else:
            state |= {"dirpath": None, "best_model_path": ""}
