"""Questions that a profile answers: what-ifs, frontiers, comparisons, the uniform rival."""
