"""What sparse coders compute: definitions, one coder, all coders of a run, and what fires.

functional.py is the specification; sparse_coder.py runs it through the kernels. Imports config,
kernels and formats. No rank, language model or file of a run enters here.
"""
