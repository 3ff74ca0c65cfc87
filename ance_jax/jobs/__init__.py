"""One module per job, named as in --job, and the parts of some."""
