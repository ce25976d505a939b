"""Training by many processes: a step's time on 1, 2, 4 ranks, and the arithmetic of a thousand."""
