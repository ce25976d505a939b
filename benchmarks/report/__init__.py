"""`python benchmarks report`: one self-contained page from the result files of the other commands."""
