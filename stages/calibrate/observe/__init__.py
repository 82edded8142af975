"""What is measured while a forward runs: observers, and the sums and maxima they add to."""
