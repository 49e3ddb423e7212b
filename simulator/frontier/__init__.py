"""The frontier: what accuracy is left of a model at a privacy budget, with a part of the devices attacking."""
