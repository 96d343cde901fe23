"""A stand-in for EasyEdit, written for the tests: the seams that the adapters hook, around the smallest trainers."""
