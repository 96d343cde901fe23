"""How a model is edited: methods, their optimiser settings, and the losses that drive them."""
