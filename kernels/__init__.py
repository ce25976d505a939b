"""The Triton room: one file stem per op. Installed as `alrao_fast.kernels`; holds no kernel yet."""
