"""`python benchmarks quality`: Alrao without tuning against tuned and tuning-free rivals."""
