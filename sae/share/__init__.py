"""Trained coders on their way to others: in the files of other programs, and on the Hub.

Stands on formats and judge. Nothing that trains or judges imports it; how files look is in
formats.
"""
