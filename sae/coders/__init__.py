"""What sparse coders compute: definitions, one coder, all coders of a run, and what fires.

functional.py is the specification; sparse_coder.py runs it through the kernels, and sharded.py does
so for a coder that several ranks hold, which it knows as a group of ranks and no more. Imports
config, kernels and formats. No launch, language model or file of a run enters here.
"""
