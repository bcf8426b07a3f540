"""Nonlinear regression on the NIST Statistical Reference Datasets.

One module, one job: `data` reads the files, `models` holds the eighteen model functions,
`fit` runs the solver, `report` draws the table and the plot.
"""
