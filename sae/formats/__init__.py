"""Files of coders: read into a config and tensors, written from them.

`sparsify.py` is our own format, the reference's, in one file or in pieces (`pieces.py`); `hub.py`
finds folders of coders on the Hub. Imports config alone: no coder enters here, so that the coders
can offer loading and saving.
"""
