"""What trained coders are worth: held-out figures, predictions, comparisons, the features page.

Stands on all other rooms; only the script and the commands of `python -m sae` import it. Nothing
here changes a coder.
"""
