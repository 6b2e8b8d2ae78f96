"""What keeps the notebooks fit for git and for readers, makes the site, and runs the benchmarks; `make` runs it."""
