"""Measuring what runs: times of operations beside their baselines and the machine's own ceilings."""
