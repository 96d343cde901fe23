"""The loss inside training frameworks: one file for each, which imports its framework when it is itself imported.

Every adapter takes its settings as `read_settings` does.
"""
