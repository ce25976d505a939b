"""The Triton room: a folder per family, forward and backward apart. Installed as `alrao_fast.kernels`.

Imports of alrao_fast.ops only the names of a likelihood's options (ops/mixture/likelihood.py): the launchers take
checked arguments and allocate their results. Importing a module of this room imports triton; set TRITON_INTERPRET=1
before that to run the kernels on CPU tensors, without a GPU.
"""
