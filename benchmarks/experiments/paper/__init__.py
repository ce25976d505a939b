"""`python benchmarks paper table1 | table2 | figure2 ... figure8`: the paper's experiments on the fused kernels."""
