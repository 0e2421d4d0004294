"""The stages, one file and one public `run` each. They do not import one another: they meet in the run directory."""
