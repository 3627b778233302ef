"""What one step does: losses, sums, optimizers, schedules, bad steps, and what is logged.

Imports config, kernels, formats, coders, data, lm and placement. Nothing here knows of files of a
run.
"""
