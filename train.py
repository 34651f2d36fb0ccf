"""Train, validate and test: `python train.py fit --config configs/digits_vit.yaml` is `vit-rope fit --config …`."""

from vit_rope_cli import main

if __name__ == "__main__":
    main()
