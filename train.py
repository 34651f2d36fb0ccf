"""Train, validate and test from YAML: `python train.py fit --config configs/digits_vit.yaml`.

Everything can be set on the command line too, such as `--model.model_args.position "mixed + learned"`;
`python train.py fit --help` lists it. `--import MODULE` makes position schemes of your own known.
"""

import os

if __name__ == "__main__":
    # waiting threads soon sleep; by default they spin, which on cores that other work shares is several times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

    from vit_rope.cli.fit import main

    main()
