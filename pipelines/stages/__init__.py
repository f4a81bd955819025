"""The stages of a run: thin shells that take rows, call the operators of `scol_ops` and give rows.

Each lies in a file of its name, which declares it (``stage``: what it reads, whose actors do it) and does it
(``operator``: loads its networks, gives a function from rows to rows). `chain` lists them.
"""
