"""Smaller programs.

A program comes in; one that is the same map and takes less goes out, by passes that each do one
thing. Open `passes` first.
"""
