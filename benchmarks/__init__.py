"""Products of `linearize` beside those of its peers and a limit written by hand.

`python -m benchmarks.run --help` lists the options. The way of the data:

    cases/*     what is measured: a function, its point, its least linear work
    engines     who is measured: ways to apply a Jacobian again and again at one point
    measure     verify, then time side by side; memory; runs of the function
    figures     the numbers with a target, and whether they are met
    report      tables, the plot, the page of the documentation
    run         the command line
    gpu         the group of cases for a CUDA device
"""
