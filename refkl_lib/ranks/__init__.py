"""Several processes: a DeepSpeed ZeRO-3 job that is started from one, watched, and always ended."""
