"""The clones of the last layer: the mixture's loss and log-probabilities, each in the regime that its sizes ask for."""
