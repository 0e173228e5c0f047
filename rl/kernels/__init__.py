"""Compiled numerics shared by environments, search and algorithms: counter-based RNG, the jit helper and estimator scans."""
