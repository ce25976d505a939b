"""What a GPU verifies, in one go and without a network: `python benchmarks gpu_check`; `gpu_status` of its results."""
