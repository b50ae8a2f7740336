"""Selection of training data: scores of examples, and the artifacts that keep them."""
