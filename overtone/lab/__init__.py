"""The lab: edit models with many losses and compare them. Imports go from the left of this line to the right only.

data -> model -> edit -> score -> results -> run -> report
"""
