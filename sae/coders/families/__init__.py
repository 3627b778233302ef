"""Kinds of coders: each file is one, named after its --activation, and holds all that is its own.

How active latents are found, which flags and sizes go with it, and how ranks may share it. The
object in it called FAMILY is found by `family.family_of`. Imports config alone; what computes are
the kernels of the coder that a family is given. No branch on the kind of a coder is anywhere else.
"""
