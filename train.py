"""`python train.py VERB …` is `vit-rope VERB …`, such as fit --config configs/digits_vit.yaml."""

from vit_rope_cli import main

if __name__ == "__main__":
    main()
