"""Where things run: launch file to Accelerator, ranks, owners, signals, and ranks that are lost.

Imports config, data and lm. No coder and no optimizer enters here: what travels are rows and sums.
"""
