"""The Triton room: one file stem per op, forward and backward apart. Installed as `alrao_fast.kernels`.

Imports nothing from alrao_fast.ops: the launchers take checked arguments and allocate their results. Importing a module
of this room imports triton; set TRITON_INTERPRET=1 before that to run the kernels on CPU tensors, without a GPU.
"""
