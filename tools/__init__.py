"""What keeps the notebooks fit for git and for readers; `make` runs it."""
