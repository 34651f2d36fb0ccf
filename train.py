"""Train, validate and test from YAML: `python train.py fit --config configs/digits_vit.yaml`.

Everything can be set on the command line too, such as `--model.model_args.position "mixed + learned"`;
`python train.py fit --help` lists it. `--import MODULE` makes position schemes of your own known.
"""

from vit_rope.training.cli import main

if __name__ == "__main__":
    main()
