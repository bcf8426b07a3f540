"""The parts of the bundle adjustment example."""
