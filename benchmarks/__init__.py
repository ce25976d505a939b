"""What Alrao buys and what it costs: the commands of `python benchmarks COMMAND`, and what they are made of.

`speed` times ops and training steps, `experiments` trains networks, `gpu` verifies a GPU in one go, `report` makes a
page of what they wrote. `networks` are what is trained and timed.
"""
