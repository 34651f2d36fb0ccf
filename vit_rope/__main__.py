"""`python -m vit_rope VERB …` is `vit-rope VERB …`."""

from vit_rope_cli import main

if __name__ == "__main__":
    main()
