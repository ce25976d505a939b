"""The mathematics in plain PyTorch, one file per op: the specification that every backend is tested against.

Slow and simple on purpose: float32 arithmetic (float64 for float64 tensors), gradients by plain autograd, nothing of
this package imported, nothing registered with the dispatcher.
"""
