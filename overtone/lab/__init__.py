"""The lab: edit models with many losses and compare them. Each sub-package imports only from those on its left.

data -> model -> edit -> score -> results -> run, report
"""
