"""Production teaches: from answers and labels to the next training set."""
