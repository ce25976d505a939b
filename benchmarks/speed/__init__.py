"""What Alrao costs: `python benchmarks speed`. Every op and whole training steps beside what else does them.

All candidates of a case run in turns, so that the machine's moods fall on all alike; times are medians over the rounds.
On a shared machine only ratios within a case mean anything.

Records, one JSON object a line in `results/speed/speed.jsonl` (`results.Results`), each with "machine". Their "case"
has "benchmark": "speed" and "kind":

- "rates": what the machine can do. Values: `copy`, bytes per second; one entry per dtype, flops per second of a matrix
  product.
- "candidate": one candidate of one case. case: `name`, `op` (feature_sgd, feature_adam, gradient_clip, switch_mixture,
  switch_update, training_step), `sizes` (a dict of numbers), `dtype` (tf32: float32 with rounded matrix products),
  `device`, `candidate`, and `dry_run` where the sizes are tiny and the times mean nothing. Values: `missing`, why there
  is nothing else; or `seconds`, by clock (wall; on a GPU also gpu, graph, host) {median, lower, upper}, the quartiles;
  `no_clock`, by clock, why it is missing; `error`, the worst relative error against float64; `peak_memory`, bytes
  beyond the inputs; `bytes` and `flops` that the case needs at least, or null; `copy_share` and `matrix_share` of the
  rates; `rounds` that were asked for.
- "target": a figure to reach. case: as above without `candidate`, with `row`, `metric`, `ours`, `peer` (null: the
  floor). Values: `ratio`, `limit`, `met`, `clock`; `missing`, why there is no ratio.
- "sweep": how time and memory grow. case: `sweep` (clones, classes, parameters), `candidate`, `device`. Values: `at`,
  the sizes; `seconds` and `peak_memory` there; `time_exponent` and `memory_exponent`, least squares in log-log over the
  upper half of the sizes.
"""

from benchmarks.speed.command import main

__all__ = ["main"]
