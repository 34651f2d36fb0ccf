"""The command line: one file per verb, with `main(args)`, which `vit_rope_cli` loads."""
