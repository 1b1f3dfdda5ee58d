"""The sub-commands of `mor`: each module adds its arguments and runs. Heavy imports happen inside `run`."""
