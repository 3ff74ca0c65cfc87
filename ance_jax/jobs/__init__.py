"""One file a job, named as --job is, and the parts of some."""
