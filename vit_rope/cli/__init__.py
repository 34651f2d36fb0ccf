"""The command line, a file for each verb. `vit_rope_cli` knows the verbs and loads a file when it is chosen."""
