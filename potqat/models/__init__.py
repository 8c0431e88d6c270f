"""Models that the flows and notebooks train."""
