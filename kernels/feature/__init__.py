"""The optimizers of one learning rate per feature: one launch over many tensors."""
